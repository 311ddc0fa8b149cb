"""Labelled scenes: whole clouds with a class for every point, for probing and fine-tuning."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule

from datamodules.errors import DataError
from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
    keyed_generator,
)
from datamodules.module_loaders import is_overfitting, ordered_loader, training_loader
from datamodules.paired_2d3d.embedded_root import ROOMS, embedded_root
from datamodules.paired_2d3d.labelled_augmentation import LabelledAugmentation
from datamodules.paired_2d3d.labelled_splits import EvaluationClouds, LabelSource, TrainingClouds
from datamodules.paired_2d3d.labelled_tree import (
    find_scenes,
    tree_fingerprint,
)
from datamodules.paired_2d3d.scene_tree import SceneTree

# A constant and not the seed: runs of any seed learn from the same few scenes.
_SUBSET_KEY = 0x5CE7E5
_AT_LEAST = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "seed": 0}
_Split = Literal["train", "val", "test"]


class LabelledScenes(LightningDataModule):
    """Whole clouds with a class for every point, from a Pointcept tree or the embedded rooms.

    A tree holds <root>/<split>/<scene>/ with coord.npy, the label file and, if there are any,
    color.npy and normal.npy. Training draws a point in every voxel and changes the cloud anew in
    every epoch; evaluation takes the first point of each voxel and gives the way back to all.

    Args:
        root: folder of the tree; none takes the embedded procedural rooms.
        train_split: folder of the training scenes, or several such as [Area_1, Area_2].
        val_split: the same for validation.
        test_split: the same for the test; test_unseen of the embedded rooms has photographs that
            no training room has.
        segment: name of the label file without .npy: segment, segment20, segment200.
        class_names: names of the classes in the order of labels; none reads classes.json of the
            root.
        train_scenes: train on this many scenes only, the first of a fixed permutation; none takes
            all.
        grid_size: side of a voxel in metres.
        augment: change training clouds; false makes a scene the same in every epoch.
        augmentation: how.
        max_points: most points of a training cloud, those nearest to a random one; none takes all.
        mix3d: chance that the clouds of a training batch are laid over each other in pairs.
        tta: test on 13 turned, scaled and mirrored copies of each cloud and average.
        batch_size: training clouds on each device.
        eval_batch_size: most clouds of a batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        procedural_rooms: embedded rooms of train, val, test and test_unseen.
        cache_dir: where the embedded rooms are kept; none takes the user's cache folder.
        seed: key of the data order and all draws.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root does not exist.
        DataError: if the root does not hold what a stage needs.
    """

    def __init__(
        self,
        root: Path | None = None,
        train_split: str | tuple[str, ...] = "train",
        val_split: str | tuple[str, ...] = "val",
        test_split: str | tuple[str, ...] = "test",
        segment: str = "segment",
        class_names: tuple[str, ...] | None = None,
        train_scenes: int | None = None,
        grid_size: float = 0.02,
        augment: bool = True,
        augmentation: LabelledAugmentation = LabelledAugmentation(),  # noqa: B008 - frozen
        max_points: int | None = None,
        mix3d: float = 0.0,
        tta: bool = False,
        batch_size: int = 4,
        eval_batch_size: int = 1,
        num_workers: int = 0,
        procedural_rooms: tuple[int, int, int, int] = ROOMS,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root)
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.segment = segment
        self._given_names = class_names
        self.train_scenes = train_scenes
        self.grid_size = grid_size
        self.augment = augment
        self.augmentation = augmentation
        self.max_points = max_points
        self.mix3d = mix3d
        self.tta = tta
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.procedural_rooms = procedural_rooms
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.seed = seed
        self._check()

    def _check(self) -> None:
        for name, least in _AT_LEAST.items():
            self._require(name, getattr(self, name) >= least, f"must be >= {least}")
        for name in ("train_scenes", "max_points"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "must be >= 1, or null for all")
        self._require("grid_size", self.grid_size > 0, "must be metres > 0")
        self._require("mix3d", 0 <= self.mix3d <= 1, "must be 0 .. 1")
        self._require("mix3d", self.augment or not self.mix3d, "needs data.init_args.augment")
        self._require("segment", Path(self.segment).name == self.segment, "must be a plain name")
        self._require("class_names", self._given_names != (), "must name a class, or null")
        if self.root is not None and not self.root.is_dir():
            raise FileNotFoundError(
                f"data.init_args.root={self.root}: no such folder; expected a Pointcept tree, "
                "<root>/train/<scene>/coord.npy; correct the path, or leave root out to use the "
                "embedded rooms"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            value = getattr(self, name, self._given_names)
            raise ValueError(f"{name}={value}: {expected} (data.init_args.{name})")

    @cached_property
    def _tree(self) -> SceneTree:
        """The tree; the embedded rooms are made if they are not there."""
        if self.root is not None:
            return SceneTree(self.root)
        return SceneTree(embedded_root(self.cache_dir, self.procedural_rooms))

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of labels.

        Raises:
            DataError: if neither the arguments nor the root name them.
        """
        names = self._given_names or self._tree.class_names
        if not names:
            raise DataError(
                f"{self._tree.root}: no classes.json; write a JSON list of the names of the "
                "classes there, or name them in data.init_args.class_names"
            )
        return tuple(names)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def source_name(self) -> str:
        """What numbers on this data are to be labelled with: "procedural", or the root's name."""
        return "procedural" if self.root is None else self.root.resolve().name

    @property
    def test_name(self) -> str:
        """Name of the test split; several are joined by +."""
        return "+".join(_as_tuple(self.splits["test"]))

    @property
    def is_fixed(self) -> bool:
        """Whether a training cloud is the same in every epoch."""
        return not self.augment

    @cached_property
    def data_fingerprint(self) -> str:
        """16 hexadecimal digits that change with the training scenes or their labels."""
        return tree_fingerprint(self._tree, self._source("train").folders, self.segment)

    def setup(self, stage: str) -> None:
        """Find the scenes of the splits that a stage needs.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            DataError: if a split is not there or empty.
        """
        if stage == "fit":
            self._source("train")
        if stage == "validate" or (
            stage == "fit" and getattr(self.trainer, "limit_val_batches", 1) != 0
        ):
            self._source("val")
        if stage == "test":
            self._source("test")

    def _source(self, split: _Split) -> LabelSource:
        folders = find_scenes(self._tree, _as_tuple(self.splits[split]))
        if split == "train" and self.train_scenes is not None:
            if self.train_scenes > len(folders):
                raise ValueError(
                    f"train_scenes={self.train_scenes}: there are {len(folders)} training scenes "
                    "(data.init_args.train_scenes)"
                )
            order = torch.randperm(
                len(folders), generator=keyed_generator(_SUBSET_KEY, len(folders))
            )
            folders = [folders[place] for place in sorted(order[: self.train_scenes].tolist())]
        return LabelSource(self._tree, folders, self.segment, self.num_classes, self.grid_size)

    def _training_clouds(self, augment: bool) -> TrainingClouds:
        return TrainingClouds(
            self._source("train"),
            self.augmentation if augment else None,
            self.max_points,
            self.mix3d if augment else 0.0,
            self.seed,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``LabelledBatch``es of ``batch_size``; resumes mid-epoch."""
        dataset = self._training_clouds(self.augment and not is_overfitting(self.trainer))
        return training_loader(self, dataset)

    def _ordered(self, dataset: TrainingClouds | EvaluationClouds) -> OrderedLoader:
        return ordered_loader(self, dataset, self.eval_batch_size)

    def train_eval_dataloader(self) -> OrderedLoader:
        """The training clouds, not shuffled and not changed, every one once."""
        return self._ordered(self._training_clouds(augment=False))

    def val_dataloader(self) -> OrderedLoader:
        """Validation ``LabelledBatch``es in order, every cloud once."""
        return self._ordered(EvaluationClouds(self._source("val"), votes=False))

    def test_dataloader(self) -> OrderedLoader:
        """Test ``LabelledBatch``es in order, every cloud once."""
        return self._ordered(EvaluationClouds(self._source("test"), votes=self.tta))


def _as_tuple(splits: str | tuple[str, ...]) -> tuple[str, ...]:
    return (splits,) if isinstance(splits, str) else tuple(splits)
