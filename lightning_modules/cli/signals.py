"""SIGINT and SIGTERM: remembered during training, so that it can stop between two steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from lightning_modules.cli.errors import StopRequested
from lightning_modules.cli.run_directory import is_zero_rank

_NOTICE = "\n{name}: finishing this step, then saving a checkpoint; once more ends it at once\n"


class StopRequests:
    """Handler of SIGINT and SIGTERM for the time of a ``with`` block.

    While ``defer`` is set the first signal is only remembered; otherwise it raises
    :class:`StopRequested` on the spot. A second signal ends the process in the default way.

    Attributes:
        requested: Number of the signal received, 0 if none.
        defer: Whether the training loop is going to act on ``requested`` by itself.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.defer = False
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handler; without effect outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers found on entry."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def retake(self) -> None:
        """Take the signals back from Lightning, which registers a handler of its own."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A data-loading process: Ctrl-C reaches it too, but its fate is the parent's decision.
            if number == signal.SIGTERM:
                _end_by(number)
            return
        if self.requested:
            _end_by(number)
        self.requested = number
        if not self.defer:
            raise StopRequested(number)
        if is_zero_rank():
            os.write(2, _NOTICE.format(name=signal.Signals(number).name).encode())


def _end_by(number: int) -> None:
    """Let the signal have its default effect on this process."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
