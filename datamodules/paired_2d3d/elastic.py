"""Elastic distortion: coordinates are moved by smooth noise on a coarse grid of nodes.

The noise is normal, averaged twice over 3 x 3 x 3 nodes, and linear between nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import uniform_filter

from datamodules.paired_2d3d.point_arrays import bounds

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_NODES = 2**24


def elastic_distortion(
    coord: NDArray[np.float32],
    granularity: float,
    magnitude: float,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Coordinates (N, 3) moved by smooth noise.

    Args:
        coord: (N, 3) metres, N >= 1.
        granularity: distance of the nodes in metres.
        magnitude: factor of the noise in metres; a node moves by about 0.11 of it along each axis.
        generator: draws the noise.

    Raises:
        ValueError: if the cloud is so wide that the nodes would not fit in memory.
    """
    low, high = bounds(coord)
    position = (coord - low) * np.float32(1 / granularity)
    # A rim of nodes on either side, so that every point lies between nodes.
    shape = [int(side) + 3 for side in (high - low) * np.float32(1 / granularity)]
    if shape[0] * shape[1] * shape[2] > _MAX_NODES:
        raise ValueError(
            f"elastic granularity {granularity} m: a view of {(high - low).tolist()} m "
            f"needs {' x '.join(map(str, shape))} nodes; remove stray points, or switch it off "
            "(data.init_args.views.elastic_chance 0)"
        )
    noise = generator.standard_normal((*shape, 3), dtype=np.float32)
    for _ in range(2):
        noise = uniform_filter(noise, size=(3, 3, 3, 1), mode="constant")
    noise *= np.float32(magnitude)
    return coord + interpolate_nodes(noise, position + np.float32(1))


def interpolate_nodes(
    nodes: NDArray[np.float32], position: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Values between nodes, trilinear.

    Args:
        nodes: (X, Y, Z, C).
        position: (N, 3) in units of nodes, 0 <= position < (X, Y, Z) - 1.

    Returns:
        (N, C).
    """
    _, depth, height, _ = nodes.shape
    flat = nodes.reshape(-1, nodes.shape[-1])
    cell = position.astype(np.int64)
    share = position - cell.astype(np.float32)
    base = (cell[:, 0] * depth + cell[:, 1]) * height + cell[:, 2]
    planes = []
    for step in (0, depth * height):
        lines = [_between(flat, base + (step + row), share[:, 2:]) for row in (0, height)]
        planes.append(lines[0] + (lines[1] - lines[0]) * share[:, 1:2])
    result: NDArray[np.float32] = planes[0] + (planes[1] - planes[0]) * share[:, :1]
    return result


def _between(
    flat: NDArray[np.float32], first: NDArray[np.int64], share: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Values (N, C) between the nodes ``first`` and the next ones along z."""
    low = flat.take(first, axis=0)
    result: NDArray[np.float32] = low + (flat.take(first + 1, axis=0) - low) * share
    return result
