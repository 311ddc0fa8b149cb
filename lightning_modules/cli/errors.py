"""Failures that are the user's to mend: reported in one line, without a traceback."""

from __future__ import annotations

COMMAND_LINE = "command line"
"""Place of a setting made by a flag."""


class ReportedError(Exception):
    """A failure with a message meant for the user.

    Args:
        message: One line: what was found, what was expected, what to do.
        exit_code: Exit status of the process.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ConfigError(ReportedError):
    """A wrong configuration or command line; exit status 2.

    Args:
        place: Where the setting was made: ``file:line``, ``file`` or ``command line``.
        key: Full key of the setting, such as ``model.init_args.width``; may be empty.
        problem: What is wrong, what was expected and, if known, the nearest valid name.
    """

    def __init__(self, place: str, key: str, problem: str) -> None:
        super().__init__(": ".join(part for part in (place, key, problem) if part), exit_code=2)


class CheckpointError(ReportedError):
    """A checkpoint that cannot be read, written or used; exit status 2.

    Args:
        message: One line with the path of the checkpoint and the remedy.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class StopRequested(BaseException):
    """A signal stopped training, after a checkpoint; no ``except Exception`` swallows it.

    Args:
        signal_number: The signal; the process exits with 128 + this number.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number
