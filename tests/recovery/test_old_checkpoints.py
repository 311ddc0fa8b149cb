"""Checkpoints of earlier versions stay readable; a new format needs a way from the old one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls import call, fit, write_tiny
from comparison import final_state, rows
from methods import SMALLEST

FOLDER = Path(__file__).resolve().parents[1] / "goldens/recovery"
GOLDEN = FOLDER / "step-00000007.ckpt"
NAMES = json.loads((FOLDER / "weights.json").read_text())

TEST_LOSS = 1.08472


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory that an earlier version has left."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "old"
    (run / "checkpoints").mkdir(parents=True)
    write_tiny(run, name="config.yaml")
    for file in GOLDEN.parent.glob(f"{GOLDEN.name}*"):
        shutil.copy(file, run / "checkpoints")
    return run


def test_training_goes_on(run: Path) -> None:
    outcome = call("fit", "--resume", "old")
    assert outcome.code == 0, outcome.err
    assert "damaged" not in outcome.err
    assert final_state(run)["global_step"] == 24


def test_weights_are_used(run: Path) -> None:
    """A test of the run gives the loss that these weights had when they were saved."""
    outcome = call("test", "--resume", "old")
    assert outcome.code == 0, outcome.err
    (row,) = rows(run)
    assert float(row["test/loss"]) == pytest.approx(TEST_LOSS, rel=1e-4)


def test_format_is_still_the_same(run: Path) -> None:
    """If this fails on purpose: add a checkpoint of the new format beside the old one."""
    new = final_state(fit(run.parent, "--checkpoint.every_n_train_steps=7"))
    old = torch.load(GOLDEN, weights_only=True)
    assert old.keys() == new.keys()
    assert old["state_dict"].keys() == new["state_dict"].keys()
    assert old["quintet"] == new["quintet"]
    assert old["callbacks"].keys() == new["callbacks"].keys()


@pytest.mark.parametrize("method", SMALLEST)
def test_names_of_the_weights(method: str, trained: Callable[[str], Path]) -> None:
    """Under another name a weight of an old checkpoint would be missing."""
    state = final_state(trained(method) / "runs/latest")
    shapes = {name: list(value.shape) for name, value in state["state_dict"].items()}
    assert shapes == NAMES[method]
    if "current_model_state" in state:  # beside an average of the weights
        assert state["current_model_state"].keys() == state["state_dict"].keys()
