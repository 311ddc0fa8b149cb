"""Paired scenes: clouds with the photographs that saw their points, as views for pre-training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
)
from datamodules.module_loaders import is_overfitting, ordered_loader, training_loader
from datamodules.paired_2d3d.embedded_root import ROOMS, embedded_root
from datamodules.paired_2d3d.image_features import ImageFeatures
from datamodules.paired_2d3d.images import ImageAugmentation
from datamodules.paired_2d3d.items import PairedItems, PhotographItems, SampleSettings
from datamodules.paired_2d3d.paired_arguments import check_arguments, check_features
from datamodules.paired_2d3d.patch_grid import PatchGrid
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.split_files import PairedItem, image_paths, read_splits, split_names
from datamodules.paired_2d3d.tree_checks import check_items
from datamodules.paired_2d3d.view_options import ViewOptions
from datamodules.paired_2d3d.views import Cloud
from datamodules.paired_2d3d.voxel_sampling import sample_voxels


class PairedScenes(LightningDataModule):
    """Views of clouds and their photographs, from a Pointcept tree or the embedded rooms.

    A tree holds <root>/splits/<split>.json, whose items name a cloud and its photographs. Items
    of all named splits are used, also those whose key occurs in several. Every draw is keyed by
    (seed, epoch, item), so batches depend neither on workers nor on where a run was resumed.

    Args:
        root: folder of the tree, or of several data sets; none takes the embedded rooms.
        train_splits: split files to train on.
        val_splits: split files to validate on, always with the same views; none takes val if there
            is one, an empty list validates on nothing.
        grid_size: side in metres of the voxels that keep one point each.
        max_points: most points of a view.
        views: how views are drawn and changed.
        images_per_item: most photographs of an item; of more, a draw leaves so many. 0 reads none.
        patch_grid: rows and columns of the image encoder's patches.
        patch_pixels: side of a patch in pixels; images become so many times the grid.
        image_augmentation: changes of training photographs; off by default.
        image_features: folder of stored tokens, which batches then hold instead of photographs.
        batch_size: training items of a batch on each device.
        eval_batch_size: most items of a batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        procedural_rooms: embedded rooms of train, val, test and test_unseen.
        cache_dir: where the embedded rooms are kept; none takes the user's cache folder.
        seed: key of the data order and of all draws.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root does not exist.
        DataError: if the root does not hold what its split files name.
    """

    def __init__(
        self,
        root: Path | None = None,
        train_splits: tuple[str, ...] = ("train",),
        val_splits: tuple[str, ...] | None = None,
        grid_size: float = 0.02,
        max_points: int = 65536,
        views: ViewOptions = ViewOptions(),  # noqa: B008 - frozen
        images_per_item: int = 4,
        patch_grid: tuple[int, int] = (37, 37),
        patch_pixels: int = 14,
        image_augmentation: ImageAugmentation = ImageAugmentation(),  # noqa: B008 - frozen
        image_features: Path | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 2,
        num_workers: int = 0,
        procedural_rooms: tuple[int, int, int, int] = ROOMS,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root)
        self.train_splits = tuple(train_splits)
        self.val_splits = None if val_splits is None else tuple(val_splits)
        self.grid_size = grid_size
        self.max_points = max_points
        self.views = views
        self.images_per_item = images_per_item
        self.patch_grid = (patch_grid[0], patch_grid[1])
        self.patch_pixels = patch_pixels
        self.image_augmentation = image_augmentation
        self.image_features = None if image_features is None else Path(image_features)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.procedural_rooms = procedural_rooms
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.seed = seed
        self._checked: set[str] = set()
        check_arguments(self)

    @cached_property
    def _tree(self) -> SceneTree:
        if self.root is not None:
            return SceneTree(self.root)
        return SceneTree(embedded_root(self.cache_dir, self.procedural_rooms))

    @cached_property
    def _train_items(self) -> tuple[PairedItem, ...]:
        return self._read(self.train_splits)

    @cached_property
    def _val_items(self) -> tuple[PairedItem, ...]:
        if self.val_splits is not None:
            return self._read(self.val_splits)
        return self._read(("val",)) if "val" in split_names(self._tree) else ()

    def _read(self, splits: Sequence[str]) -> tuple[PairedItem, ...]:
        items = read_splits(self._tree, splits)
        if self.images_per_item > 0:
            return items
        return tuple(item._replace(images=(), correspondences=()) for item in items)

    @property
    def source_name(self) -> str:
        """What numbers on this data are to be labelled with."""
        return "procedural rooms" if self.root is None else self.root.resolve().name

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the root's labels; () if it states none."""
        return self._tree.class_names

    @property
    def num_classes(self) -> int:
        """Number of the classes that the root names."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the items, their clouds or their sampling."""
        text = f"{self.grid_size}, {self.max_points}, {self.views}, {self.images_per_item}, "
        text += f"{self.patch_grid}, {self.patch_pixels}, {self.image_augmentation}"
        digest = hashlib.blake2b(text.encode(), digest_size=8)
        sizes: dict[str, int] = {}
        for item in (*self._train_items, *self._val_items):
            if item.cloud not in sizes:
                sizes[item.cloud] = self._tree.file(f"{item.cloud}/coord.npy").stat().st_size
            digest.update(f"{tuple(item)}, {sizes[item.cloud]};".encode())
        return digest.hexdigest()

    @property
    def data_fingerprint(self) -> str:
        """The same as ``fingerprint``, under the name that the other data modules use."""
        return self.fingerprint

    def setup(self, stage: str) -> None:
        """Read the split files of a stage, and check that the files they name are there.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            DataError: one line with the number of problems and the first ones.
        """
        for part in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ()):
            if part not in self._checked:
                check_items(self._tree, self._train_items if part == "train" else self._val_items)
                self._checked.add(part)

    @cached_property
    def _image_paths(self) -> tuple[str, ...]:
        return image_paths((*self._train_items, *self._val_items))

    def image_paths(self) -> tuple[str, ...]:
        """All photographs of training and validation, relative to the root; their numbers."""
        return self._image_paths

    def train_image_paths(self) -> tuple[str, ...]:
        """Photographs of training alone."""
        return image_paths(self._train_items)

    @property
    def root_folder(self) -> Path:
        """Folder of the tree, also of the embedded one."""
        return self._tree.root

    def cloud_count(self) -> int:
        """Number of validation items."""
        return len(self._val_items)

    def whole_cloud(self, number: int) -> Cloud:
        """Cloud of a validation item, one point a voxel and nothing augmented.

        Args:
            number: of the item, 0 .. ``cloud_count() - 1``.
        """
        cloud = self._tree.cloud(self._val_items[number].cloud)
        return cloud.take(sample_voxels(cloud.coord, self.grid_size, None))

    def image_batches(self, paths: Sequence[str], batch_size: int | None = None) -> OrderedLoader:
        """``ImageBatch``es of photographs in order, shared out over the devices.

        Args:
            paths: of the photographs, relative to the root.
            batch_size: most photographs of a batch; None takes ``eval_batch_size``.
        """
        dataset = PhotographItems(self._tree, paths, self._grid)
        return self._ordered(dataset, batch_size or self.eval_batch_size)

    def use_image_features(self, folder: Path | None) -> None:
        """Let the loaders made from now on give stored tokens instead of photographs.

        Args:
            folder: of the stored tokens; None goes back to photographs.

        Raises:
            ValueError: if photographs are changed at random.
            DataError: if the folder does not hold the tokens of all photographs.
        """
        self.image_features = None if folder is None else Path(folder)
        check_features(self)
        self._features()

    def _features(self) -> ImageFeatures | None:
        if self.image_features is None:
            return None
        features = ImageFeatures(self.image_features)
        features.check(self._image_paths, self.patch_grid)
        return features

    @property
    def _grid(self) -> PatchGrid:
        return PatchGrid(*self.patch_grid, self.patch_pixels)

    def _dataset(self, items: Sequence[PairedItem], *, training: bool, fixed: bool) -> PairedItems:
        settings = SampleSettings(
            grid_size=self.grid_size,
            max_points=self.max_points,
            views=self.views,
            images_per_item=self.images_per_item,
            patch_grid=self._grid,
            image_augmentation=self.image_augmentation if training else ImageAugmentation(),
        )
        return PairedItems(
            self._tree,
            items,
            {path: number for number, path in enumerate(self._image_paths)},
            settings,
            seed=self.seed if training else 0,
            fixed=fixed,
            features=self._features(),
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``PairedBatch``es of ``batch_size`` items; resumes mid-epoch."""
        overfit = is_overfitting(self.trainer)
        dataset = self._dataset(self._train_items, training=True, fixed=overfit)
        return training_loader(self, dataset)

    def _ordered(self, dataset: Dataset[Any], batch_size: int) -> OrderedLoader:
        return ordered_loader(self, dataset, batch_size)

    def val_dataloader(self) -> OrderedLoader | list[Any]:
        """``PairedBatch``es of the validation items in order, the same views every time."""
        if not self._val_items:
            return []
        data = self._dataset(self._val_items, training=False, fixed=True)
        return self._ordered(data, self.eval_batch_size)
