"""Arithmetic on point arrays (N, 3), column by column: many times faster than by axis.

Unlike a matrix product, it also gives the same bits for any number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def bounds(coord: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest corner (3,) of the box around points (N, 3), N >= 1."""
    columns = [coord[:, axis] for axis in range(3)]
    low = np.array([column.min() for column in columns], dtype=np.float32)
    return low, np.array([column.max() for column in columns], dtype=np.float32)


def squared_distances(
    coord: NDArray[np.float32], centre: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Squared distances (N,) of points (N, 3) from a centre (3,)."""
    total = np.zeros(len(coord), dtype=np.float32)
    for axis in range(3):
        offset = coord[:, axis] - centre[axis]
        offset *= offset
        total += offset
    return total


def map_points(coord: NDArray[np.float32], matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """Points (N, 3) mapped as x -> M x by a matrix (3, 3)."""
    weights = matrix.astype(np.float32)
    result = np.empty_like(coord)
    for row in range(3):
        total = coord[:, 0] * weights[row, 0]
        total += coord[:, 1] * weights[row, 1]
        total += coord[:, 2] * weights[row, 2]
        result[:, row] = total
    return result
