"""Concerto's course of training: the teacher, the schedules and the draws of every step."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.testing import assert_close

from lightning_modules.concerto_options import ConcertoCourse, ConcertoOptimisation
from lightning_modules.schedules import cosine
from models.concerto.encoder import EncoderShape
from tests.lightning_modules.concerto_runs import (
    SHAPE,
    logged,
    scenes,
    tiny_concerto,
    tree,
    watched_run,
)

__all__ = ["tree"]  # a fixture

GOLDEN = Path(__file__).parents[1] / "goldens" / "concerto" / "schedules_base_1000"


def test_teacher_follows_every_optimiser_step_and_none_but_these(
    tree: Path, tmp_path: Path
) -> None:
    course = ConcertoCourse(momentum=(0.5, 1.0), warmup_share=0.8)
    logger = CSVLogger(tmp_path, "", "")
    watcher = watched_run(
        tiny_concerto(course=course),
        scenes(tree, batch_size=1),
        tmp_path,
        5,
        accumulate_grad_batches=2,
        logger=logger,
    )
    assert watcher.steps == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    for batch, (before, after) in enumerate(pairwise(watcher.weights)):
        momentum = cosine(batch // 2, 5, 0.5, 1.0)
        for name in (name for name in before if ".teacher." in name):
            student = after[name.replace(".teacher.", ".student.")]
            expected = before[name].lerp(student, 1 - momentum) if batch % 2 else before[name]
            assert_close(after[name], expected, msg=name)
    momenta = [cosine(step, 5, 0.5, 1.0) for step in range(5)]
    assert logged(tmp_path, "course/momentum") == pytest.approx(momenta)
    sizes = [0.1 + 0.1 * min(step, 3) for step in range(5)]  # in 4 of the 5 optimiser steps
    assert logged(tmp_path, "course/mask_size") == pytest.approx(sizes)
    ratios = [0.3 + 0.4 / 3 * min(step, 3) for step in range(5)]
    assert logged(tmp_path, "course/mask_ratio") == pytest.approx(ratios)
    decays = [decay for decay, _ in watcher.rules[1::2]]
    assert decays == pytest.approx([cosine(step, 5, 0.04, 0.2) for step in range(5)])


def test_checkpoint_ahead_of_the_hooks_has_the_teacher_of_its_step(
    tree: Path, tmp_path: Path
) -> None:
    class Saver(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [Saver()]}
    course = ConcertoCourse(momentum=(0.5, 1.0))
    watched_run(tiny_concerto(course=course), scenes(tree), tmp_path, 2, **options)
    states = [torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in (1, 2)]
    momentum = cosine(1, 2, 0.5, 1.0)
    for name, value in states[1].items():
        if ".teacher." in name:
            student = states[1][name.replace(".teacher.", ".student.")]
            assert_close(value, states[0][name].lerp(student, 1 - momentum), msg=name)


def test_every_step_has_the_released_rates() -> None:
    """Of each parameter group, with beta1, weight decay, masks, temperature and momentum."""
    table = load_file(GOLDEN.with_suffix(".safetensors"))
    groups = json.loads(GOLDEN.with_suffix(".json").read_text())["lr_groups"]
    encoder = EncoderShape(channels=(4,) * 5, heads=(1,) * 5, depths=(3, 3, 3, 12, 3), patch_size=8)
    shape = replace(SHAPE, encoder=encoder, hidden=4, embed=4, prototypes=4)
    module = tiny_concerto(shape=shape, optimisation=ConcertoOptimisation())
    trainer: Any = SimpleNamespace(estimated_stepping_batches=1000, global_step=0)
    module._trainer = trainer
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    names = {id(p): name for name, p in module.named_parameters()}
    rows = [
        {
            1 + next((k for k, group in enumerate(groups) if group["keyword"] in names[id(p)]), -1)
            for p in own["params"]
        }
        for own in optimizer.param_groups
    ]
    assert sorted(set().union(*rows)) == list(range(25))
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    found: dict[str, list[Any]] = {}
    for step in range(1000):
        trainer.global_step = step
        module.on_before_optimizer_step(optimizer)
        rate = [0.0] * 25
        for own, group in zip(rows, optimizer.param_groups, strict=True):
            for row in own:
                rate[row] = group["lr"]
        ((beta1, beta2, decay),) = {
            (*group["betas"], group["weight_decay"]) for group in optimizer.param_groups
        }
        assert beta2 == 0.999
        size, ratio, temperature, _ = module.settings(step)
        values = {"lr": rate, "beta1": beta1, "weight_decay": decay, "mask_size": size}
        values |= {"mask_ratio": ratio, "teacher_temp": temperature}
        for name, value in {**values, "momentum": module.momentum(step)}.items():
            found.setdefault(name, []).append(value)
        optimizer.step()
        scheduler.step()
    for name, column in found.items():
        ours = torch.tensor(column, dtype=torch.float64)
        assert_close(ours, table[f"out.{name}"], rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("ratio", [0.25, 0.7])
def test_the_share_that_is_asked_for_is_masked(ratio: float, tree: Path, tmp_path: Path) -> None:
    course = ConcertoCourse(mask_size=(1e-4, 1e-4), mask_ratio=(ratio, ratio))
    module = tiny_concerto("images only", course=course)
    watched_run(module, scenes(tree), tmp_path, 1)
    share = float(module.trainer.callback_metrics["train/masked_share"])
    assert share == pytest.approx(ratio, abs=2 / 300)  # cells of a single point


def test_steps_keyed_by_seed_epoch_and_batch(tree: Path, tmp_path: Path) -> None:
    """Other global random numbers change nothing, another seed does."""
    losses = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(0)
        module = tiny_concerto(seed=seed)
        torch.manual_seed(noise)
        logger = CSVLogger(tmp_path / f"{seed}{noise}", "", "")
        watched_run(module, scenes(tree), tmp_path, 3, logger=logger)
        losses.append(logged(tmp_path / f"{seed}{noise}", "train/loss"))
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[2][0]
