"""Only the loss of another process is told as such; how it is told when Lightning sees it first."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from torch.distributed import DistBackendError, DistNetworkError

from lightning_modules.cli.errors import ReportedError
from lightning_modules.cli.lost_process import reported_loss
from lightning_modules.cli.run_directory import RunDirectory

PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "
CLOSED = RuntimeError(f"{PAIR}Connection closed by peer [127.0.0.1]:24292. This is typically ...")
LOST = {
    "gloo closed": (CLOSED, "Connection closed by peer"),
    "gloo reset": (
        RuntimeError(f"{PAIR}Read error [127.0.0.1]:56551: Connection reset by peer. ..."),
        "Connection reset by peer",
    ),
    "store": (
        DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did ..."),
        "Connection was likely closed",
    ),
    "nccl": (
        DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp:2, remote process exited or there was a network "
            "error, NCCL version 2.27\nncclRemoteError: A call failed possibly due to ..."
        ),
        "remote process exited or there was a network error",
    ),
}


def after(error: Exception, earlier: Exception) -> Exception:
    """An error that came up while another was being handled."""
    error.__context__ = earlier
    return error


OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x8)"),
    RuntimeError("Connection closed by peer"),  # of a connection that is not torch's
    ConnectionResetError(f"{PAIR}Connection reset by peer"),
    RuntimeError(f"{PAIR}Timed out waiting 1800000ms for recv operation to complete"),
    DistBackendError("NCCL error in: NCCLUtils.cpp:8, unhandled cuda error, NCCL version 2.27"),
    after(RuntimeError(f"{PAIR}Broken pipe"), KeyError("label")),
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has been begun."""
    run = RunDirectory(tmp_path / "mine", is_new=True)
    run.path.mkdir()
    run.config.touch()
    return run


@pytest.fixture
def trainer() -> SimpleNamespace:
    """What stands for a Trainer: its rank."""
    return SimpleNamespace(global_rank=3)


@pytest.mark.parametrize("case", LOST)
def test_loss_is_told_with_the_remedy(case: str, run: RunDirectory, trainer: object) -> None:
    error, reason = LOST[case]
    with pytest.raises(ReportedError) as told, reported_loss(trainer, run, "fit"):
        raise error
    assert f"rank 3: another process of the run is gone ({reason})" in str(told.value)
    assert str(told.value).endswith(f"; resume with: python train.py fit --resume {run.path}")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_nothing_to_go_on_with(subcommand: str, run: RunDirectory, trainer: object) -> None:
    if subcommand == "fit":
        run.discard()  # as when training has not come to its first step
    with (
        pytest.raises(ReportedError, match=r"; start it again$"),
        reported_loss(trainer, run, subcommand),
    ):
        raise CLOSED


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_pass(error: Exception, run: RunDirectory, trainer: object) -> None:
    with pytest.raises(type(error)) as passed, reported_loss(trainer, run, "fit"):
        raise error
    assert passed.value is error


def test_lightning_ends_the_others_with_the_same_remedy(
    run: RunDirectory,
    trainer: object,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the others still wait for the lost process, Lightning kills them, its parent too."""
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda self: None)
    caplog.set_level(logging.INFO, logger="lightning.fabric")
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    killed.kill()
    killed.wait()
    observer = _ChildProcessObserver(os.getpid(), [killed])
    with reported_loss(trainer, run, "fit"):
        assert observer._run()
    observer._run()
    ours, lightnings = [record.getMessage() for record in caplog.records]
    assert ours == (
        "rank 0: the process of rank 1 is gone (code -9), so the others are ended; "
        f"resume with: python train.py fit --resume {run.path}"
    )
    assert "Forcefully terminating" in lightnings, "outside a run its words are its own"
