"""One split of pairs as a data set that builds whole batches: decode, crop, drop captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.documents.keyed_draws import KeyedDraws
from datamodules.errors import FaultPolicy, SampleError
from datamodules.image_transforms import decode_image, to_unit_range
from datamodules.text_image.batch import TextImageBatch
from datamodules.text_image.square_crop import Resampling, square_crop
from datamodules.usable_samples import UsableSamples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.tensor_store import TensorStore
    from datamodules.text_image.pair_reader import PairReader

# Apart from the data order, which is keyed by (seed, epoch) alone.
_DROPOUT, _CROP, _FLIP = 0xD309, 0xC309, 0xF119


@dataclass(frozen=True)
class PairOptions:
    """What is made of every pair.

    Attributes:
        image_size: height and width in pixels.
        resampling: filter of the scaling.
        decode: whether images are decoded at all.
        caption_dropout: share of the captions that are "", 0 .. 1.
        random_crop: whether the square lies anywhere, instead of in the centre.
        random_flip: whether half of the images are mirrored.
        seed: key of the random choices, together with epoch and index.
    """

    image_size: int
    resampling: Resampling
    decode: bool = True
    caption_dropout: float = 0.0
    random_crop: bool = False
    random_flip: bool = False
    seed: int = 0


class _Pair(NamedTuple):
    """A usable pair; the pixels are (H, W, 3) uint8, (0, 0, 3) if images are not decoded."""

    pixels: NDArray[np.uint8]
    caption: str
    key: str
    category: int


class PairSplit(Dataset[TextImageBatch]):
    """Batches of one split; every random choice is keyed, so workers and resumes agree.

    Args:
        reader: where the pairs are.
        positions: (N,) positions in the reader that form this split.
        options: what is made of every pair.
        faults: what happens at unusable pairs.
        category_names: names that the batches' categories count in.
        stores: stored tensors of this split, addressed by index.
        cache_bytes: decoded images are kept, once seen, if all need no more than this.
        name: of the split, for messages.
    """

    def __init__(
        self,
        reader: PairReader,
        positions: NDArray[np.int64],
        options: PairOptions,
        *,
        faults: FaultPolicy,
        category_names: tuple[str, ...] = (),
        stores: Sequence[TensorStore] = (),
        cache_bytes: int = 0,
        name: str = "train",
    ) -> None:
        self._reader = reader
        self._positions = positions
        self._options = options
        self._stores = tuple(stores)
        numbers = {category: number for number, category in enumerate(category_names)}
        found = [numbers.get(category, -1) for category in reader.category_names]
        self._categories = np.array([*found, -1], dtype=np.int64)  # the last one for -1
        self._samples = UsableSamples(len(positions), faults, name)
        size = options.image_size
        fits = options.decode and not options.random_crop
        fits &= len(positions) * size * size * 3 <= cache_bytes
        self._cache = np.zeros((len(positions) if fits else 0, size, size, 3), dtype=np.uint8)
        self._is_cached = np.zeros(len(self._cache), dtype=np.bool_)

    @property
    def num_skipped(self) -> int:
        """Unusable pairs met so far by this process and its workers."""
        return self._samples.num_skipped

    @property
    def skipped_ids(self) -> list[str]:
        """Names, with the file, of the unusable pairs met so far."""
        positions = self._positions[self._samples.skipped]
        return [self._reader.sample_id(position) for position in positions.tolist()]

    def __len__(self) -> int:
        """Number of pairs, unusable ones included."""
        return len(self._positions)

    def __getitem__(self, pair: tuple[int, int]) -> TextImageBatch:
        """A batch of one pair, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> TextImageBatch:
        """The batch of the pairs given as (index, epoch) pairs of one epoch.

        Returns:
            The batch; where a pair was skipped, ``index`` is that of its substitute.

        Raises:
            SampleError: at an unusable pair under on_error="raise".
            DataError: if more than ``max_skipped_share`` of the split is unusable.
        """
        epoch = pairs[0][1]
        load = partial(self._load, epoch=epoch)
        taken = [self._samples.take(index, load) for index, _ in pairs]
        found = [pair for pair, _ in taken]
        index = np.array([index for _, index in taken], dtype=np.int64)
        captions = [pair.caption for pair in found]
        batch: TextImageBatch = {
            "caption": self._dropped(captions, index, epoch),
            "caption_full": captions,
            "index": torch.from_numpy(index),
            "key": [pair.key for pair in found],
            "category": torch.tensor([pair.category for pair in found], dtype=torch.int64),
        }
        if self._options.decode:
            pixels = np.stack([pair.pixels for pair in found])  # (B, H, W, 3)
            batch["image"] = to_unit_range(self._flipped(pixels, index, epoch), levels=256)
        if self._stores:
            batch["features"] = {
                name: rows
                for store in self._stores
                for name, rows in store.rows(batch["index"]).items()
            }
        return batch

    def _load(self, index: int, epoch: int) -> _Pair:
        """A pair; SampleError if any part of it cannot be used."""
        position = int(self._positions[index])
        caption = self._reader.caption(position)
        for store in self._stores:
            if index not in store:
                raise SampleError(
                    f"{self._reader.sample_id(position)}: nothing stored of it in {store.folder}; "
                    "run the command that made the features again"
                )
        pixels = np.zeros((0, 0, 3), dtype=np.uint8)
        if self._options.decode:
            pixels = self._pixels(index, self._place(index, epoch))
        category = int(self._categories[self._reader.category(position)])
        return _Pair(pixels, caption, self._reader.key(position), category)

    def _place(self, index: int, epoch: int) -> tuple[float, float]:
        """Where the square lies in the image."""
        if not self._options.random_crop:
            return 0.5, 0.5
        draws = KeyedDraws((self._options.seed, epoch, _CROP), np.array([index], dtype=np.int64))
        x, y = draws.uniform(shape=(2,))[0].tolist()
        return x, y

    def _pixels(self, index: int, place: tuple[float, float]) -> NDArray[np.uint8]:
        """Cropped image (H, W, 3), from memory where it is known."""
        if len(self._cache) and self._is_cached[index]:
            cached: NDArray[np.uint8] = self._cache[index]
            return cached
        position = int(self._positions[index])
        try:
            image = decode_image(self._reader.read(position), 3, on_white=True)
        except SampleError:
            raise
        except ValueError as error:
            raise SampleError(f"{self._reader.sample_id(position)}: {error}") from None
        square = square_crop(image, self._options.image_size, self._options.resampling, place)
        pixels: NDArray[np.uint8] = np.asarray(square)
        if len(self._cache):
            self._cache[index] = pixels
            self._is_cached[index] = True
        return pixels

    def _dropped(self, captions: list[str], index: NDArray[np.int64], epoch: int) -> list[str]:
        share = self._options.caption_dropout
        if share == 0:
            return list(captions)
        drawn = KeyedDraws((self._options.seed, epoch, _DROPOUT), index).uniform()
        return [
            "" if draw < share else caption
            for caption, draw in zip(captions, drawn.tolist(), strict=True)
        ]

    def _flipped(
        self, pixels: NDArray[np.uint8], index: NDArray[np.int64], epoch: int
    ) -> NDArray[np.uint8]:
        if self._options.random_flip:
            drawn = KeyedDraws((self._options.seed, epoch, _FLIP), index).uniform()
            mirrored = drawn < 0.5
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        return pixels
