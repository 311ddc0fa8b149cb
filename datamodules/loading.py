"""Loaders that resume their epoch exactly, and the keyed randomness and samplers they rest on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from datamodules.errors import DataError, plain_error
from datamodules.keyed_random import keyed_bits, keyed_generator
from datamodules.samplers import EpochSampler, EvaluationSampler, IndexBatch, rank_and_world_size

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "EpochSampler",
    "EvaluationSampler",
    "IndexBatch",
    "OrderedLoader",
    "ResumableLoader",
    "WholeBatchLoader",
    "keyed_bits",
    "keyed_generator",
    "rank_and_world_size",
]


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - a batch may be of any type
    """Collate function of data sets whose ``__getitems__`` already returns a batch."""
    return batch


class WholeBatchLoader(DataLoader[Any]):
    """DataLoader over a data set that builds whole batches in ``__getitems__``.

    It draws nothing from the global random generator, and an error from a worker process arrives
    with its own one-line message.

    Args:
        dataset: its ``__getitems__`` maps a list of (index, epoch) pairs to a batch.
        sampler: gives the lists of pairs.
        num_workers: worker processes, kept alive between epochs; 0 loads in this process.
        pin_memory: whether batches are copied to page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[IndexBatch],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            generator=keyed_generator(0),
            persistent_workers=num_workers > 0,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        try:
            yield from batches
        except Exception as error:
            # Left to the garbage collector, torch waits 5 s for each worker after an error.
            if isinstance(batches, _MultiProcessingDataLoaderIter):
                batches._shutdown_workers()
                self._iterator = None
            if isinstance(error, DataError):
                raise plain_error(error) from None
            raise


class OrderedLoader(Iterable[Any]):
    """Loader for evaluation and prediction: every batch of an ``EvaluationSampler``, in order.

    It holds a DataLoader but is none, so Lightning leaves it as it is: it would rebuild a
    DataLoader for prediction, and, unless told otherwise, share its samples out over ranks again.

    Args:
        dataset: its ``__getitems__`` maps a list of (index, epoch) pairs to a batch.
        sampler: gives the lists of pairs.
        num_workers: worker processes, kept alive between iterations; 0 loads in this process.
        pin_memory: whether batches are copied to page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: Sampler[IndexBatch],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self._batches = WholeBatchLoader(
            dataset, sampler, num_workers=num_workers, pin_memory=pin_memory
        )

    @property
    def _iterator(self) -> _BaseDataLoaderIter | None:
        """The running iterator, where Lightning looks for worker processes to stop."""
        return self._batches._iterator

    @_iterator.setter
    def _iterator(self, iterator: None) -> None:
        self._batches._iterator = iterator

    def __len__(self) -> int:
        """Number of batches on this rank."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class ResumableLoader(WholeBatchLoader):
    """Training loader whose position, saved at any moment, continues with the next batch.

    Every iteration is one epoch. The first one after ``load_state_dict`` is the rest of the
    interrupted epoch. Lightning stores the state in its checkpoints by itself.

    Args:
        dataset: its ``__getitems__`` maps a list of (index, epoch) pairs to a batch.
        sampler: order and position.
        num_workers: worker processes; the batches do not depend on it.
        pin_memory: whether batches are copied to page-locked memory.
        trainer: if given, a batch counts as used only when its training step is done and its
            gradient has reached the weights, so that a checkpoint written in between repeats it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        trainer: Trainer | None = None,
    ) -> None:
        super().__init__(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)
        self._position = sampler
        self._trainer = trainer
        self._batches = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so nothing moves before the first batch is asked for: Lightning makes
        # iterators that it never uses.
        self._position.begin()
        if self._position.offset == 0:
            self._batches = 0
        for batch in super().__iter__():
            self._position.advance()
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position behind the last batch whose gradient has reached the weights.

        Returns:
            Plain integers: epoch; offset, in samples of all ranks; repeated, the batches handed
            out that the resumed run will see again; num_samples and seed, for checking.
        """
        in_flight, accumulated = self._unfinished_batches()
        repeated = in_flight + accumulated
        return {
            "epoch": self._position.epoch,
            "offset": self._position.offset - repeated * self._position.global_batch_size,
            "repeated": repeated,
            "accumulated": accumulated,
            "num_samples": self._position.num_samples,
            "seed": self._position.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position, also with another batch or world size.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: if the split had another size when the state was saved.
        """
        sampler = self._position
        if state["num_samples"] != sampler.num_samples:
            raise ValueError(
                f"the checkpoint was trained on {state['num_samples']} samples, the data now has "
                f"{sampler.num_samples}; restore the data, or start a new run from the weights"
            )
        if state["seed"] != sampler.seed:
            warnings.warn(
                f"seed={sampler.seed}, but the checkpoint used {state['seed']}: the order of the "
                "data changes, so samples of this epoch may repeat",
                stacklevel=2,
            )
        sampler.seek(state["epoch"], state["offset"])
        self._batches = len(sampler) - sampler.remaining
        if self._trainer is not None:
            limit = self._trainer.limit_train_batches
            whole = len(sampler)
            epoch_batches = limit if isinstance(limit, int) else int(whole * (limit or 1.0))
            unfinished, accumulated = state["repeated"] > 0, state["accumulated"]
            _rewind(
                self._trainer, self._batches, min(whole, epoch_batches), unfinished, accumulated
            )

    def _unfinished_batches(self) -> tuple[int, int]:
        """Batches handed out whose step is not done, and steps whose gradient is still held."""
        if self._trainer is None:
            return 0, 0
        progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress
        processed = progress.current.processed
        in_flight = int(self._batches - processed == 1)
        closed = processed == self._trainer.num_training_batches or progress.is_last_batch
        if self._batches - in_flight != processed or (closed and not in_flight):
            return in_flight, 0
        return in_flight, processed % self._trainer.accumulate_grad_batches


def _rewind(
    trainer: Trainer, batches: int, epoch_batches: int, unfinished: bool, accumulated: int
) -> None:
    """Make Lightning's count of this epoch's batches agree with the loader's position.

    Args:
        trainer: its progress has just been restored from the checkpoint.
        batches: batches of the present size that lie before the position.
        epoch_batches: batches of the present size in an epoch of training.
        unfinished: whether the checkpoint was written between a batch and its optimiser step.
        accumulated: steps whose gradient was held but not applied, hence lost.
    """
    epochs: Any = trainer.fit_loop.epoch_progress
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    if trainer.max_steps != -1 and epochs.current.processed > epochs.current.completed:
        # Saved in on_train_epoch_end of a run counted in steps: Lightning would train one more
        # batch in the finished epoch.
        epochs.increment_completed()
        progress.reset_on_run()
        return
    current, total = progress.current, progress.total
    if not unfinished:
        surplus = current.processed - batches
        for field in ("ready", "started", "processed", "completed"):
            setattr(current, field, getattr(current, field) - surplus)
        if surplus and batches >= epoch_batches:
            # What is left is less than a global batch of the present size: on to the next epoch.
            progress.is_last_batch = True
        return
    seen = total.processed - accumulated
    for field in ("ready", "started", "processed", "completed"):
        setattr(current, field, batches)
        setattr(total, field, seen)
    progress.is_last_batch = False
