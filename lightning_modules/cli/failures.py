"""How a call ends: exit codes, and one line instead of a traceback for what the user can mend."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from lightning_modules.cli.errors import ReportedError, StopRequested
from lightning_modules.cli.run_directory import is_zero_rank

_LIBRARIES = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")
)


@contextlib.contextmanager
def reported_failures() -> Iterator[None]:
    """Turn failures into exit codes and messages; bugs, and all with QUINTET_DEBUG=1, pass.

    Raises:
        SystemExit: 2 for a wrong configuration or checkpoint, 1 for failures during the run,
            128 + n after signal n.
    """
    try:
        yield
    except StopRequested as stop:
        raise SystemExit(128 + stop.signal_number if is_zero_rank() else 0) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if os.environ.get("QUINTET_DEBUG", "0") not in ("", "0"):
            raise
        message = describe(error)
        if message is None:
            raise
        # All ranks see such an error. Lightning kills the job at once when a process of it
        # fails, so the others leave quietly and let the first one speak.
        if is_zero_rank() or not getattr(error, "is_on_all_ranks", False):
            print(message, file=sys.stderr, flush=True)
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        raise SystemExit(0) from None


def describe(error: Exception) -> str | None:
    """Return the line to show for an error, or None if it is a bug that needs its traceback."""
    if isinstance(error, ReportedError):
        return one_line(str(error))
    if isinstance(error, (ValueError, OSError)) and _is_raised_by_us(error):
        return one_line(str(error))
    if type(error).__name__ == "MisconfigurationException":
        return one_line(str(error))
    return None


def one_line(text: str) -> str:
    """Return a message as one line; of an error from a worker process, only the error itself."""
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split())


def _is_raised_by_us(error: BaseException) -> bool:
    """Say whether the ``raise`` is in our own code or the user's, not in a library."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    file = Path(frames[-1].filename)
    if not file.is_file():
        return False
    if any(file.resolve().is_relative_to(folder) for folder in _LIBRARIES):
        return str(error).startswith("Caught ")  # torch re-raises what happened in a worker
    return True
