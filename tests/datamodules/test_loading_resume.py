"""Runs that are interrupted anywhere and resumed equal the run that never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loading import (
    EpochSampler,
    EvaluationSampler,
    OrderedLoader,
    ResumableLoader,
    keyed_generator,
    rank_and_world_size,
)
from tests.quiet_trainings import quiet_trainer


class Points(Dataset[dict[str, Tensor]]):
    """Random vectors with noise keyed by (epoch, index)."""

    def __init__(self, count: int) -> None:
        self.values = torch.randn(count, 3, generator=keyed_generator(7))

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        index = torch.tensor([index for index, _ in pairs])
        noise = [torch.randn(3, generator=keyed_generator(epoch, i)) for i, epoch in pairs]
        return {"index": index, "value": self.values[index] + torch.stack(noise)}


class PointsData(LightningDataModule):
    def __init__(self, count: int = 27, batch_size: int = 4, num_workers: int = 0) -> None:
        super().__init__()
        self.count, self.batch_size, self.num_workers = count, batch_size, num_workers

    def train_dataloader(self) -> ResumableLoader:
        rank, world_size = rank_and_world_size(self.trainer)
        sampler = EpochSampler(
            self.count, self.batch_size, seed=1, rank=rank, world_size=world_size
        )
        return ResumableLoader(
            Points(self.count), sampler, num_workers=self.num_workers, trainer=self.trainer
        )

    def val_dataloader(self) -> OrderedLoader:
        return OrderedLoader(Points(6), EvaluationSampler(6, 4))


Step = tuple[int, int, int, list[int]]


class Fit(LightningModule):
    """Linear regression whose every step depends on epoch, batch number and global step."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
        self.steps: list[Step] = []
        self.validations: list[int] = []
        self.interrupt_at: int | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.interrupt_at == len(self.steps):
            raise InterruptedError
        self.steps.append(
            (self.current_epoch, batch_idx, self.global_step, batch["index"].tolist())
        )
        noise = torch.randn(1, generator=keyed_generator(self.current_epoch, batch_idx))
        return (self.layer(batch["value"]) - noise).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.validations.append(self.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class SaveEverywhere(Callback):
    """Checkpoint at every hook at which anything in Lightning or this project saves one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int, str]] = []

    def _save(self, trainer: Trainer, hook: str) -> None:
        module = trainer.lightning_module
        assert isinstance(module, Fit)
        path = self.folder / f"{len(self.saved):03d}-{hook}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(module.steps), hook))

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "batch_end")

    def on_validation_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "epoch_end")

    def on_exception(self, trainer: Trainer, *_: object) -> None:
        self._save(trainer, "exception")


def fit(
    tmp_path: Path,
    callbacks: list[Callback],
    resume: Path | None = None,
    data: PointsData | None = None,
    interrupt_at: int | None = None,
    **settings: object,
) -> Fit:
    module = Fit()
    module.interrupt_at = interrupt_at
    trainer = quiet_trainer(
        tmp_path,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        **({"max_epochs": 2} | settings),
    )
    trainer.fit(module, data or PointsData(), ckpt_path=resume, weights_only=True)
    return module


SETTINGS: dict[str, dict[str, Any]] = {
    "val_each_epoch": {},
    "val_mid_epoch": {"val_check_interval": 4},
    "accumulate": {"accumulate_grad_batches": 2, "limit_val_batches": 0},
    "accumulate_val_mid_window": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "accumulate_over_epoch_end": {"accumulate_grad_batches": 4, "val_check_interval": 5},
    "limited_epochs": {"limit_train_batches": 5, "val_check_interval": 2},
    "max_steps": {"max_steps": 15, "max_epochs": -1, "val_check_interval": 4},
    "every_n_batches": {"val_check_interval": 5, "check_val_every_n_epoch": None},
}


def assert_continues(resumed: Fit, whole: Fit, done: int, window: int) -> None:
    """The resumed run repeats fewer steps than a window, then does the rest of the whole run."""
    repeated = len(resumed.steps) - (len(whole.steps) - done)
    assert 0 <= repeated < window
    assert resumed.steps == whole.steps[len(whole.steps) - len(resumed.steps) :]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert torch.equal(resumed.layer.bias, whole.layer.bias)


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_from_every_checkpoint_equals_the_unbroken_run(name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    saver = SaveEverywhere(tmp_path)
    whole = fit(tmp_path, [saver], **settings)
    assert len(saver.saved) >= 12
    for path, done, _ in saver.saved:
        resumed = fit(tmp_path, [], resume=path, **settings)
        assert_continues(resumed, whole, done, settings.get("accumulate_grad_batches", 1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_was_interrupted_is_done_again(accumulate: int, tmp_path: Path) -> None:
    whole = fit(tmp_path, [], accumulate_grad_batches=accumulate)
    for interrupt_at in (0, 1, 4, 5, 6, 9, 11):
        saver = SaveEverywhere(tmp_path)
        with pytest.raises(InterruptedError):
            fit(tmp_path, [saver], interrupt_at=interrupt_at, accumulate_grad_batches=accumulate)
        path, done, hook = saver.saved[-1]
        assert hook == "exception"
        resumed = fit(tmp_path, [], resume=path, accumulate_grad_batches=accumulate)
        assert_continues(resumed, whole, done, accumulate)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_does_not_depend_on_the_number_of_workers(num_workers: int, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    whole = fit(tmp_path, [saver], data=PointsData(num_workers=2 - num_workers))
    for path, done, _ in saver.saved[3:9:5]:
        resumed = fit(tmp_path, [], resume=path, data=PointsData(num_workers=num_workers))
        assert_continues(resumed, whole, done, 1)


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 6), (6, 4)])
def test_another_global_batch_continues_the_epoch_without_repeats(
    before: int, after: int, tmp_path: Path
) -> None:
    # To the position in the data a change of the number of processes is a change of this size.
    saver = SaveEverywhere(tmp_path)
    first = fit(tmp_path, [saver], data=PointsData(64, before), limit_val_batches=0)
    path, done, _ = saver.saved[2]
    resumed = fit(tmp_path, [], resume=path, data=PointsData(64, after), limit_val_batches=0)
    seen = [index for step in first.steps[:done] for index in step[3]]
    rest = [index for step in resumed.steps if step[0] == 0 for index in step[3]]
    assert len(set(seen + rest)) == len(seen) + len(rest)
    assert len(seen + rest) > 64 - after
    assert [step[1] for step in resumed.steps if step[0] == 0][-1] == 64 // after - 1
    assert [step[1] for step in resumed.steps if step[0] == 1] == list(range(64 // after))


def test_a_new_epoch_is_validated_once_after_resume(tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    whole = fit(tmp_path, [saver], val_check_interval=3)
    path, _, hook = saver.saved[1]
    assert hook == "batch_end"
    resumed = fit(tmp_path, [], resume=path, val_check_interval=3)
    assert resumed.validations == whole.validations == [3, 6, 9, 12]


def loader(count: int = 10, **sampler: int) -> ResumableLoader:
    return ResumableLoader(Points(count), EpochSampler(count, 2, **sampler))


def indices(batches: list[dict[str, Tensor]]) -> list[int]:
    return [index for batch in batches for index in batch["index"].tolist()]


def test_without_a_trainer_every_iteration_is_the_next_epoch() -> None:
    train = loader()
    epochs = [indices(list(train)) for _ in range(3)]
    sampler = EpochSampler(10, 2)
    assert epochs == [sampler.order(epoch).tolist() for epoch in range(3)]


def test_an_abandoned_iteration_is_followed_by_the_next_epoch() -> None:
    train = loader()
    next(iter(train))
    assert indices(list(train)) == EpochSampler(10, 2).order(1).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_counts_batches_handed_out_not_batches_prefetched(num_workers: int) -> None:
    train = ResumableLoader(Points(20), EpochSampler(20, 2), num_workers=num_workers)
    batches = iter(train)
    seen = [next(batches), next(batches)]
    state = train.state_dict()
    assert state["offset"] == 4
    other = loader(20)
    other.load_state_dict(state)
    assert indices(seen) + indices(list(other)) == EpochSampler(20, 2).order(0).tolist()
    assert indices(list(other)) == EpochSampler(20, 2).order(1).tolist()
    assert len(other) == 10


def test_state_is_plain_integers() -> None:
    assert {type(value) for value in loader().state_dict().values()} == {int}


def test_data_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="10 samples, the data now has 12; restore the data"):
        loader(12).load_state_dict(loader(10).state_dict())


def test_another_seed_warns() -> None:
    with pytest.warns(UserWarning, match="seed=3, but the checkpoint used 0"):
        loader(seed=3).load_state_dict(loader().state_dict())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_draws_nothing_from_the_global_generator(num_workers: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train = ResumableLoader(Points(10), EpochSampler(10, 2), num_workers=num_workers)
    for _ in train:
        pass
    for _ in OrderedLoader(Points(6), EvaluationSampler(6, 4), num_workers=num_workers):
        pass
    assert torch.equal(torch.rand(3), expected)
