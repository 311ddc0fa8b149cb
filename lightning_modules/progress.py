"""A progress bar for long work outside of Lightning's loops."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(shown: bool) -> Progress:
    """Bar with description, share, time gone and time left; it vanishes when the work is done.

    Args:
        shown: False draws nothing, for tests and for all ranks but the first.
    """
    # A console of its own: Lightning's progress bar may be live on the shared one.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(),
        transient=True,
        disable=not shown,
    )
