"""One point per voxel of a regular grid, and the way back to all points.

Voxels are numbered in the order of their (x, y, z) cells, so that ``sample_voxels``,
``voxel_inverse`` and every other function here agree on their rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BITS = 63  # of a voxel number


def voxel_cells(coord: NDArray[np.float32], grid_size: float) -> NDArray[np.int64]:
    """Cell of every point: floor(coord / grid_size), counted from the smallest one of each axis.

    Args:
        coord: (N, 3) finite coordinates in metres.
        grid_size: side of a voxel in metres, > 0.

    Returns:
        (N, 3) int64, each >= 0.

    Raises:
        ValueError: if the cloud spans more cells than can be numbered.
    """
    if len(coord) == 0:
        return np.zeros((0, 3), dtype=np.int64)
    cells: NDArray[np.int64] = np.floor(coord / np.float32(grid_size)).astype(np.int64)
    cells -= [column.min() for column in cells.T]
    if sum(int(column.max()).bit_length() for column in cells.T) > _BITS:
        raise ValueError(
            f"grid_size={grid_size}: the cloud spans {np.ptp(coord, axis=0).tolist()} m, too many "
            "cells to number; remove stray points, or take a larger grid"
        )
    return cells


def voxel_keys(cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number (N,) of each cell (N, 3), in the order of (x, y, z)."""
    if len(cells) == 0:
        return np.zeros(0, dtype=np.int64)
    sides = [int(column.max()) + 1 for column in cells.T]
    keys: NDArray[np.int64] = (cells[:, 0] * sides[1] + cells[:, 1]) * sides[2] + cells[:, 2]
    return keys


def _runs(
    coord: NDArray[np.float32], grid_size: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Points (N,) in the order of their voxels, and where each of the n voxels starts (n,)."""
    keys = voxel_keys(voxel_cells(coord, grid_size))
    count = len(keys)
    if count == 0:
        return keys, keys
    if int(keys.max()) < (1 << _BITS) // count:
        # With the row in the low digits a plain sort, faster than a stable one, keeps the order.
        keys = np.sort(keys * count + np.arange(count))
        order = keys % count
        keys //= count
    else:
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return order, starts


def sample_voxels(
    coord: NDArray[np.float32], grid_size: float, generator: np.random.Generator | None
) -> NDArray[np.int64]:
    """One point of every occupied voxel (GridSample; arXiv 2510.23607, section 4).

    Args:
        coord: (N, 3) finite coordinates in metres.
        grid_size: side of a voxel in metres.
        generator: draws the point of each voxel; None takes the first one.

    Returns:
        (n,) int64 rows of ``coord``, in the order of the voxels.
    """
    order, starts = _runs(coord, grid_size)
    if generator is not None:
        counts = np.diff(starts, append=len(order))
        starts = starts + (generator.random(len(starts)) * counts).astype(np.int64)
    rows: NDArray[np.int64] = order[starts]
    return rows


def voxel_inverse(coord: NDArray[np.float32], grid_size: float) -> NDArray[np.int64]:
    """Row in the result of ``sample_voxels`` that stands for every point.

    Args:
        coord: (N, 3) finite coordinates in metres.
        grid_size: side of a voxel in metres.

    Returns:
        (N,) int64 in 0 .. n - 1.
    """
    order, starts = _runs(coord, grid_size)
    inverse = np.empty(len(order), dtype=np.int64)
    numbers = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(order)))
    inverse[order] = numbers
    return inverse
