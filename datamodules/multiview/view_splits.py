"""Splits as data sets that build whole batches of context and target views."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.errors import DataError, FaultPolicy, SampleError
from datamodules.keyed_random import keyed_generator
from datamodules.multiview.collation import Sample, collate, normalised_sample
from datamodules.multiview.evaluation_index import held_out_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.multiview.augmentation import Augmentation
    from datamodules.multiview.batch import MultiviewBatch
    from datamodules.multiview.evaluation_index import Entry
    from datamodules.multiview.poses import PoseRule
    from datamodules.multiview.readers.protocol import Cameras
    from datamodules.multiview.stored_clusters import ClusterFolder, SceneClusters
    from datamodules.multiview.view_sampler import ChosenViews, ViewSampler
    from datamodules.multiview.view_source import ViewSource


class TrainingViews(Dataset["MultiviewBatch"]):
    """Training scenes with drawn views; every draw is keyed, so workers and resumes agree.

    Args:
        source: the scenes.
        positions: (N,) positions in the source that are trained on.
        sampler: draws the views.
        steps: number of the training step of a sample (index, epoch).
        rule: how poses are normalised.
        augmentation: changes of the scenes.
        context_views: context views are filled up to this many.
        hold_out_every: frames of captures kept for evaluation, see ``held_out_frames``.
        seed: key of all draws, with epoch and sample.
        faults: what happens at unusable scenes.
        clusters: stored clusters, which fix the context views of every sample; None draws them.
    """

    def __init__(
        self,
        source: ViewSource,
        positions: NDArray[np.int64],
        *,
        sampler: ViewSampler,
        steps: Callable[[int, int], int],
        rule: PoseRule,
        augmentation: Augmentation,
        context_views: int,
        hold_out_every: int,
        seed: int,
        faults: FaultPolicy,
        clusters: ClusterFolder | None = None,
    ) -> None:
        self._source = source
        self._positions = positions
        self._clusters = clusters
        self._sampler = sampler
        self._steps = steps
        self._rule: PoseRule = rule
        self._augmentation = augmentation
        self._context_views = context_views
        self._hold_out_every = hold_out_every
        self._seed = seed
        self._faults = faults
        # Shared memory, so that the count covers all worker processes.
        skip = faults.on_error == "skip"
        self._skipped = torch.zeros(len(positions) if skip else 0, dtype=torch.bool)
        self._skipped.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def num_skipped(self) -> int:
        """Unusable scenes met so far by this process and its workers."""
        return int(self._skipped.sum())

    def __len__(self) -> int:
        """Number of training scenes."""
        return len(self._positions)

    def __getitem__(self, pair: tuple[int, int]) -> MultiviewBatch:
        """A batch of one sample, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> MultiviewBatch:
        """The batch of the samples given as (index, epoch) pairs.

        Raises:
            SampleError: at an unusable scene under on_error="raise".
            DataError: if more than ``max_skipped_share`` of the scenes are unusable.
        """
        samples = [self._usable(index, epoch) for index, epoch in pairs]
        return collate(samples, self._context_views)

    def _usable(self, index: int, epoch: int) -> Sample:
        """The sample, or that of the next usable scene."""
        step = self._steps(index, epoch)
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if len(self._skipped) and self._skipped[candidate]:
                continue
            try:
                return self._sample(candidate, epoch, step)
            except SampleError as error:
                if self._faults.on_error == "raise":
                    raise
                self._skip(candidate, error)
        raise DataError(f"none of {len(self)} training scenes is usable")

    def _sample(self, index: int, epoch: int, step: int) -> Sample:
        position = int(self._positions[index])
        name = self._source.reader.names[position]
        generator = keyed_generator(self._seed, epoch, index)
        cameras = self._source.cameras(position)
        (context, target), clusters = self._choose(name, cameras, step, generator)
        views = self._source.views(position, (*context, *target), cameras)
        views = self._augmentation.apply(views, generator)
        sample = normalised_sample(views, len(context), self._rule, index, name)
        return sample._replace(clusters=clusters)

    def _choose(
        self, name: str, cameras: Cameras, step: int, generator: torch.Generator
    ) -> tuple[ChosenViews, SceneClusters | None]:
        """Views of a sample, and the clusters of its context's tokens if they are stored."""
        free = np.flatnonzero(~held_out_frames(cameras.held_out, self._hold_out_every))
        if self._clusters is None:
            return self._sampler.draw(free, step, generator, name), None
        stored = self._clusters.draw(name, generator)
        if max(stored.context) >= len(cameras):
            raise SampleError(
                f"{self._clusters.file(name)}: names frame {max(stored.context)}, the scene has "
                f"{len(cameras)}; use the clusters that were made for this data"
            )
        return self._sampler.draw_targets(free, stored.context, generator, name), stored

    def _skip(self, index: int, error: SampleError) -> None:
        self._skipped[index] = True
        allowed = self._faults.max_skipped_share
        if self.num_skipped > allowed * len(self):
            raise DataError(
                f"{self.num_skipped} of {len(self)} training scenes unusable, more than "
                f"max_skipped_share={allowed}; repair the data; last: {error}"
            ) from error
        warnings.warn(f"skipped {error}", stacklevel=2)


class EvaluationViews(Dataset["MultiviewBatch"]):
    """Exactly the given views of the given scenes.

    Args:
        source: the scenes.
        entries: scene and views of every sample.
        rule: how poses are normalised.
    """

    def __init__(self, source: ViewSource, entries: Sequence[Entry], rule: PoseRule) -> None:
        self._source = source
        self._entries = tuple(entries)
        self._rule: PoseRule = rule

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._entries)

    def __getitem__(self, pair: tuple[int, int]) -> MultiviewBatch:
        """A batch of one sample, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> MultiviewBatch:
        """The batch of the samples given as (index, epoch) pairs; SampleError at an unusable one.

        Samples with fewer context or target views than others of the batch are filled up.
        """
        return collate([self._sample(index) for index, _ in pairs])

    def _sample(self, index: int) -> Sample:
        position, (context, target) = self._entries[index]
        cameras = self._source.cameras(position)
        views = self._source.views(position, (*context, *target), cameras)
        name = self._source.reader.names[position]
        return normalised_sample(views, len(context), self._rule, index, name)
