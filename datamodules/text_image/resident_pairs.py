"""Text-image pairs few enough to stay where they are trained on: batches name them, no more.

A step on small networks takes less time than building its batch of pictures on the host. Here the
training loader gives positions only; the training stage reads a whole split once and keeps it on
its device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.loading import ResumableLoader
from datamodules.module_loaders import pins_memory, training_sampler
from datamodules.readers.protocol import Split
from datamodules.text_image.detection import PairLayout
from datamodules.text_image.text_image import TextImagePairs

_CHUNK = 256
_MOST_BYTES = 2**30


class PairPositions(TypedDict):
    """Which pairs a training batch consists of.

    Attributes:
        index: (B,) int64, position of the pair in its split.
    """

    index: Tensor


class WholeSplit(NamedTuple):
    """All pairs of a split.

    Attributes:
        pixels: (M, H, W, 3) uint8, RGB.
        captions: M texts.
    """

    pixels: Tensor
    captions: list[str]


class _Positions(Dataset[PairPositions]):
    """Batches of positions."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitems__(self, pairs: list[tuple[int, int]]) -> PairPositions:
        return {"index": torch.tensor([index for index, _ in pairs])}


class ResidentPairs(TextImagePairs):
    """Small text-image data: ``PairPositions`` in training, otherwise as ``TextImagePairs``.

    Captions are whole and crops central; what is varied, the training stage varies.

    Args:
        root: as of ``TextImagePairs``; none takes the embedded emoji (64 x 64).
        format: layout of the root.
        image_root: folder that the image names in jsonl files start from.
        image_size: height and width in pixels.
        resampling: filter of the scaling, with antialiasing.
        batch_size: training batch on each device.
        eval_batch_size: largest batch on each device outside training.
        val_size: pairs held out of training if the data has neither validation nor test split.
        seed: key of the data order.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root does not exist.
        DataError: if the root holds no data of the format.
    """

    def __init__(
        self,
        root: Path | None = None,
        format: PairLayout = "auto",
        image_root: Path | None = None,
        image_size: int = 64,
        resampling: Literal["bicubic", "lanczos"] = "bicubic",
        batch_size: int = 256,
        eval_batch_size: int = 256,
        val_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            format=format,
            image_root=image_root,
            image_size=image_size,
            resampling=resampling,
            caption_dropout=0.0,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            seed=seed,
        )

    def whole(self, split: Split) -> WholeSplit:
        """Read all pairs of a split, on every rank.

        Raises:
            DataError: if they would take more than a GiB.
            SampleError: if a pair cannot be used.
        """
        dataset = self._evaluation(split)
        count, size = len(dataset), self.image_size
        if count * size * size * 3 > _MOST_BYTES:
            raise DataError(
                f"split {split}: {count} images of {size} x {size} are too many to stay in memory; "
                "use datamodules.text_image.text_image.TextImagePairs or a smaller image_size"
            )
        pixels = torch.empty(count, size, size, 3, dtype=torch.uint8)
        captions: list[str] = []
        for start in range(0, count, _CHUNK):
            positions = range(start, min(start + _CHUNK, count))
            batch = dataset.__getitems__([(position, 0) for position in positions])
            levels = (batch["image"] + 1).mul_(127.5).round_()  # (B, 3, H, W)
            pixels[start : start + _CHUNK] = levels.permute(0, 2, 3, 1).to(torch.uint8)
            captions += batch["caption_full"]
        return WholeSplit(pixels, captions)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``PairPositions`` of ``batch_size`` pairs; resumes mid-epoch."""
        dataset = _Positions(self.num_captions)
        sampler = training_sampler(self, len(dataset))
        return ResumableLoader(dataset, sampler, pin_memory=pins_memory(self), trainer=self.trainer)
