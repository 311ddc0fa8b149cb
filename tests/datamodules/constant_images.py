"""ImageNetPixels on small images of one grey level each, which tell them apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.imagenet import ImageNetPixels

SMALL: dict[str, Any] = {"image_size": 8, "val_size": 5, "batch_size": 4, "eval_batch_size": 8}


def small(root: Path | None, **arguments: object) -> ImageNetPixels:
    return ImageNetPixels(root, **{**SMALL, "channels": 3, **arguments})


def collect(batches: Iterable[Mapping[str, Any]], key: str) -> Tensor:
    """A field of all batches, one after another."""
    return torch.cat([batch[key] for batch in batches])


def levels(image: Tensor) -> Tensor:
    """The grey level of constant images."""
    return ((image[:, 0, 0, 0] + 1) * 127.5).round().long()
