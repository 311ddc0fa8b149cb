"""Offline runs of Weights & Biases, read back: settings, curves, pictures, tables, one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from calls import call
from methods import SMALLEST
from PIL import Image
from wandb_log import WandbLog, read_log

OFFLINE = Path(__file__).resolve().parents[2] / "configs/logger/wandb_offline.yaml"
CALLBACKS = "lightning_modules.callbacks"


class Shown(NamedTuple):
    """What a method is to show in W&B.

    Attributes:
        pictures: Names of pictures.
        tables: Names of tables.
        flags: Bring the callbacks that make them, where the smallest row leaves them out.
        commands: What is called after training.
    """

    pictures: set[str]
    tables: set[str]
    flags: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("test",)


SHOWN = {
    "farmer": Shown(
        {"test/samples"},
        set(),
        (
            f"--trainer.callbacks=[{{class_path: {CALLBACKS}.moving_average.MovingAverage}}]",
            f"--trainer.callbacks+={CALLBACKS}.sample_grid.SampleGrid",
        ),
    ),
    "clift stage 1": Shown({"test/views", "test/curves"}, {"test/rate_distortion"}),
    "token reduction": Shown(
        {"test/curves", "predict/selection"},
        {"test/reduction"},
        (
            f"--trainer.callbacks+={CALLBACKS}.reduction_table.ReductionTable",
            "--trainer.callbacks.shares=[0.25,1.0]",
            "--trainer.callbacks.methods=[random]",
            "--trainer.callbacks.train_images=16",
            "--trainer.callbacks.reconstructor_steps=1",
            "--trainer.callbacks.reader_steps=3",
            f"--trainer.callbacks+={CALLBACKS}.selection_overlays.SelectionOverlays",
            "--data.test_size=16",
            "--data.predict_count=2",
        ),
        ("test", "predict"),
    ),
    "concerto": Shown(
        {"val/clouds"},
        set(),
        (f"--trainer.callbacks+={CALLBACKS}.cloud_pictures.CloudPictures",),
        (),
    ),
    "bifrost branch": Shown(
        set(),
        {"test/latents"},
        (
            f"--trainer.callbacks+={CALLBACKS}.latent_table.LatentTable",
            "--trainer.callbacks.steps=[1]",
            "--trainer.callbacks.guidance=[1.0]",
            "--trainer.callbacks.queries=4",
            "--trainer.callbacks.gallery=4",
        ),
    ),
}


def test_every_method_is_here() -> None:
    assert SHOWN.keys() == SMALLEST.keys() - {"sixth"}


@pytest.mark.parametrize("method", SHOWN)
def test_offline_run(method: str, workplace: Callable[[str], Path]) -> None:
    workplace(method)
    shown = SHOWN[method]
    steps = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_steps"]
    more = f"--trainer.max_steps={steps + 1}"
    flags = ["--config", str(OFFLINE), *shown.flags]
    commands = [
        ["fit", "--resume", "run", *flags, more],
        ["fit", "--resume", "run", f"--trainer.max_steps={steps + 2}"],
        *([command, "--resume", "run"] for command in shown.commands),
    ]
    for command in commands:
        outcome = call(*command)
        assert outcome.code == 0, outcome.err
        time.sleep(1.1)  # W&B names the folder of an offline run by the second
    files = sorted(Path("run/wandb").glob("offline-run-*/*.wandb"))
    logs = [read_log(file) for file in files]
    assert len(logs) == len(commands)
    assert {log.identity for log in logs} == {Path("run/wandb/run_id.txt").read_text().strip()}
    _check_config(logs[1], steps + 2)
    assert any("train/loss" in row for row in logs[0].history + logs[1].history)
    assert shown.pictures <= set.union(*(log.media("image") for log in logs))
    assert shown.tables <= set.union(*(log.media("table") for log in logs))
    _check_files(files, logs)


def _check_config(log: WandbLog, steps: int) -> None:
    """The configuration is that of the run's file, with the linked values filled in."""
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert log.config["trainer"]["max_steps"] == steps
    assert log.config["model"]["class_path"] == written["model"]["class_path"]
    missing = written["model"]["init_args"].keys() - log.config["model"]["init_args"].keys()
    assert not missing
    assert log.config["data"]["init_args"].keys() >= written["data"]["init_args"].keys()


def _check_files(files: list[Path], logs: list[WandbLog]) -> None:
    """What the history points to lies beside it and can be read."""
    for file, log in zip(files, logs, strict=True):
        for row in log.history:
            for value in row.values():
                if not isinstance(value, dict) or "_type" not in value:
                    continue
                for name in value.get("filenames") or [value["path"]]:
                    (media,) = (file.parent / "files/media").rglob(Path(name).name)
                    assert media.stat().st_size > 0, name
                    if media.suffix == ".png":
                        with Image.open(media) as picture:
                            picture.verify()
