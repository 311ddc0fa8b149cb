"""One split as a data set that builds whole batches: decode, crop, keyed flip, scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.errors import FaultPolicy, SampleError
from datamodules.image_transforms import PixelFormat, to_unit_range
from datamodules.keyed_random import keyed_bits
from datamodules.usable_samples import UsableSamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.imagenet import ImageBatch
    from datamodules.readers.protocol import ImageReader


class PixelSource:
    """Cropped uint8 pixels and labels of a reader's samples, decoded once if they fit.

    Args:
        reader: where the images are.
        pixel_format: what they are turned into.
        cache_bytes: the decoded samples are kept in memory if they need no more than this.
    """

    def __init__(self, reader: ImageReader, pixel_format: PixelFormat, cache_bytes: int) -> None:
        self.reader = reader
        self.pixel_format = pixel_format
        self.pixels: NDArray[np.uint8] | None = None
        self.labels: NDArray[np.int64] | None = None
        self.faults: dict[int, str] = {}
        size = pixel_format.image_size**2 * pixel_format.channels
        if len(reader) * size <= cache_bytes:
            self._decode_all()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every sample."""
        size = self.pixel_format.image_size
        return size, size, self.pixel_format.channels

    def _decode_all(self) -> None:
        count = len(self.reader)
        pixels = np.zeros((count, *self.shape), dtype=np.uint8)
        labels = np.zeros(count, dtype=np.int64)
        for position in range(count):
            try:
                pixels[position], labels[position] = self._decode(position)
            except SampleError as error:
                self.faults[position] = str(error)
        self.pixels, self.labels = pixels, labels

    def _decode(self, position: int) -> tuple[NDArray[np.uint8], int]:
        label = self.reader.label(position)
        data = self.reader.read(position)
        try:
            return self.pixel_format.to_pixels(data), label
        except ValueError as error:
            raise SampleError(f"{self.reader.sample_id(position)}: {error}") from error

    def sample(self, position: int) -> tuple[NDArray[np.uint8], int]:
        """Pixels (H, W, C) and label of one sample; SampleError if it is unusable."""
        if self.pixels is None or self.labels is None:
            return self._decode(position)
        if position in self.faults:
            raise SampleError(self.faults[position])
        return self.pixels[position], int(self.labels[position])


class ImageSplit(Dataset["ImageBatch"]):
    """Batches of one split; every random choice is keyed, so workers and resumes agree.

    Args:
        source: pixels of all samples of the reader.
        positions: (N,) positions in the reader that form this split.
        flip_seed: key of the horizontal flips by (seed, epoch, index); None never flips.
        unflipped_classes: classes that are never flipped.
        faults: what happens at unusable samples.
        name: of the split, for messages.
    """

    def __init__(
        self,
        source: PixelSource,
        positions: NDArray[np.int64],
        *,
        flip_seed: int | None = None,
        unflipped_classes: Sequence[int] = (),
        faults: FaultPolicy | None = None,
        name: str = "train",
    ) -> None:
        self._source = source
        self._positions = positions
        self._flip_seed = flip_seed
        self._unflipped = np.asarray(unflipped_classes, dtype=np.int64)
        self._samples = UsableSamples(len(positions), faults or FaultPolicy(), name)

    @property
    def num_skipped(self) -> int:
        """Unusable samples met so far by this process and its workers."""
        return self._samples.num_skipped

    def __len__(self) -> int:
        """Number of samples, unusable ones included."""
        return len(self._positions)

    def __getitem__(self, pair: tuple[int, int]) -> ImageBatch:
        """A batch of one sample, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> ImageBatch:
        """The batch of the samples given as (index, epoch) pairs of one epoch.

        Returns:
            The batch; where a sample was skipped, ``index`` is that of its substitute.

        Raises:
            SampleError: at an unusable sample under on_error="raise".
            DataError: if more than ``max_skipped_share`` of the split is unusable.
        """
        indices = np.fromiter((index for index, _ in pairs), dtype=np.int64, count=len(pairs))
        source = self._source
        if source.pixels is not None and source.labels is not None and not source.faults:
            positions = self._positions[indices]
            pixels, labels = source.pixels[positions], source.labels[positions]
        else:
            pixels, labels, indices = self._gather(indices)
        if self._flip_seed is not None:
            self._flip(pixels, labels, indices, pairs[0][1])
        return {
            "image": to_unit_range(pixels, source.pixel_format.levels),
            "label": torch.from_numpy(labels),
            "index": torch.from_numpy(indices),
        }

    def _gather(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
        pixels = np.empty((len(indices), *self._source.shape), dtype=np.uint8)  # (B, H, W, C)
        labels = np.empty(len(indices), dtype=np.int64)
        used = np.empty(len(indices), dtype=np.int64)
        for row, index in enumerate(indices.tolist()):
            (pixels[row], labels[row]), used[row] = self._samples.take(index, self._sample)
        return pixels, labels, used

    def _sample(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self._source.sample(int(self._positions[index]))

    def _flip(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        indices: NDArray[np.int64],
        epoch: int,
    ) -> None:
        """Mirror about half of the (B, H, W, C) images left to right, in place."""
        bits = keyed_bits((self._flip_seed or 0, epoch), indices)
        mirrored = (bits & np.uint64(1)).astype(bool)
        if len(self._unflipped):
            mirrored &= ~np.isin(labels, self._unflipped)
        pixels[mirrored] = pixels[mirrored][:, :, ::-1]
