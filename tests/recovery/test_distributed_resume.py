"""Two processes over gloo: stopped by a signal to one of them, resumed exactly."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from calls import write_tiny
from comparison import assert_same_weights, rows
from forked_calls import children, environment, is_running, row_count, start

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "trainer" / "ddp.yaml"
FLAGS = [
    "--config=tiny.yaml",
    f"--config={CONFIG}",
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.val_check_interval=4",
]


@pytest.mark.ddp
def test_two_processes_stop_together_and_resume_exactly(tmp_path: Path) -> None:
    reference, folder = tmp_path / "reference", tmp_path / "stopped"
    for place in (reference, folder):
        place.mkdir()
        write_tiny(place)
    call = start(["fit", *FLAGS], reference)
    assert call.finish() == 0, call.log.read_text()
    call = start(["fit", *FLAGS, "--model.sleep", "0.1"], folder)
    call.send(signal.SIGTERM, until=lambda: row_count(folder) >= 3)
    assert call.finish() == 128 + signal.SIGTERM, call.log.read_text()
    assert call.log.read_text().count("resume with:") == 1
    call = start(["fit", "--resume", "runs/latest", "--model.sleep", "0"], folder)
    assert call.finish() == 0, call.log.read_text()
    (one,), (other,) = (list(place.glob("runs/tiny_pair/*")) for place in (reference, folder))
    assert_same_weights(one, other)
    assert rows(one) == rows(other)


@pytest.mark.ddp
def test_non_finite_loss_ends_all_processes(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    call = start(["fit", *FLAGS, "--model.nan_at", "3"], tmp_path)
    assert call.finish() == 1
    text = call.log.read_text()
    assert "step 3 (epoch 0), samples " in text
    assert "loss=nan" in text
    assert "Traceback" not in text


@pytest.mark.ddp
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_other(victim: int, tmp_path: Path) -> None:
    """A rank that waits for a dead one for ever would keep its device busy; it says what to do."""
    write_tiny(tmp_path)
    call = start(["fit", *FLAGS, "--model.sleep=0.1", "--trainer.max_epochs=99"], tmp_path)
    call.wait(until=lambda: row_count(tmp_path) >= 3)
    first = call.process.pid
    assert first is not None
    ranks = [first, *(pid for pid in children(first) if "LOCAL_RANK=1" in environment(pid))]
    assert len(ranks) == 2
    os.kill(ranks[victim], signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in ranks if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert call.finish() != 0
    text = call.log.read_text()
    told = re.findall(rf"^rank {1 - victim}: .* is gone .*; resume with: .*$", text, re.MULTILINE)
    assert len(told) == 1, text
    assert "Traceback" not in text
    run = told[0].rpartition(" --resume ")[2]
    resumed = start(["fit", "--resume", run, "--trainer.max_epochs=2"], tmp_path)
    assert resumed.finish() == 0, resumed.log.read_text()
