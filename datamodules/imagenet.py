"""ImageNet pixels: class-labelled images in [-1, 1] from any of the usual layouts on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.argument_checks import (
    check_arguments,
    check_classes,
    check_image_root,
    check_splits,
)
from datamodules.errors import FaultPolicy
from datamodules.image_split import ImageSplit, PixelSource
from datamodules.image_transforms import PixelFormat
from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
    keyed_generator,
)
from datamodules.module_loaders import is_overfitting, ordered_loader, training_loader
from datamodules.readers.detection import Format, open_splits
from datamodules.readers.protocol import ImageReader, Split
from datamodules.sample_requests import SampleRequests

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ASSETS = Path(__file__).parent / "assets"
# A constant and not the seed: runs of any seed hold out, and never train on, the same samples.
_HOLD_OUT_KEY = 0x5A11D


class ImageBatch(TypedDict):
    """Images with their classes.

    Attributes:
        image: (B, C, H, W) float32 in [-1, 1]; level v of L maps to 2 * v / (L - 1) - 1.
        label: (B,) int64, 0 .. num_classes - 1.
        index: (B,) int64, position of the sample in its split.
    """

    image: Tensor
    label: Tensor
    index: Tensor


class ImageNetPixels(LightningDataModule):
    """Class-labelled images from parquet, folders, tar shards or npz, or from the embedded data.

    Validation is the data's own split or ``val_size`` samples held out of training by a fixed
    permutation; test is the data's own labelled split or else the validation split.

    Args:
        root: file, folder, shard pattern such as train-{0000..1023}.tar, or hub data set
            owner/name; none takes the embedded data.
        format: layout of the root: parquet, folder (one folder per class), webdataset (tar
            shards) or npz (downsampled ImageNet); auto finds out.
        image_size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        levels: number of grey values of the data, 2 to 256.
        crop: adm (halve by averaging, bicubic, centre; usual for ImageNet generation) or resize
            (bilinear, centre).
        horizontal_flip: mirror half of the training images.
        unflipped_classes: classes that are never mirrored, such as shoes that all point one way.
        batch_size: training batch on each device.
        eval_batch_size: largest batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        val_size: samples held out of training if the data has no validation split.
        on_error: raise stops at an unusable sample; skip uses the next good one in its place.
        max_skipped_share: largest share of a split that may be skipped before stopping.
        embedded: which embedded data to take without a root: fashion_mnist (28 x 28, 256 levels)
            or digits (8 x 8, 17 levels).
        cache_decoded_mb: splits that need no more memory than this are decoded once.
        predict_count: number of samples to draw in predict; none draws 10 for each class.
        predict_classes: classes to draw in predict; none takes all.
        seed: key of the data order and the flips.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root does not exist.
        DataError: if the root holds no data of the format.
    """

    def __init__(
        self,
        root: Path | None = None,
        format: Literal["auto", "parquet", "folder", "webdataset", "npz"] = "auto",
        image_size: int = 28,
        channels: Literal[1, 3] = 1,
        levels: int = 256,
        crop: Literal["adm", "resize"] = "adm",
        horizontal_flip: bool = True,
        unflipped_classes: tuple[int, ...] = (),
        batch_size: int = 32,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        val_size: int = 500,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped_share: float = 0.01,
        embedded: Literal["fashion_mnist", "digits"] = "fashion_mnist",
        cache_decoded_mb: int = 512,
        predict_count: int | None = None,
        predict_classes: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root)
        self.format: Format = format
        self.image_size = image_size
        self.channels = channels
        self.levels = levels
        self.crop = crop
        self.horizontal_flip = horizontal_flip
        self.unflipped_classes = tuple(unflipped_classes)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.on_error = on_error
        self.max_skipped_share = max_skipped_share
        self.embedded = embedded
        self.cache_decoded_mb = cache_decoded_mb
        self.predict_count = predict_count
        self.predict_classes = None if predict_classes is None else tuple(predict_classes)
        self.seed = seed
        self._sources: dict[Split, PixelSource] = {}
        check_arguments(self)
        check_image_root(self.root, self.format)

    @cached_property
    def _readers(self) -> Mapping[Split, ImageReader]:
        readers = open_splits(self.root or _ASSETS / self.embedded, self.format, self._faults)
        check_splits(readers, str(self.root or self.embedded))
        check_classes(self, readers)
        return readers

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order, from the data."""
        return self._readers["train"].class_names

    @property
    def num_classes(self) -> int:
        """Number of classes, from the data."""
        return len(self.class_names)

    @cached_property
    def data_fingerprint(self) -> str:
        """16 hexadecimal digits that change with the data, its splits or its pixel format."""
        parts = [f"{split}={reader.fingerprint}" for split, reader in self._readers.items()]
        parts.append(f"{self._pixel_format}, {self.val_size}")
        return hashlib.blake2b("; ".join(parts).encode(), digest_size=8).hexdigest()

    @property
    def _pixel_format(self) -> PixelFormat:
        return PixelFormat(self.image_size, self.channels, self.levels, self.crop)

    @property
    def _faults(self) -> FaultPolicy:
        return FaultPolicy(self.on_error, self.max_skipped_share)

    def setup(self, stage: str) -> None:
        """Open the splits of a stage, and decode those that are small enough to be cached.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        wanted: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
        wanted["test"] = ("test",)
        for split in wanted.get(stage, ()):
            self._locate(split)

    def _locate(self, split: Split) -> tuple[PixelSource, NDArray[np.int64]]:
        """The pixels that hold a split, and the split's positions in them."""
        if split == "test" and "test" not in self._readers:
            split = "val"
        held_out = split != "test" and "val" not in self._readers
        stored: Split = "train" if held_out else split
        if stored not in self._sources:
            cache_bytes = self.cache_decoded_mb * 2**20
            reader = self._readers[stored]
            self._sources[stored] = PixelSource(reader, self._pixel_format, cache_bytes)
        source = self._sources[stored]
        count = len(source.reader)
        if not held_out:
            return source, np.arange(count, dtype=np.int64)
        order = torch.randperm(count, generator=keyed_generator(_HOLD_OUT_KEY, count)).numpy()
        chosen = order[: self.val_size] if split == "val" else order[self.val_size :]
        return source, np.sort(chosen)

    def _split(self, split: Split, *, augment: bool) -> ImageSplit:
        source, positions = self._locate(split)
        return ImageSplit(
            source,
            positions,
            flip_seed=self.seed if augment and self.horizontal_flip else None,
            unflipped_classes=self.unflipped_classes,
            faults=self._faults,
            name=split,
        )

    def _ordered(self, dataset: ImageSplit | SampleRequests) -> OrderedLoader:
        return ordered_loader(self, dataset, self.eval_batch_size)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, augmented ``ImageBatch``es of ``batch_size``; resumes mid-epoch."""
        dataset = self._split("train", augment=not is_overfitting(self.trainer))
        return training_loader(self, dataset)

    def train_eval_dataloader(self) -> OrderedLoader:
        """The training split as it is: not augmented, not shuffled, every sample once."""
        return self._ordered(self._split("train", augment=False))

    def val_dataloader(self) -> OrderedLoader:
        """Validation ``ImageBatch``es in order, every sample once."""
        return self._ordered(self._split("val", augment=False))

    def test_dataloader(self) -> OrderedLoader:
        """Test ``ImageBatch``es in order, every sample once."""
        return self._ordered(self._split("test", augment=False))

    def predict_dataloader(self) -> OrderedLoader:
        """``SampleRequest``s: ``predict_count`` labels over which the classes take turns."""
        classes = self.predict_classes or tuple(range(self.num_classes))
        return self._ordered(SampleRequests(classes, self.predict_count or 10 * len(classes)))
