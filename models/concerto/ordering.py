"""Sorting integer keys and moving rows, without which nothing here is serialized or pooled."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WORD = 63


def sort_stably(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Sort along the last dimension, ties by place.

    Args:
        keys: (..., n) int64 >= 0.

    Returns:
        Sorted keys and the places they came from, both (..., n) int64.
    """
    count = keys.shape[-1]
    bits = max(count - 1, 0).bit_length()
    if keys.device.type != "cpu" or not keys.numel() or int(keys.max()) >> (_WORD - bits):
        return keys.sort(dim=-1, stable=True)
    # With the place in the low bits no two keys are equal. Numpy sorts bare values with vector
    # instructions, ten times as fast as torch sorts keys together with their places.
    packed = (keys << bits) | torch.arange(count)
    packed.numpy().sort(axis=-1)
    return packed >> bits, packed & ((1 << bits) - 1)


def invert_order(order: Tensor) -> Tensor:
    """Place of each row in permutations (..., n) int64."""
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


class Groups(NamedTuple):
    """Rows grouped by an integer key, groups in ascending order of keys.

    Attributes:
        group: (N,) int64 group of each row.
        rows: (N,) int64 rows sorted by group, those of one group by row.
        starts: (n,) int64 where each group starts among the sorted rows.
        keys: (n,) int64.
    """

    group: Tensor
    rows: Tensor
    starts: Tensor
    keys: Tensor


def group_rows(keys: Tensor) -> Groups:
    """Group rows by keys (N,) int64 >= 0."""
    keys, rows = sort_stably(keys)
    fresh = torch.ones_like(keys, dtype=torch.bool)
    fresh[1:] = keys.diff() > 0
    group = torch.empty_like(rows).scatter_(0, rows, fresh.cumsum(0) - 1)
    starts = fresh.nonzero()[:, 0]
    return Groups(group, rows, starts, keys.index_select(0, starts))


class _Permutation(torch.autograd.Function):
    """Rows in another order; the gradient is moved back instead of added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


def permute_rows(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows (N, C) in the given order, an (N,) int64 permutation with its ``inverse``."""
    out: Tensor = _Permutation.apply(x, order, inverse)
    return out
