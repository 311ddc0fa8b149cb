"""Every method: too little data is an error, and reduced precision stays near."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from calls import call
from comparison import rows
from methods import SMALLEST, train_arguments

Workplace = Callable[[str], Path]


@pytest.mark.parametrize("method", SMALLEST)
def test_less_data_than_a_batch(method: str, workplace: Workplace) -> None:
    """A run of no steps would look like a success."""
    folder = workplace(method)
    outcome = call(*train_arguments(SMALLEST[method], folder), "--data.batch_size=5000")
    assert outcome.code != 0
    (line,) = outcome.err.strip().splitlines()[-1:]
    assert "fewer than one global batch of 5000" in line
    assert "lower data.init_args.batch_size=5000 or add data" in line
    assert "Traceback" not in outcome.err
    assert not (folder / "runs/latest").exists()


@pytest.mark.parametrize("method", SMALLEST)
def test_folder_without_data(method: str, workplace: Workplace) -> None:
    folder = workplace(method)
    (folder / "empty").mkdir()
    outcome = call(*train_arguments(SMALLEST[method], folder), "--data.root=empty")
    assert outcome.code in (1, 2)
    assert "Traceback" not in outcome.err
    (line,) = outcome.err.strip().splitlines()[-1:]
    assert re.search(r"\bempty\b", line)
    assert not (folder / "runs/latest").exists()


@pytest.mark.parametrize("method", SMALLEST)
def test_bfloat16_is_near_float32(method: str, workplace: Workplace) -> None:
    """Two steps in the precision that the method's configuration does not name."""
    folder, row = workplace(method), SMALLEST[method]
    precision = saved_precision(folder / "run")
    other = "32-true" if precision.startswith("bf16") else "bf16-mixed"
    flags = [f"--trainer.precision={other}", "--trainer.max_steps=2"]
    outcome = call(*train_arguments(row, folder), *flags)
    assert outcome.code == 0, outcome.err
    first, second = losses(folder / "runs/latest")
    assert first == pytest.approx(losses(folder / "run")[0], rel=0.05)
    assert math.isfinite(second)


def saved_precision(run: Path) -> str:
    """The precision that a run was trained in."""
    trainer = yaml.safe_load((run / "config.yaml").read_text())["trainer"]
    return str(trainer["precision"] or "32-true")


def losses(run: Path) -> list[float]:
    """The loss of every step."""
    return [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]
