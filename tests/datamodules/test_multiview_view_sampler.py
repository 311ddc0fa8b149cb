"""Drawn views, and the curriculum's step over resumes, loading processes and accumulation."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from datamodules.errors import SampleError
from datamodules.keyed_random import keyed_generator
from datamodules.multiview import MultiviewRays
from datamodules.multiview.batch import MultiviewBatch
from datamodules.multiview.view_sampler import (
    ChosenViews,
    TrainingSteps,
    ViewSampler,
    ViewSampling,
    evenly_spread,
    training_steps,
)
from datamodules.samplers import EpochSampler
from tests.datamodules.scene_roots import re10k_root
from tests.quiet_trainings import quiet_trainer


def drawn(sampling: ViewSampling, frames: int, step: int, count: int = 300) -> list[ChosenViews]:
    sampler = ViewSampler(sampling, (4, 4), 6)
    positions = np.arange(frames)
    return [
        sampler.draw(positions, step, keyed_generator(0, index), "room") for index in range(count)
    ]


@pytest.mark.parametrize(
    ("step", "gaps"),
    [(0, (25, 45)), (15_000, (35, 90)), (30_000, (45, 135)), (10**6, (45, 135)), (1, (25, 45))],
)
def test_gaps_grow_linearly_with_the_step(step: int, gaps: tuple[int, int]) -> None:
    assert ViewSampling().gaps(step) == gaps
    views = drawn(ViewSampling("bounded"), 300, step, count=3000)
    found = [context[-1] - context[0] for context, _ in views]
    assert (min(found), max(found)) == gaps


def test_bounded_views_lie_between_the_outer_context_frames() -> None:
    repeated, also_context = False, False
    for context, target in drawn(ViewSampling("bounded"), 100, 0):
        assert list(context) == sorted(set(context))
        assert len(context) == 4
        assert len(target) == 6
        assert context[0] <= min(target)
        assert max(target) <= context[-1] <= 99
        repeated |= len(set(target)) < 6
        also_context |= bool(set(context) & set(target))
    assert repeated
    assert also_context


def test_unseen_targets_are_distinct_and_no_context() -> None:
    for context, target in drawn(ViewSampling("bounded", targets="unseen"), 100, 0):
        assert len({*context, *target}) == 10
        assert context[0] < min(target)
        assert max(target) < context[-1]


def test_short_scenes_cap_the_gap() -> None:
    for context, _ in drawn(ViewSampling("bounded"), 20, 0, count=20):
        assert context[0] == 0
        assert context[-1] == 19
    assert drawn(ViewSampling("bounded", targets="unseen"), 4, 0, 1)[0].context == (0, 1, 2, 3)
    with pytest.raises(SampleError, match="scene room: 3 training frames, fewer than 4 context"):
        drawn(ViewSampling("bounded"), 3, 0, 1)


def test_small_gaps_leave_room_for_the_context() -> None:
    sampling = ViewSampling("bounded", first_gaps=(1, 2), last_gaps=(1, 2))
    assert all(views.context[-1] - views.context[0] == 3 for views in drawn(sampling, 50, 0))


def test_spread_takes_one_context_frame_of_each_part() -> None:
    first: set[int] = set()
    for context, target in drawn(ViewSampling("spread"), 40, 0):
        assert [frame // 10 for frame in context] == [0, 1, 2, 3]
        assert len({*context, *target}) == 10
        first.add(context[0])
    assert first == set(range(10))


def test_groups_take_one_context_frame_of_each_and_any_other_as_target() -> None:
    sampling = ViewSampling("groups", groups=((0, 1), (2, 3), (4, 5), (6, 7)))
    targets: set[int] = set()
    for context, target in drawn(sampling, 14, 0):
        assert [frame // 2 for frame in context] == [0, 1, 2, 3]
        assert len({*context, *target}) == 10
        targets |= set(target)
    assert targets == set(range(14))
    with pytest.raises(SampleError, match=r"none of the frames \(6, 7\) is there"):
        drawn(sampling, 6, 0, 1)


def test_the_number_of_context_views_varies() -> None:
    sampler = ViewSampler(ViewSampling("bounded"), (4, 6), 2)
    counts = [
        len(sampler.draw(np.arange(90), 0, keyed_generator(i), "room").context) for i in range(200)
    ]
    assert set(counts) == {4, 5, 6}
    assert min(counts.count(number) for number in (4, 5, 6)) > 40


def test_even_spread_keeps_the_ends() -> None:
    assert evenly_spread(np.arange(10, 20), 4) == (10, 13, 16, 19)
    assert evenly_spread(np.arange(2), 4) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first_gaps": (45, 25)}, r"first_gaps=\(45, 25\): must be two gaps"),
        ({"last_gaps": (0, 25)}, r"last_gaps=\(0, 25\)"),
        ({"gap_steps": -1}, "gap_steps=-1: must be >= 0"),
        ({"mode": "groups"}, "mode=groups: name the candidate frames"),
    ],
)
def test_impossible_samplings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewSampling(**arguments)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("per_step", [1, 3])
def test_steps_number_the_batches_in_training_order(world_size: int, per_step: int) -> None:
    expected = [batch // per_step for batch in range(8)]
    for rank in range(world_size):
        sampler = EpochSampler(33, 4 // world_size, seed=5, rank=rank, world_size=world_size)
        steps = pickle.loads(pickle.dumps(TrainingSteps(sampler, batches_per_step=per_step)))  # noqa: S301
        for epoch in range(3):
            sampler.seek(epoch, 0)
            found = [{steps(*pair) for pair in batch} for batch in sampler]
            steps_before = epoch * (expected[-1] + 1)
            assert found == [{steps_before + step} for step in expected]


@pytest.mark.parametrize(("limit", "batches"), [(5, 5), (0.5, 4), (1.0, 8), (None, 8), (99, 8)])
def test_epochs_may_be_cut_short(limit: float | None, batches: int) -> None:
    sampler = EpochSampler(33, 4)
    trainer: Any = SimpleNamespace(limit_train_batches=limit, accumulate_grad_batches=1)
    steps = training_steps(sampler, trainer)
    assert steps(int(sampler.order(2)[0]), 2) == 2 * batches


class Recorder(LightningModule):
    """Trains one weight, and notes the step and the views of every batch."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[Any]] = {}
        self.stop_at = stop_at

    def training_step(self, batch: MultiviewBatch, batch_idx: int) -> Tensor:
        if self.global_step == self.stop_at:
            raise InterruptedError
        views = [
            batch["scene"],
            batch["context"]["frame"].tolist(),
            batch["target"]["frame"].tolist(),
        ]
        self.seen.setdefault(self.global_step, []).append(views)
        return (self.weight - 1).square()

    def validation_step(self, batch: MultiviewBatch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    root: Path,
    folder: Path,
    *,
    workers: int = 0,
    stop_at: int | None = None,
    ckpt_path: Path | None = None,
) -> tuple[Recorder, Trainer]:
    data = MultiviewRays(
        root / "data",
        image_size=8,
        context_views=(3, 3),
        target_views=2,
        views=ViewSampling("bounded", first_gaps=(2, 2), last_gaps=(30, 30), gap_steps=14),
        batch_size=2,
        num_workers=workers,
    )
    module = Recorder(stop_at)
    trainer = quiet_trainer(
        folder,
        max_epochs=4,
        accumulate_grad_batches=1 if root.name != "accumulated" else 2,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    except InterruptedError:
        trainer.save_checkpoint(folder / "stopped.ckpt")
    return module, trainer


@pytest.mark.parametrize("folder", ["plain", "accumulated"])
def test_gaps_follow_the_optimiser_step_through_a_resume_and_in_workers(
    folder: str, tmp_path: Path
) -> None:
    root = tmp_path / folder
    re10k_root(root / "data", train=10, test=1, frames=40)
    whole, _ = fit(root, tmp_path)
    sampling = ViewSampling("bounded", first_gaps=(2, 2), last_gaps=(30, 30), gap_steps=14)
    for step, batches in whole.seen.items():
        for _, context, _ in batches:
            assert [row[-1] - row[0] for row in context] == [sampling.gaps(step)[0]] * 2
    assert len(whole.seen) == (20 if folder == "plain" else 12)
    first, _ = fit(root, tmp_path, stop_at=7)
    rest, _ = fit(root, tmp_path, workers=2, ckpt_path=tmp_path / "stopped.ckpt")
    assert min(rest.seen) == 7
    assert {**first.seen, **rest.seen} == whole.seen
