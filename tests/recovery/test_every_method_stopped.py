"""Every method: killed, stopped or without a finite loss at any step, nothing is lost."""

from __future__ import annotations

import importlib
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calls import call
from comparison import assert_same_weights, final_state, rows
from forked_calls import start
from methods import SAVE_EVERY_STEP, SMALLEST, MethodRow, train_arguments

# Between the forward and the backward pass of a step: its work is lost.
_SIGNAL_AT_STEP = """\
import os
from lightning_modules.callbacks.finite_loss import FiniteLoss
check = FiniteLoss.on_before_backward
def signalled(self, trainer, module, loss):
    if trainer.global_step == {step}:
        os.kill(os.getpid(), {number})
    check(self, trainer, module, loss)
FiniteLoss.on_before_backward = signalled
"""

Workplace = Callable[[str], Path]


def signalled_at(step: int, number: int) -> str:
    """Statements that let a process send itself a signal at a step."""
    return _SIGNAL_AT_STEP.format(step=step, number=int(number))


def last_step(run: Path) -> int:
    """The step that a run ended at."""
    return int(final_state(run)["global_step"])


@pytest.mark.parametrize("method", SMALLEST)
def test_three_kills_in_a_row(method: str, workplace: Workplace) -> None:
    """Each call loads with or without workers, whatever the killed one did."""
    folder, row = workplace(method), SMALLEST[method]
    chance = random.Random(method)  # noqa: S311 - reproducible, not secret
    steps = sorted(chance.sample(range(1, last_step(folder / "run")), 3))
    args = [*train_arguments(row, folder), *SAVE_EVERY_STEP]
    for step, workers in zip(steps, (0, 2, 2), strict=True):
        loading = f"--data.num_workers={workers}"
        killed = start([*args, loading], folder, signalled_at(step, signal.SIGKILL))
        assert killed.finish() == -signal.SIGKILL, killed.log.read_text()
        assert last_step(folder / "runs/latest") == step
        args = ["fit", "--resume", "runs/latest"]
    resumed = start([*args, "--data.num_workers=0"], folder)
    assert resumed.finish() == 0, resumed.log.read_text()
    assert_same_weights(folder / "run", folder / "runs/latest")
    assert rows(folder / "runs/latest") == rows(folder / "run")


@pytest.mark.parametrize("method", SMALLEST)
def test_termination_saves_the_step(method: str, workplace: Workplace) -> None:
    folder, row = workplace(method), SMALLEST[method]
    arguments = train_arguments(row, folder)
    stopped = start(arguments, folder, signalled_at(2, signal.SIGTERM))
    assert stopped.finish() == 128 + signal.SIGTERM, stopped.log.read_text()
    run = (folder / "runs/latest").resolve()
    text = stopped.log.read_text()
    assert f"resume with: python train.py fit --resume {run.relative_to(folder)}" in text
    assert "Traceback" not in text
    assert last_step(run) == 3
    assert call("fit", "--resume", "runs/latest").code == 0
    assert_same_weights(folder / "run", run)
    assert rows(run) == rows(folder / "run")


@pytest.mark.parametrize("method", SMALLEST)
def test_loss_that_is_not_a_number(
    method: str, workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, row = workplace(method), SMALLEST[method]
    _spoil_loss(monkeypatch, row, step=2)
    outcome = call(*train_arguments(row, folder), "--checkpoint.every_n_train_steps=1")
    assert outcome.code == 1
    line = outcome.err.strip().splitlines()[-1]
    assert re.match(r"step 2 \(epoch \d+\), samples \d+.*: loss=nan is not finite; ", line), line
    assert re.search(r"last finite checkpoint: \S+/checkpoints/step-00000002\.ckpt$", line), line
    assert "Traceback" not in outcome.err
    for name, value in final_state(folder / "runs/latest")["state_dict"].items():
        assert not value.is_floating_point() or torch.isfinite(value).all(), name


def _spoil_loss(monkeypatch: pytest.MonkeyPatch, row: MethodRow, step: int) -> None:
    """Let the loss of a step be NaN."""
    path = yaml.safe_load(row.config.read_text())["model"]["class_path"]
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    training_step = kind.training_step

    def spoiled(self: Any, batch: Any, batch_idx: int) -> Any:  # noqa: ANN401
        output = training_step(self, batch, batch_idx)
        if self.global_step != step:
            return output
        if isinstance(output, dict):
            return {**output, "loss": output["loss"] * float("nan")}
        return output * float("nan")

    monkeypatch.setattr(kind, "training_step", spoiled)
