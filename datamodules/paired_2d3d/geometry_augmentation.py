"""Changes of a view's geometry: shift, scale, turns, mirrors, noise and elastic distortion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from datamodules.paired_2d3d.elastic import elastic_distortion
from datamodules.paired_2d3d.point_arrays import bounds, map_points

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.view_options import ViewOptions


def augment_geometry(
    coord: NDArray[np.float32],
    normal: NDArray[np.float32],
    options: ViewOptions,
    generator: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Change one view as the options say.

    Args:
        coord: (N, 3) metres, N >= 1; not written to.
        normal: (N, 3) of length 1, or zeros; they follow turns and mirrors.
        options: what is changed, and how much.
        generator: keyed by the sample.

    Returns:
        New coordinates and normals, (N, 3) each.
    """
    origin = coord_origin(coord) if options.centre else np.zeros(3, dtype=np.float32)
    scale = generator.uniform(*options.scale)
    turn = draw_turn(options, generator)
    moved = map_points(coord - origin, scale * turn)
    turned = map_points(normal, turn)
    if options.jitter > 0:
        noise = generator.standard_normal(coord.shape, dtype=np.float32)
        noise *= np.float32(options.jitter)
        moved += noise.clip(-options.jitter_clip, options.jitter_clip, out=noise)
    if options.elastic_chance > 0 and generator.random() < options.elastic_chance:
        for granularity, magnitude in options.elastic:
            moved = elastic_distortion(moved, granularity, magnitude, generator)
    return moved, turned


def coord_origin(coord: NDArray[np.float32]) -> NDArray[np.float32]:
    """Middle of the box around points (N, 3) in x and y, its bottom in z."""
    low, high = bounds(coord)
    middle = (low + high) / 2
    return np.array([middle[0], middle[1], low[2]], dtype=np.float32)


def draw_turn(options: ViewOptions, generator: np.random.Generator) -> NDArray[np.float64]:
    """Orthogonal matrix (3, 3): turns about z, x and y in this order, then mirrors of x and y."""
    matrix = np.eye(3)
    for axis, largest in ((2, options.rotate), (0, options.tilt), (1, options.tilt)):
        chance, angle = generator.random(), generator.uniform(-largest, largest)
        if chance < options.rotate_chance:
            matrix = axis_turn(axis, angle) @ matrix
    mirrored = generator.random(2) < options.flip_chance
    signs = np.where([*mirrored, False], -1.0, 1.0)
    result: NDArray[np.float64] = signs[:, None] * matrix
    return result


def axis_turn(axis: int, angle: float) -> NDArray[np.float64]:
    """Matrix (3, 3) of a right-handed turn by ``angle`` radians about axis 0, 1 or 2."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[second, first] = math.sin(angle)
    matrix[first, second] = -math.sin(angle)
    return matrix
