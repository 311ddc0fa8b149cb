"""Calls of train.py in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# Besides what every call imports, the models whose imports take longest.
_CONTEXT.set_forkserver_preload(
    [
        "train",
        "lightning_modules.cli.interface",
        "tiny_pair",
        "lightning_modules.token_reduction",
        "lightning_modules.bifrost_branch",
    ]
)
_PATIENCE = 300.0
_TRAIN = Path(__file__).resolve().parents[2] / "train.py"


@dataclass(frozen=True)
class Call:
    """A running call: its process and the file that gets its output."""

    process: BaseProcess
    log: Path

    def finish(self) -> int:
        """Wait for the end and return the exit status; -n after being killed by signal n."""
        self.process.join(_PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.log.read_text())
        return self.process.exitcode

    def kill(self, until: Callable[[], bool]) -> None:
        """Kill the process as soon as ``until()`` holds, without waiting for its workers to end."""
        self.send(signal.SIGKILL, until)
        while is_running(self.process.pid):
            time.sleep(0.01)

    def send(self, number: int, until: Callable[[], bool]) -> None:
        """Send a signal as soon as ``until()`` holds."""
        self.wait(until)
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait for ``until()`` to hold while the process runs."""
        deadline = time.monotonic() + _PATIENCE
        while not until():
            if self.process.exitcode is not None or time.monotonic() > deadline:
                raise TimeoutError(f"ended or stuck too early: {self.log.read_text()}")
            time.sleep(0.01)


def start(args: list[str], folder: Path, hook: str = "", output: str = "output.txt") -> Call:
    """Start ``train.py`` with some arguments, in ``folder``.

    Args:
        args: The command line.
        folder: Working directory.
        hook: Python statements to execute in the new process first.
        output: File in the folder to which the output goes.
    """
    log = folder / output
    process = _CONTEXT.Process(target=_run, args=(args, str(folder), str(log), hook))
    process.start()
    return Call(process, log)


def row_count(folder: Path) -> int:
    """Return the number of metric rows that the newest run below ``folder`` has written."""
    files = list(folder.glob("runs/*/*/metrics.csv"))
    return max((file.read_bytes().count(b"\n") - 1 for file in files), default=0)


def is_running(pid: int | None) -> bool:
    """Say whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, perhaps while being read
        return False


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def environment(pid: int) -> list[str]:
    """Return the variables that a process was started with."""
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def _run(args: list[str], folder: str, log: str, hook: str) -> None:
    # The child of a fork server would start its data-loading processes by another fork server.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [str(_TRAIN), *args]  # Lightning starts further ranks by it
    exec(hook, {})  # noqa: S102 - written by the test
    import train

    train.main()
