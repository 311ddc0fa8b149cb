"""Runs that die at any moment, by SIGKILL, SIGTERM or SIGINT, and go on afterwards."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from calls import fit, write_tiny
from comparison import assert_same_weights, final_state, rows
from forked_calls import row_count, start
from methods import EMA

FLAGS = [
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=5",
    "--config=ema.yaml",
    "--trainer.max_epochs=3",
    "--checkpoint.every_n_train_steps=2",
]


def newest(folder: Path) -> Path:
    """Return the only run below ``folder``."""
    (run,) = folder.glob("runs/tiny_pair/*")
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_five_times(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference_folder, folder = tmp_path / "reference", tmp_path / "killed"
    for place in (reference_folder, folder):
        place.mkdir()
        write_tiny(place, EMA, "ema.yaml")
        write_tiny(place)
    monkeypatch.chdir(reference_folder)
    reference = fit(reference_folder, *FLAGS)
    chance = random.Random(workers)  # noqa: S311 - reproducible, not secret
    slow = ["--model.sleep", "0.02", "--data.num_workers", str(workers)]
    args = ["fit", "--config", "tiny.yaml", *FLAGS, *slow]
    rows_wanted = 0
    for _ in range(5):  # ten random moments in both cases together
        rows_wanted += chance.randint(2, 4)
        call = start(args, folder)
        call.kill(until=lambda: row_count(folder) >= rows_wanted)  # noqa: B023
        args = ["fit", "--resume", "runs/latest"]
    call = start([*args, "--model.sleep", "0"], folder)
    assert call.finish() == 0, call.log.read_text()
    assert_same_weights(reference, newest(folder))
    steps = [row["step"] for row in rows(newest(folder)) if row["train/loss"]]
    assert len(steps) == len(set(steps)), "no step may be logged twice"


def test_killed_while_saving(tmp_path: Path) -> None:
    """The checkpoint before the torn one is whole, and the run goes on from it."""
    write_tiny(tmp_path)
    hook = (
        "import os, signal\n"
        "from lightning_modules.cli import checkpoint_io\n"
        "write = checkpoint_io._HashingStream.write\n"
        "def torn(self, data):\n"
        "    count = write(self, data)\n"
        "    if 'step-00000006' in self.stream.name:\n"
        "        self.stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return count\n"
        "checkpoint_io._HashingStream.write = torn\n"
    )
    every = ["--checkpoint.every_n_train_steps", "2"]
    call = start(["fit", "--config", "tiny.yaml", *every], tmp_path, hook)
    assert call.finish() == -signal.SIGKILL
    folder = newest(tmp_path) / "checkpoints"
    assert [file.name for file in folder.glob(".*.partial")], "the kill must have come mid-write"
    assert final_state(newest(tmp_path))["global_step"] == 4
    call = start(["fit", "--resume", "runs/latest"], tmp_path)
    assert call.finish() == 0, call.log.read_text()
    assert final_state(newest(tmp_path))["global_step"] == 24
    assert not list(folder.glob(".*.partial"))


@pytest.mark.parametrize(
    ("number", "code", "moment"),
    [
        (signal.SIGTERM, 143, "training"),
        (signal.SIGINT, 130, "training"),
        (signal.SIGTERM, 143, "validation"),
    ],
)
def test_signal_saves_that_step(number: int, code: int, moment: str, tmp_path: Path) -> None:
    reference_folder, folder = tmp_path / "reference", tmp_path / "stopped"
    for place in (reference_folder, folder):
        place.mkdir()
        write_tiny(place, EMA, "ema.yaml")
        write_tiny(place)
    flags = [*FLAGS, "--checkpoint.every_n_train_steps", "1000"]
    calm = start(["fit", "--config", "tiny.yaml", *flags], reference_folder)
    marker = folder / "moment"
    hook = (
        "import pathlib, tiny_pair\n"
        f"step = tiny_pair.TinyModel.{moment}_step\n"
        "def marked(self, batch, batch_idx):\n"
        "    if self.global_step >= 5 and batch_idx > 0:\n"
        f"        pathlib.Path({str(marker)!r}).write_text(str(self.global_step))\n"
        "    return step(self, batch, batch_idx)\n"
        f"tiny_pair.TinyModel.{moment}_step = marked\n"
    )
    slow = ["--model.sleep", "0.1"]
    call = start(["fit", "--config", "tiny.yaml", *flags, *slow], folder, hook)
    call.send(number, until=lambda: marker.exists() and bool(marker.read_text()))
    assert call.finish() == code
    text = call.log.read_text()
    assert f"resume with: python train.py fit --resume {newest(folder).relative_to(folder)}" in text
    assert "Traceback" not in text
    saved = int(final_state(newest(folder))["global_step"])
    assert saved in range(int(marker.read_text()), int(marker.read_text()) + 2)
    call = start(["fit", "--resume", "runs/latest", "--model.sleep", "0"], folder)
    assert call.finish() == 0, call.log.read_text()
    assert calm.finish() == 0
    assert_same_weights(newest(reference_folder), newest(folder))
    assert rows(newest(folder)) == rows(newest(reference_folder))


def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    call = start(["fit", "--config", "tiny.yaml", "--model.sleep", "3"], tmp_path)
    call.send(signal.SIGINT, until=lambda: bool(list(tmp_path.glob("runs/latest"))))
    call.send(signal.SIGINT, until=lambda: "once more ends it" in call.log.read_text())
    assert call.finish() == -signal.SIGINT
