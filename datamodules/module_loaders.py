"""The loaders that data modules have in common: what they are made of is a data set and a size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from datamodules.loading import OrderedLoader, ResumableLoader
from datamodules.samplers import EpochSampler, EvaluationSampler, rank_and_world_size

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.data import Dataset


class LoadsBatches(Protocol):
    """What a data module says of its loaders.

    Attributes:
        trainer: gives rank and device; None outside of a run.
        num_workers: loading processes for each loader; 0 loads in the training process.
    """

    trainer: Trainer | None
    num_workers: int


class LoadsTraining(LoadsBatches, Protocol):
    """What it says of training besides.

    Attributes:
        batch_size: samples of a training batch on each device.
        seed: key of the data order.
    """

    batch_size: int
    seed: int


def is_overfitting(trainer: Trainer | None) -> bool:
    """Say whether the run asks for the same few batches every time, unchanged and in order."""
    return trainer is not None and bool(getattr(trainer, "overfit_batches", 0))


def training_sampler(data: LoadsTraining, count: int) -> EpochSampler:
    """Order of ``count`` training samples, this rank's share of it."""
    rank, world_size = rank_and_world_size(data.trainer)
    return EpochSampler(
        count,
        data.batch_size,
        seed=data.seed,
        rank=rank,
        world_size=world_size,
        shuffle=not is_overfitting(data.trainer),
    )


def training_loader(
    data: LoadsTraining, dataset: Dataset[Any], sampler: EpochSampler | None = None
) -> ResumableLoader:
    """Shuffled batches of ``batch_size`` samples; resumes mid-epoch.

    Args:
        data: module whose loader it is.
        dataset: its ``__getitems__`` maps a list of (index, epoch) pairs to a batch.
        sampler: where the data set needs the sampler; None makes it.
    """
    return ResumableLoader(
        dataset,
        training_sampler(data, len(dataset)) if sampler is None else sampler,  # type: ignore[arg-type]
        num_workers=data.num_workers,
        pin_memory=pins_memory(data),
        trainer=data.trainer,
    )


def ordered_loader(
    data: LoadsBatches, dataset: Dataset[Any], batch_size: int, count: int | None = None
) -> OrderedLoader:
    """Samples in order, every one once, shared out over the ranks.

    Args:
        data: module whose loader it is.
        dataset: its ``__getitems__`` maps a list of (index, epoch) pairs to a batch.
        batch_size: most samples of a batch on each device.
        count: how many, the first ones; None takes all.
    """
    rank, world_size = rank_and_world_size(data.trainer)
    size = len(dataset)  # type: ignore[arg-type]
    sampler = EvaluationSampler(
        min(count or size, size), batch_size, rank=rank, world_size=world_size
    )
    return OrderedLoader(
        dataset, sampler, num_workers=data.num_workers, pin_memory=pins_memory(data)
    )


def pins_memory(data: LoadsBatches) -> bool:
    """Whether batches go to a GPU."""
    return data.trainer is not None and data.trainer.strategy.root_device.type == "cuda"
