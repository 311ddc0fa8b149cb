"""Images from disk, of which nothing but perhaps their class is known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.argument_checks import check_splits
from datamodules.documents.complexity import png_sizes
from datamodules.documents.flat_folder import UNKNOWN, UnlabelledReader, open_flat
from datamodules.documents.items import REGIONS
from datamodules.errors import DataError, FaultPolicy
from datamodules.image_split import ImageSplit, PixelSource
from datamodules.loading import keyed_generator
from datamodules.readers.detection import open_splits
from datamodules.readers.folder import UNLABELLED

if TYPE_CHECKING:
    from datamodules.documents.batch import DocumentBatch
    from datamodules.image_transforms import PixelFormat
    from datamodules.readers.protocol import ImageReader, Split

Layout = Literal["auto", "flat", "folder", "parquet", "webdataset", "npz"]
"""Layouts on disk: those of labelled images, and flat folders without classes."""

# A constant and not the seed: runs of any seed hold out, and never train on, the same images.
_HOLD_OUT_KEY = 0x5A11D


def open_images(root: Path, layout: Layout, faults: FaultPolicy) -> Mapping[Split, ImageReader]:
    """Open every split at a root; readers of images without labels give -1 as their label.

    Args:
        root: file, folder, shard pattern, or the name of a hub data set where nothing lies.
        layout: how the data is stored.
        faults: what happens at damaged shards.

    Raises:
        DataError: if there is no data of the layout, no training split, or an empty one.
    """
    readers: Mapping[Split, ImageReader] = {}
    if layout in ("auto", "flat") and root.is_dir():
        readers = open_flat(root, strict=layout == "auto")
    if layout == "flat" and not readers:
        raise DataError(
            f"{root}: no flat folder of images; expected *.jpg in it, or in train* and val* below"
        )
    if layout != "flat" and not readers:
        readers = {
            split: UnlabelledReader(reader) if reader.class_names in ((), (UNLABELLED,)) else reader
            for split, reader in open_splits(root, layout, faults).items()
        }
    check_splits(readers, str(root))
    return readers


class ImagesFromDisk:
    """The splits at a root; what the data does not have is held out of training.

    Args:
        root: where the data is.
        layout: how it is stored.
        pixel_format: what the images are turned into.
        tokens: number of patches of an image.
        val_size: images held out of training if the data has no validation split.
        cache_bytes: decoded images are kept in memory if they need no more than this.
        faults: what happens at unusable images.

    Raises:
        DataError: if there is no usable data.
        ValueError: if as many images as there are would be held out.
    """

    def __init__(
        self,
        root: Path,
        layout: Layout,
        pixel_format: PixelFormat,
        *,
        tokens: int,
        val_size: int,
        cache_bytes: int,
        faults: FaultPolicy,
    ) -> None:
        self._readers = open_images(root, layout, faults)
        self._pixel_format = pixel_format
        self._tokens = tokens
        self._val_size = val_size
        self._cache_bytes = cache_bytes
        self._faults = faults
        self._sources: dict[Split, PixelSource] = {}
        if "val" not in self._readers and val_size >= len(self._readers["train"]):
            raise ValueError(
                f"val_size={val_size}: must be less than the {len(self._readers['train'])} "
                "training images (data.init_args.val_size)"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order; none if the images have no labels."""
        return self._readers["train"].class_names

    @property
    def fingerprint(self) -> str:
        """Text that changes with the data, its splits or its pixel format."""
        parts = [f"{split}={reader.fingerprint}" for split, reader in self._readers.items()]
        parts.append(f"{self._pixel_format}, {self._val_size}")
        return hashlib.blake2b("; ".join(parts).encode(), digest_size=16).hexdigest()

    def split(self, split: Split) -> DiskSplit:
        """A split; without a test split of its own, test is validation."""
        if split == "test" and "test" not in self._readers:
            split = "val"
        held_out = split != "test" and "val" not in self._readers
        source = self._source("train" if held_out else split)
        count = len(source.reader)
        positions = np.arange(count, dtype=np.int64)
        if held_out:
            order = torch.randperm(count, generator=keyed_generator(_HOLD_OUT_KEY, count)).numpy()
            chosen = order[: self._val_size] if split == "val" else order[self._val_size :]
            positions = np.sort(chosen)
        images = ImageSplit(source, positions, faults=self._faults, name=split)
        return DiskSplit(images, self._tokens, measure=split != "train")

    def _source(self, stored: Split) -> PixelSource:
        if stored not in self._sources:
            reader = self._readers[stored]
            self._sources[stored] = PixelSource(reader, self._pixel_format, self._cache_bytes)
        return self._sources[stored]


class DiskSplit(Dataset["DocumentBatch"]):
    """Batches of images in which everything but the class is unknown.

    Args:
        images: the images, their classes or -1, and what happens at unusable ones.
        tokens: number of patches of an image.
        measure: whether their complexity is measured; each image's once in a process.
    """

    def __init__(self, images: ImageSplit, tokens: int, *, measure: bool) -> None:
        self._images = images
        self._tokens = tokens
        self._complexity = torch.full((len(images) if measure else 0,), torch.nan)

    @property
    def num_skipped(self) -> int:
        """Unusable images met so far by this process and its workers."""
        return self._images.num_skipped

    def __len__(self) -> int:
        """Number of images, unusable ones included."""
        return len(self._images)

    def __getitem__(self, pair: tuple[int, int]) -> DocumentBatch:
        """A batch of one image, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> DocumentBatch:
        """The batch of the images given as (index, epoch) pairs.

        Raises:
            SampleError: at an unusable image under on_error="raise".
            DataError: if more than ``max_skipped_share`` of the split is unusable.
        """
        found = self._images.__getitems__(pairs)
        image, index = found["image"], found["index"]
        count = len(index)
        return {
            "image": image,
            "kind": found["label"],
            "region": torch.full((count, REGIONS), UNKNOWN),
            "item_token": torch.full((count, self._tokens), UNKNOWN),
            "scene": torch.full((count,), UNKNOWN),
            "index": index,
            "complexity": self._measured(image, index),
        }

    def _measured(self, image: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Complexities (B,), from memory where they are known."""
        if not len(self._complexity):
            return torch.zeros(len(index))
        new = self._complexity[index].isnan()
        if new.any():
            pixels = ((image[new] + 1) * 127.5).round().to(torch.uint8).numpy()
            self._complexity[index[new]] = png_sizes(pixels)
        return self._complexity[index]
