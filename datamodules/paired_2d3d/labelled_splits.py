"""Splits of labelled scenes as map-style data sets of whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.keyed_random import keyed_generator
from datamodules.paired_2d3d.geometry_augmentation import coord_origin
from datamodules.paired_2d3d.labelled_augmentation import (
    VOTES,
    LabelledAugmentation,
    augment,
    crop_sphere,
    vote_copies,
)
from datamodules.paired_2d3d.labelled_batch import LabelledBatch
from datamodules.paired_2d3d.labelled_tree import LabelledCloud, read_labelled
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.voxel_sampling import sample_voxels, voxel_cells, voxel_inverse

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Last word of the keys, so that no two uses of a sample's key share numbers.
_CLOUD, _MIX = range(2)
# Of training clouds that are the same in every epoch, so many bytes are read only once.
_KEPT_BYTES = 2**29


class LabelSource(NamedTuple):
    """Where labelled clouds come from.

    Attributes:
        tree: Root of the scenes.
        folders: Scene folders, relative to it.
        segment: Name of the label file without .npy.
        classes: Number of classes.
        grid_size: Side of a voxel in metres.
    """

    tree: SceneTree
    folders: Sequence[str]
    segment: str
    classes: int
    grid_size: float

    def read(self, index: int) -> LabelledCloud:
        """The cloud at a position; DataError if it cannot be used."""
        return read_labelled(self.tree, self.folders[index], self.segment, self.classes)


class TrainingClouds(Dataset[LabelledBatch]):
    """Training clouds, a pure function of (seed, epoch, index).

    Args:
        source: The scenes.
        augmentation: Changes drawn in every epoch; None leaves the clouds alone, takes the first
            point of each voxel, and makes a scene the same in every epoch.
        max_points: Most points of a cloud, the nearest to a random one; None takes all.
        mix_chance: Chance that the clouds of a batch are laid over each other in pairs (Mix3D).
        seed: First key of all draws.
    """

    def __init__(
        self,
        source: LabelSource,
        augmentation: LabelledAugmentation | None,
        max_points: int | None,
        mix_chance: float,
        seed: int,
    ) -> None:
        self._source = source
        self._augmentation = augmentation
        self._max_points = max_points
        self._mix_chance = mix_chance
        self._seed = seed
        self._kept: dict[int, LabelledCloud] = {}
        self._room = _KEPT_BYTES if augmentation is None else 0

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._source.folders)

    def __getitem__(self, pair: tuple[int, int]) -> LabelledBatch:
        """A batch of one scene, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> LabelledBatch:
        """The batch of the scenes given as (index, epoch) pairs."""
        batch = collate(
            [self._cloud(index, epoch) for index, epoch in pairs],
            self._source,
            [index for index, _ in pairs],
        )
        chance = self._rng(*pairs[0], _MIX).random()
        if chance < self._mix_chance:
            batch["offset"] = torch.cat([batch["offset"][1:-1:2], batch["offset"][-1:]])
        return batch

    def _rng(self, index: int, epoch: int, use: int) -> np.random.Generator:
        return np.random.default_rng(keyed_generator(self._seed, epoch, index, use).initial_seed())

    def _cloud(self, index: int, epoch: int) -> LabelledCloud:
        """The cloud of a sample, from memory if it is known and never changes."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        cloud = self._drawn(index, epoch)
        if cloud.nbytes <= self._room:
            self._room -= cloud.nbytes
            self._kept[index] = cloud
        return cloud

    def _drawn(self, index: int, epoch: int) -> LabelledCloud:
        cloud = self._source.read(index).centred()
        rng = self._rng(index, epoch if self._augmentation else 0, _CLOUD)
        if self._augmentation is not None:
            cloud = augment(cloud, self._augmentation, rng)
        draws = rng if self._augmentation is not None else None
        cloud = cloud.rows(sample_voxels(cloud.coord, self._source.grid_size, draws))
        if self._max_points is not None:
            cloud = crop_sphere(cloud, self._max_points, rng)
        return cloud


class EvaluationClouds(Dataset[LabelledBatch]):
    """Whole clouds with the way back to the points of their files.

    Args:
        source: The scenes.
        votes: Whether each cloud comes in the copies of test-time augmentation.
    """

    def __init__(self, source: LabelSource, votes: bool) -> None:
        self._source = source
        self._votes = votes

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._source.folders)

    def __getitem__(self, pair: tuple[int, int]) -> LabelledBatch:
        """A batch of one scene, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> LabelledBatch:
        """The batch of the scenes given as (index, epoch) pairs."""
        indices = [index for index, _ in pairs]
        originals = [self._source.read(index) for index in indices]
        sampled, inverses, before = [], [], 0
        for original in originals:
            centred = original.centred()
            for copy in vote_copies(centred) if self._votes else (centred,):
                rows = sample_voxels(copy.coord, self._source.grid_size, None)
                sampled.append(copy.rows(rows))
                inverses.append(voxel_inverse(copy.coord, self._source.grid_size) + before)
                before += len(rows)
        batch = collate(sampled, self._source, indices)
        batch["inverse"] = _join(inverses)
        batch["original_segment"] = _join([original.segment for original in originals])
        batch["original_offset"] = _ends([len(original.segment) for original in originals])
        batch["original_coord"] = _join([original.coord for original in originals])
        batch["votes"] = VOTES if self._votes else 1
        return batch


def collate(
    clouds: Sequence[LabelledCloud], source: LabelSource, indices: Sequence[int]
) -> LabelledBatch:
    """Lay voxelised clouds behind each other; x and y are centred once more, as released."""
    grid, coord = [], []
    for cloud in clouds:
        grid.append(voxel_cells(cloud.coord, source.grid_size))
        middle = coord_origin(cloud.coord)
        middle[2] = 0
        coord.append(cloud.coord - middle)
    return {
        "coord": _join(coord),
        "colour": _join([cloud.colour for cloud in clouds]),
        "normal": _join([cloud.normal for cloud in clouds]),
        "offset": _ends([len(cloud.segment) for cloud in clouds]),
        "grid_coord": _join(grid),
        "segment": _join([cloud.segment for cloud in clouds]),
        "index": torch.tensor(indices, dtype=torch.int64),
        "name": [source.folders[index].rpartition("/")[2] for index in indices],
    }


def _join(parts: Sequence[NDArray[np.float32] | NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _ends(counts: Sequence[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.int64).cumsum(0)
