"""Batches that ask for class-conditional samples, as predict needs them."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset


class SampleRequest(TypedDict):
    """Classes to draw samples of.

    Attributes:
        label: (B,) int64, 0 .. num_classes - 1.
        index: (B,) int64, number of the sample; classes take turns.
    """

    label: Tensor
    index: Tensor


class SampleRequests(Dataset[SampleRequest]):
    """``count`` requests over which the given classes take turns.

    Args:
        classes: labels to ask for.
        count: number of requests.
    """

    def __init__(self, classes: tuple[int, ...], count: int) -> None:
        self._classes = torch.tensor(classes, dtype=torch.int64)
        self._count = count

    def __len__(self) -> int:
        """Number of requests."""
        return self._count

    def __getitem__(self, pair: tuple[int, int]) -> SampleRequest:
        """A batch of one request, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> SampleRequest:
        """The batch of the requests given as (index, epoch) pairs."""
        index = torch.tensor([index for index, _ in pairs], dtype=torch.int64)
        return {"label": self._classes[index % len(self._classes)], "index": index}
