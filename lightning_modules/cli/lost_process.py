"""What is said when a process of a run on several is gone, by those that are left."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from lightning.pytorch import Trainer

from lightning_modules.cli.errors import ReportedError
from lightning_modules.cli.run_directory import RunDirectory

# The words of gloo, of torch's key-value store and of NCCL about a connection whose other end is
# gone. A slow process (a timeout) or a connection of the user's own is none of them.
_GONE = re.compile(
    r"gloo/transport/.*?(?P<gloo>Connection (?:closed|reset) by peer|Broken pipe)"
    r"|(?P<store>Connection was likely closed)"
    r"|(?P<nccl>remote process exited or there was a network error)",
    re.DOTALL,
)
_OBSERVER = "lightning.fabric.strategies.launchers.subprocess_script"


@contextlib.contextmanager
def reported_loss(trainer: Trainer, run: RunDirectory, subcommand: str) -> Iterator[None]:
    """Say in one line that another process is gone and how to go on, however it is noticed.

    Args:
        trainer: Knows the rank of this process.
        run: The run that can be gone on with.
        subcommand: Only what ``fit`` has done is worth going on with.

    Raises:
        ReportedError: If the body failed because another process is gone.
    """
    notice = _Notice(run, subcommand)
    observer = logging.getLogger(_OBSERVER)
    observer.addFilter(notice)
    try:
        yield
    except RuntimeError as error:
        reason = reason_of_loss(error)
        if reason is None:
            raise
        raise ReportedError(
            f"rank {trainer.global_rank}: another process of the run is gone ({reason}); it was "
            f"killed, or has shown its own error; {_remedy(run, subcommand)}"
        ) from error
    finally:
        observer.removeFilter(notice)


def reason_of_loss(error: BaseException) -> str | None:
    """Return what a backend says of the connection to a lost process; None for all other errors.

    An error that came up while another kind was being handled is that one's consequence, and None
    as well.
    """
    words = _GONE.search(str(error)) if isinstance(error, RuntimeError) else None
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if words is None or (earlier is not None and reason_of_loss(earlier) is None):
        return None
    return next(text for text in words.groups() if text)


class _Notice(logging.Filter):
    """Puts our words for Lightning's where it ends all processes because one it started ended.

    It does so by SIGKILL, within 5 s, while those that are left may still wait for the lost one.
    """

    def __init__(self, run: RunDirectory, subcommand: str) -> None:
        super().__init__()
        self._run, self._subcommand = run, subcommand

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.match(
            r"\[rank: (\d+)\] Child process with PID \d+ terminated with code (-?\d+)",
            record.getMessage(),
        )
        if found:
            record.msg = (
                f"rank 0: the process of rank {found[1]} is gone (code {found[2]}), so the others "
                f"are ended; {_remedy(self._run, self._subcommand)}"
            )
            record.args = ()
        return True


def _remedy(run: RunDirectory, subcommand: str) -> str:
    if subcommand == "fit" and run.config.is_file():
        return f"resume with: python train.py fit --resume {run.path}"
    return "start it again"
