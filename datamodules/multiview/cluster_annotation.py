"""Batches of training scenes for making the clusters that later training reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch.utils.data import Sampler

from datamodules.loading import IndexBatch, OrderedLoader, rank_and_world_size
from datamodules.multiview.augmentation import Augmentation

if TYPE_CHECKING:
    from datamodules.multiview.multiview import MultiviewRays


class ScenePasses(Sampler[IndexBatch]):
    """For each scene a batch of its draws: (scene, 0), (scene, 1), ...

    Args:
        scenes: places of the scenes in their split.
        passes: draws of each.
    """

    def __init__(self, scenes: Sequence[int], passes: int) -> None:
        self._scenes = tuple(scenes)
        self._passes = passes

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._scenes)

    def __iter__(self) -> Iterator[IndexBatch]:
        for scene in self._scenes:
            yield [(scene, number) for number in range(self._passes)]


def annotation_loader(data: MultiviewRays, scenes: Sequence[int], passes: int) -> OrderedLoader:
    """This rank's share of training scenes, each as a batch of ``passes`` draws of its views.

    The draws depend on the scene and the seed alone. Gaps between context views are those at the
    end of training; nothing is augmented.

    Args:
        data: the scenes and how their views are drawn.
        scenes: places in ``data.training_scenes``.
        passes: samples of each batch.
    """
    rank, world_size = rank_and_world_size(data.trainer)
    # By place and not by turn: another rank may see fewer scenes that are still to do.
    own = [place for place in scenes if place % world_size == rank]
    dataset = data.training_views(_last_step, Augmentation(), None)
    return OrderedLoader(dataset, ScenePasses(own, passes), num_workers=data.num_workers)


def _last_step(index: int, epoch: int) -> int:
    """A step after the gaps have stopped growing, whatever the sample."""
    return sys.maxsize
