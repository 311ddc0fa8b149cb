"""What a run shows while it trains: its bar and the count of its parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_modules.callbacks.parameter_summary import ParameterSummary
from lightning_modules.callbacks.training_bar import TrainingBar, last_epoch


def limits(**given: Any) -> Trainer:  # noqa: ANN401
    usual = {"max_epochs": None, "max_steps": -1, "num_training_batches": 10}
    return cast("Trainer", SimpleNamespace(**({"accumulate_grad_batches": 1} | usual | given)))


@pytest.mark.parametrize(
    ("given", "last"),
    [
        ({"max_epochs": 3}, 2),
        ({"max_epochs": -1, "max_steps": 31}, 3),
        ({"max_epochs": -1, "max_steps": 30}, 2),
        ({"max_epochs": 2, "max_steps": 30}, 1),
        ({"max_steps": 7, "accumulate_grad_batches": 4}, 2),
        ({"max_steps": 7, "num_training_batches": float("inf")}, None),
        ({"max_epochs": -1}, None),
    ],
)
def test_last_epoch(given: dict[str, Any], last: int | None) -> None:
    assert last_epoch(limits(**given)) == last


def test_bar_names_the_last_epoch_that_the_steps_allow() -> None:
    bar = TrainingBar()
    bar._trainer = limits(max_epochs=-1, max_steps=25)
    assert bar._get_train_description(1).strip() == "Epoch 1/2"
    bar._trainer = limits(max_epochs=-1)
    assert bar._get_train_description(1).strip() == "Epoch 1"


def test_parameters_are_counted_and_parts_without_any_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = LightningModule()
    module.body, module.head, module.loss = nn.Linear(100, 20), nn.Linear(20, 3), nn.MSELoss()
    module.body.requires_grad_(False)
    ParameterSummary().on_fit_start(cast("Trainer", SimpleNamespace(is_global_zero=True)), module)
    words = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["body", "Linear", "2,020", "0"] in words
    assert ["head", "Linear", "63", "63"] in words
    assert ["all", "2,083", "63"] in words
    assert not any("loss" in line for line in words)


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = cast("Trainer", SimpleNamespace(is_global_zero=False))
    ParameterSummary().on_fit_start(trainer, LightningModule())
    assert not capsys.readouterr().out
