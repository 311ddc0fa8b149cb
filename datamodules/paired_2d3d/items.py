"""A split as a data set that builds whole batches of views and photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.keyed_random import keyed_bits
from datamodules.paired_2d3d.batch import ImageBatch
from datamodules.paired_2d3d.collation import PairedSample, collate
from datamodules.paired_2d3d.colour_augmentation import drop_rows
from datamodules.paired_2d3d.correspondence import read_places
from datamodules.paired_2d3d.images import ImageAugmentation, read_image, read_image_size
from datamodules.paired_2d3d.patch_grid import PatchGrid
from datamodules.paired_2d3d.view_options import ViewOptions
from datamodules.paired_2d3d.views import choose_rows, make_views
from datamodules.paired_2d3d.voxel_sampling import sample_voxels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.batch import PairedBatch
    from datamodules.paired_2d3d.image_features import ImageFeatures
    from datamodules.paired_2d3d.scene_tree import SceneTree
    from datamodules.paired_2d3d.split_files import PairedItem


@dataclass(frozen=True)
class SampleSettings:
    """What an item is made into.

    Attributes:
        grid_size: side of the voxels that keep one point each, metres.
        max_points: most points of a view.
        views: how views are drawn and changed.
        images_per_item: most photographs of an item; of more, a draw leaves so many.
        patch_grid: patches of every photograph.
        image_augmentation: changes of photographs.
    """

    grid_size: float
    max_points: int
    views: ViewOptions
    images_per_item: int
    patch_grid: PatchGrid
    image_augmentation: ImageAugmentation


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Generator whose numbers depend on the sample's key alone."""
    word = np.array([index], dtype=np.int64)
    return np.random.default_rng(int(keyed_bits((seed, epoch), word)[0]))


class PairedItems(Dataset["PairedBatch"]):
    """Items of a split; every draw is keyed by (seed, epoch, index), so workers and resumes agree.

    Args:
        tree: the root.
        items: of the split.
        numbers: number of every photograph by its path.
        settings: what items are made into.
        seed: key of all draws, with epoch and index.
        fixed: whether every epoch gives the views of the first one.
        features: stored tokens, checked against ``numbers``; None decodes the photographs.
    """

    def __init__(
        self,
        tree: SceneTree,
        items: Sequence[PairedItem],
        numbers: dict[str, int],
        settings: SampleSettings,
        *,
        seed: int,
        fixed: bool = False,
        features: ImageFeatures | None = None,
    ) -> None:
        self._tree = tree
        self._items = tuple(items)
        self._numbers = numbers
        self._settings = settings
        self._seed = seed
        self._fixed = fixed
        self._features = features

    def __len__(self) -> int:
        """Number of items."""
        return len(self._items)

    def __getitem__(self, pair: tuple[int, int]) -> PairedBatch:
        """A batch of one item, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> PairedBatch:
        """The batch of the items given as (index, epoch) pairs.

        Raises:
            DataError: naming the file, if one of an item is missing or damaged.
        """
        return collate([self._sample(index, epoch) for index, epoch in pairs])

    def _sample(self, index: int, epoch: int) -> PairedSample:
        item, settings = self._items[index], self._settings
        generator = sample_generator(self._seed, 0 if self._fixed else epoch, index)
        stored = self._tree.cloud(item.cloud)
        try:
            rows = sample_voxels(stored.coord, settings.grid_size, generator)
            cloud = stored.take(rows)
            options = settings.views
            cloud = cloud._replace(
                colour=drop_rows(cloud.colour, options, options.drop_colour, generator),
                normal=drop_rows(cloud.normal, options, options.drop_normal, generator),
            )
            taken = _draw_images(len(item.images), settings.images_per_item, generator)
            places, pictures = self._photographs(item, taken, rows, len(stored.coord))
            visible = places[:, :, 0] >= 0
            chosen = choose_rows(cloud.coord, visible, options, settings.max_points, generator)
            global_views, local_views = make_views(cloud, chosen, options, generator)
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{self._tree.root / item.cloud}: {error}") from None
        seen = np.concatenate(
            [places.take(view.rows, axis=0)[:, chosen.images] for view in global_views]
        )
        paths = [item.images[taken[image]] for image in chosen.images.tolist()]
        image_index = np.array([self._numbers[path] for path in paths], dtype=np.int64)
        image = None if pictures is None else pictures[torch.from_numpy(chosen.images)]
        if image is not None and settings.image_augmentation.is_on:
            image = settings.image_augmentation.apply(image, generator)
        tokens = None
        if self._features is not None:
            tokens = torch.from_numpy(self._features.tokens(image_index))
        return PairedSample(global_views, local_views, seen, image_index, image, tokens, index)

    def _photographs(
        self,
        item: PairedItem,
        taken: NDArray[np.int64],
        rows: NDArray[np.int64],
        num_points: int,
    ) -> tuple[NDArray[np.float32], Tensor | None]:
        """Places (n, V, 2) of the points in the photographs taken, and these unless tokens are."""
        grid = self._settings.patch_grid
        places = np.full((len(rows), len(taken), 2), -1, dtype=np.float32)
        pictures = torch.empty((len(taken), 3, *grid.size))
        for place, number in enumerate(taken.tolist()):
            if self._features is None:
                pictures[place], size = read_image(self._tree, item.images[number], grid)
            else:
                size = read_image_size(self._tree, item.images[number])
            links = item.correspondences[number]
            places[:, place] = read_places(self._tree, links, size, grid, rows, num_points)
        return places, pictures if self._features is None else None


def _draw_images(count: int, most: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of the photographs that are used, ascending."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    return np.sort(generator.choice(count, most, replace=False)).astype(np.int64)


class PhotographItems(Dataset[ImageBatch]):
    """Photographs alone, in the order of their paths.

    Args:
        tree: the root.
        paths: of the photographs, relative to the root.
        grid: patches of every photograph.
    """

    def __init__(self, tree: SceneTree, paths: Sequence[str], grid: PatchGrid) -> None:
        self._tree = tree
        self._paths = tuple(paths)
        self._grid = grid

    def __len__(self) -> int:
        """Number of photographs."""
        return len(self._paths)

    def __getitem__(self, pair: tuple[int, int]) -> ImageBatch:
        """A batch of one photograph, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> ImageBatch:
        """The batch of the photographs given as (index, epoch) pairs; DataError at a bad one."""
        indices = [index for index, _ in pairs]
        images = [read_image(self._tree, self._paths[index], self._grid)[0] for index in indices]
        return {"image": torch.stack(images), "image_index": torch.tensor(indices)}
