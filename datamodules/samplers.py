"""Data order as a pure function of (seed, epoch), shared out over ranks by position.

The order of an epoch is one permutation of all samples. Global batch ``b`` is its ``b``-th run of
``batch_size * world_size`` samples, of which rank ``r`` takes the ``r``-th run of ``batch_size``.
A position is therefore (epoch, number of samples handed out so far to all ranks together), which
means the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler

from datamodules.keyed_random import keyed_generator

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from numpy.typing import NDArray

IndexBatch = list[tuple[int, int]]
"""Samples of one batch as (index, epoch) pairs."""


def rank_and_world_size(trainer: Trainer | None = None) -> tuple[int, int]:
    """This process's place among those that share the data.

    Args:
        trainer: asked first, as its strategy knows which ranks see the same data (tensor parallel).

    Returns:
        (rank, world size); (0, 1) where nothing is distributed.
    """
    replicas = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None)
    if replicas is not None:
        return int(replicas["rank"]), int(replicas["num_replicas"])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class EpochSampler(Sampler[IndexBatch]):
    """Batches of (index, epoch) pairs of this rank, shuffled anew by (seed, epoch).

    The samples left over after the last full global batch of an epoch are dropped; as the order
    changes they are other ones in every epoch.

    Args:
        num_samples: size of the split.
        batch_size: samples per batch and rank, >= 1.
        seed: key of all orders.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes that share the split.
        shuffle: False gives the order 0, 1, 2, ... in every epoch.

    Raises:
        ValueError: if the split is smaller than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.global_batch_size = batch_size * world_size
        self.shuffle = shuffle
        self.epoch = 0
        self.offset = 0
        self._begun = False
        if num_samples < self.global_batch_size:
            raise ValueError(
                f"{num_samples} training samples: fewer than one global batch of "
                f"{self.global_batch_size} ({batch_size} x {world_size} processes); lower "
                f"data.init_args.batch_size={batch_size} or add data"
            )

    @property
    def sampler(self) -> EpochSampler:
        """The sampler itself: Lightning looks for ``set_epoch`` at ``batch_sampler.sampler``."""
        return self

    @property
    def remaining(self) -> int:
        """Batches from the present position to the end of the epoch."""
        return (self.num_samples - self.offset) // self.global_batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All sample indices in the order of one epoch, (num_samples,) int64."""
        if not self.shuffle:
            return np.arange(self.num_samples, dtype=np.int64)
        generator = keyed_generator(self.seed, epoch)
        return torch.randperm(self.num_samples, generator=generator).numpy()

    def seek(self, epoch: int, offset: int) -> None:
        """Let the next iteration start in ``epoch`` after ``offset`` samples of all ranks."""
        self.epoch, self.offset, self._begun = epoch, offset, False

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of another epoch; naming the present one keeps the position."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    def begin(self) -> None:
        """Start an iteration: where ``seek`` pointed, else at the start of the next epoch."""
        if self._begun or self.remaining == 0:
            self.seek(self.epoch + 1, 0)
        self._begun = True

    def advance(self) -> None:
        """Count one batch as handed out on every rank."""
        self.offset += self.global_batch_size

    def __len__(self) -> int:
        """Batches of a whole epoch on every rank, wherever the position is."""
        return self.num_samples // self.global_batch_size

    def __iter__(self) -> Iterator[IndexBatch]:
        return self._batches(self.epoch, self.offset)

    def _batches(self, epoch: int, offset: int) -> Iterator[IndexBatch]:
        order = self.order(epoch)
        first = offset + self.rank * self.batch_size
        last = self.num_samples - self.global_batch_size + self.rank * self.batch_size
        for start in range(first, last + 1, self.global_batch_size):
            indices = order[start : start + self.batch_size].tolist()
            yield list(zip(indices, repeat(epoch)))


class EvaluationSampler(Sampler[IndexBatch]):
    """Every sample once, in order, in the same number of batches on every rank.

    Nothing is padded or repeated, so sums over ranks are exact, and no rank waits for a batch
    that another does not have. Batches of one rank differ in size by at most one sample.

    Args:
        num_samples: size of the split.
        batch_size: largest batch; only ``batch_size=1`` with uneven ranks may give one of 2.
        rank: this process, 0 <= rank < world_size.
        world_size: number of processes that share the split.

    Raises:
        ValueError: if there are fewer samples than processes.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_samples < world_size:
            raise ValueError(
                f"{num_samples} evaluation samples: fewer than {world_size} processes; "
                "use fewer devices or a larger split"
            )
        fewest, extra = divmod(num_samples, world_size)
        most = fewest + bool(extra)
        self._first = rank * fewest + min(rank, extra)
        self._count = fewest + (rank < extra)
        # The fewest samples of any rank bound the number of batches, so that none is empty.
        self._num_batches = min(-(-most // batch_size), fewest)

    def __len__(self) -> int:
        """Batches, equal on all ranks."""
        return self._num_batches

    def __iter__(self) -> Iterator[IndexBatch]:
        indices = np.arange(self._first, self._first + self._count)
        for part in np.array_split(indices, self._num_batches):
            yield list(zip(part.tolist(), repeat(0)))
