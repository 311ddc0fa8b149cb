"""The embedded images as data sets: fresh ones in every training epoch, fixed ones to evaluate."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.documents.complexity import png_sizes
from datamodules.documents.drawing import SIDE, Layout, draw_layout, render
from datamodules.documents.glyphs import glyph_bank
from datamodules.documents.photographs import scaled_photos
from datamodules.image_transforms import to_unit_range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.documents.batch import DocumentBatch
    from datamodules.readers.protocol import Split

# Constants and not the seed: runs of any seed are compared on the same images.
_KEYS: dict[Split, int] = {"train": 0x7472, "val": 0x7661, "test": 0x7465}
_FINGERPRINTED = 16


class TrainingPictures(Dataset["DocumentBatch"]):
    """Pictures keyed by (seed, epoch, index), drawn when they are asked for.

    Args:
        count: pictures of an epoch.
        patch_size: pixels along a side of a patch.
        seed: key of all pictures.
        fresh: whether every epoch has pictures of its own.
    """

    def __init__(self, count: int, patch_size: int, *, seed: int, fresh: bool = True) -> None:
        self._count = count
        self._patch_size = patch_size
        self._seed = seed
        self._fresh = fresh
        # Made here once, and not by every worker process.
        glyph_bank("train")
        scaled_photos("train", SIDE)

    def __len__(self) -> int:
        """Number of pictures of an epoch."""
        return self._count

    def __getitem__(self, pair: tuple[int, int]) -> DocumentBatch:
        """A batch of one picture, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> DocumentBatch:
        """The batch of the pictures given as (index, epoch) pairs of one epoch."""
        index = np.array([index for index, _ in pairs], dtype=np.int64)
        epoch = pairs[0][1] if self._fresh else 0
        layout = draw_layout((_KEYS["train"], self._seed, epoch), index, "train")
        pixels, tokens = render(layout, "train", self._patch_size)
        return _batch(layout, pixels, tokens, index, torch.zeros(len(index)))


class EvaluationPictures(Dataset["DocumentBatch"]):
    """The same pictures in every run, drawn once and kept: 28 kB each.

    Args:
        split: "val" or "test".
        count: number of pictures.
        patch_size: pixels along a side of a patch.
    """

    def __init__(self, split: Split, count: int, patch_size: int) -> None:
        self._index = np.arange(count, dtype=np.int64)
        self._layout = draw_layout((_KEYS[split],), self._index, split)
        self._pixels, self._tokens = render(self._layout, split, patch_size)
        self._complexity = png_sizes(self._pixels)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._index)

    def __getitem__(self, pair: tuple[int, int]) -> DocumentBatch:
        """A batch of one picture, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> DocumentBatch:
        """The batch of the pictures given as (index, epoch) pairs; the epoch is of no account."""
        index = np.array([index for index, _ in pairs], dtype=np.int64)
        return _batch(
            self._layout.take(index),
            self._pixels[index],
            self._tokens[index],
            index,
            self._complexity[torch.from_numpy(index)],
        )


def _batch(
    layout: Layout,
    pixels: NDArray[np.uint8],
    tokens: NDArray[np.int64],
    index: NDArray[np.int64],
    complexity: torch.Tensor,
) -> DocumentBatch:
    return {
        "image": to_unit_range(pixels.transpose(0, 2, 3, 1), levels=256),
        "kind": torch.from_numpy((~layout.is_page).astype(np.int64)),
        "region": torch.from_numpy(layout.items.region),
        "item_token": torch.from_numpy(tokens),
        "scene": torch.from_numpy(layout.scene),
        "index": torch.from_numpy(index),
        "complexity": complexity,
    }


def embedded_fingerprint() -> str:
    """32 hexadecimal digits that change with the pixels or labels of the embedded images."""
    digest = hashlib.blake2b(digest_size=16)
    for split, key in _KEYS.items():
        layout = draw_layout((key,), np.arange(_FINGERPRINTED, dtype=np.int64), split)
        for array in (*render(layout, split, SIDE // 2), layout.items.region, layout.scene):
            digest.update(array.tobytes())
    return digest.hexdigest()
