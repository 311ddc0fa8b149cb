"""Ragged batches of point clouds.

A batch of clouds is one list of rows: the points of the first cloud, then those of the second and
so on. Letters in shape comments: N points of the batch, B clouds.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PointCloud(NamedTuple):
    """Points of a batch of clouds.

    Attributes:
        coord: (N, 3) float32, metres.
        feat: (N, 9) float32: coordinates of the view, colour in [0, 1], normal.
        offset: (B,) int64, cumulative numbers of points; cloud b ends before row ``offset[b]``.
        grid_coord: (N, 3) int64 >= 0, voxel of each point; several points may share one.
        origin_coord: (N, 3) metres before augmentation, by which views are matched.
    """

    coord: Tensor
    feat: Tensor
    offset: Tensor
    grid_coord: Tensor | None = None
    origin_coord: Tensor | None = None


def batch_numbers(offset: Tensor) -> Tensor:
    """Number of the cloud of each row, (N,) int64, from cumulative sizes (B,)."""
    sizes = offset.diff(prepend=offset.new_zeros(1))
    return torch.arange(len(offset), device=offset.device).repeat_interleave(sizes)


def batch_offset(batch: Tensor, clouds: int) -> Tensor:
    """Cumulative sizes (B,) int64 of sorted cloud numbers (N,)."""
    return torch.searchsorted(batch, torch.arange(clouds, device=batch.device), right=True)


def grid_coordinates(coord: Tensor, grid_size: float) -> Tensor:
    """Voxels (N, 3) int64 of points, counted from the lowest corner of the whole batch.

    Args:
        coord: (N, 3) metres.
        grid_size: Side of a voxel in metres, > 0.
    """
    if not grid_size > 0:
        raise ValueError(f"grid_size={grid_size}: must be > 0 (metres)")
    if not len(coord):
        return coord.new_zeros(0, 3, dtype=torch.int64)
    return ((coord - coord.amin(0)) / grid_size).trunc().long()
