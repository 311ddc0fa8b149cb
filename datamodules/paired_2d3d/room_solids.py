"""Exact intersections of camera rays with boxes, cylinders and spheres in any orientation.

Depth is the third coordinate in the camera's frame, in metres; pixel centres lie at half-integers.

Shape letters: K solids, H x W pixels, P points.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEAR = 0.02  # metres; nothing nearer to a camera is seen

_TINY = np.float32(1e-20)  # added to directions: an exact zero would make 0 * inf
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)


class Shape(IntEnum):
    """What a solid is; cylinders stand along their third axis."""

    BOX = 0
    CYLINDER = 1
    SPHERE = 2


class Solids(NamedTuple):
    """K solids.

    Attributes:
        shape: (K,) int64, see ``Shape``.
        centre: (K, 3) float64, metres.
        axes: (K, 3, 3) float64, whose rows are the solid's own axes in the world.
        half: (K, 3) float64 half extents along these axes, metres; first and second are equal
            for a cylinder, all three for a sphere.
    """

    shape: NDArray[np.int64]
    centre: NDArray[np.float64]
    axes: NDArray[np.float64]
    half: NDArray[np.float64]


class Camera(NamedTuple):
    """A pinhole camera.

    Attributes:
        intrinsics: (3, 3), pixels; pixel centres at half-integers.
        pose: (4, 4) camera to world, OpenCV axes (x right, y down, z forward).
        height: pixels.
        width: pixels.
    """

    intrinsics: NDArray[np.float64]
    pose: NDArray[np.float64]
    height: int
    width: int


class Hits(NamedTuple):
    """The nearest solid at every pixel's centre.

    Attributes:
        depth: (H, W) float32, metres; 0 where nothing is met.
        solid: (H, W) int64; -1 where nothing is met.
    """

    depth: NDArray[np.float32]
    solid: NDArray[np.int64]


def ray_places(camera: Camera) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where the rays of the columns (W,) and rows (H,) cross the plane at depth 1."""
    focal, centre = camera.intrinsics[[0, 1], [0, 1]], camera.intrinsics[:2, 2]
    across = (np.arange(camera.width) + 0.5 - centre[0]) / focal[0]
    down = (np.arange(camera.height) + 0.5 - centre[1]) / focal[1]
    return across.astype(np.float32), down.astype(np.float32)


def cast_rays(solids: Solids, camera: Camera) -> Hits:
    """Find what the ray through every pixel's centre meets first.

    Args:
        solids: none of which contains the camera.
        camera: where from.
    """
    across, down = ray_places(camera)
    depth = np.full((camera.height, camera.width), np.inf, dtype=np.float32)
    number = np.full(depth.shape, -1, dtype=np.int64)
    turned = solids.axes @ camera.pose[:3, :3] / solids.half[:, :, None]  # (K, 3, 3)
    origin = np.einsum("kij,kj->ki", solids.axes, camera.pose[:3, 3] - solids.centre)
    origin /= solids.half  # (K, 3) camera centre in units of each solid
    for solid, (top, bottom, left, right) in _windows(solids, camera):
        step = turned[solid].astype(np.float32)[:, :, None, None]  # (3 axes, 3, 1, 1)
        columns, rows = across[None, left:right], down[top:bottom, None]
        direction = [axis[0] * columns + axis[1] * rows + axis[2] + _TINY for axis in step]
        found = _CASTS[Shape(int(solids.shape[solid]))](origin[solid].astype(np.float32), direction)
        window = depth[top:bottom, left:right]
        nearer = (found < window) & (found > NEAR)
        window[nearer] = found[nearer]
        number[top:bottom, left:right][nearer] = solid
    depth[number < 0] = 0
    return Hits(depth, number)


def _windows(solids: Solids, camera: Camera) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Solids in sight, and the pixels (top, bottom, left, right) that each may cover."""
    reach = _CORNERS[None] * solids.half[:, None]  # (K, 8, 3)
    corners = solids.centre[:, None] + reach @ solids.axes
    seen = (corners - camera.pose[:3, 3]) @ camera.pose[:3, :3]  # (K, 8, 3) in the camera's frame
    nearest, farthest = seen[..., 2].min(1), seen[..., 2].max(1)
    place = seen @ camera.intrinsics.T
    place = place[..., :2] / np.maximum(place[..., 2:], NEAR)
    limit = np.array([camera.width, camera.height])
    low = np.clip(np.floor(place.min(1)), 0, limit).astype(int)
    high = np.clip(np.ceil(place.max(1)), 0, limit).astype(int)
    low[nearest < NEAR], high[nearest < NEAR] = 0, limit
    kept = np.flatnonzero((farthest > NEAR) & (high > low).all(1))
    return [(k, (low[k, 1], high[k, 1], low[k, 0], high[k, 0])) for k in kept.tolist()]


def _cast_box(
    origin: NDArray[np.float32], direction: list[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Depth of the box whose corners are (±1, ±1, ±1), infinite where it is missed."""
    entry = np.full(direction[0].shape, -np.inf, dtype=np.float32)
    leave = np.full(direction[0].shape, np.inf, dtype=np.float32)
    for axis in range(3):
        inverse = 1 / direction[axis]
        middle, reach = -origin[axis] * inverse, np.abs(inverse)
        np.maximum(entry, middle - reach, out=entry)
        np.minimum(leave, middle + reach, out=leave)
    missed = entry >= leave
    return np.where(missed, np.float32(np.inf), entry)


def _cast_cylinder(
    origin: NDArray[np.float32], direction: list[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Depth of the cylinder of radius 1 between -1 and 1 along the third axis."""
    x, y, z = direction
    squared = x * x + y * y
    along = origin[0] * x + origin[1] * y
    rest = origin[0] ** 2 + origin[1] ** 2 - 1
    root = along * along - squared * rest
    side: NDArray[np.float32] = (-along - np.sqrt(np.maximum(root, 0))) / squared
    side[(root < 0) | (np.abs(origin[2] + side * z) > 1)] = np.inf
    if abs(origin[2]) <= 1:
        return side
    cap = (np.sign(origin[2]) - origin[2]) / z
    met = (origin[0] + cap * x) ** 2 + (origin[1] + cap * y) ** 2 <= 1
    return np.where(met & (cap < side), cap, side)


def _cast_sphere(
    origin: NDArray[np.float32], direction: list[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Depth of the unit sphere."""
    x, y, z = direction
    squared = x * x + y * y + z * z
    along = origin[0] * x + origin[1] * y + origin[2] * z
    root = along * along - squared * np.float32(origin @ origin - 1)
    found = (-along - np.sqrt(np.maximum(root, 0))) / squared
    return np.where(root < 0, np.float32(np.inf), found)


_CASTS = {Shape.BOX: _cast_box, Shape.CYLINDER: _cast_cylinder, Shape.SPHERE: _cast_sphere}


def surface_frames(
    solids: Solids, solid: NDArray[np.int64], points: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Outward normals and places on the surface of points on solids.

    Args:
        solids: all of them.
        solid: (P,) which one each point lies on.
        points: (P, 3) in the world, metres.

    Returns:
        (P, 3) unit normals in the world, and (P, 2) places in metres from the middle of the
        face: across and up. Round sides are unrolled.
    """
    axes, half, shape = solids.axes[solid], solids.half[solid], solids.shape[solid]
    local = np.einsum("pij,pj->pi", axes, points - solids.centre[solid])
    unit = local / half
    across, up = local[:, 0].copy(), local[:, 2].copy()
    normal = np.zeros_like(local)

    face = np.abs(unit)
    round_side = shape == Shape.CYLINDER
    face[round_side, :2] = 0
    round_side &= np.abs(unit[:, 2]) < np.hypot(unit[:, 0], unit[:, 1])
    axis = face.argmax(1)  # of boxes and of the ends of cylinders
    row = np.arange(len(axis))
    normal[row, axis] = np.sign(unit[row, axis])
    across[axis == 0] = local[axis == 0, 1]
    up[axis == 2] = local[axis == 2, 1]

    turned = round_side | (shape == Shape.SPHERE)
    angle = np.arctan2(unit[turned, 1], unit[turned, 0])
    across[turned] = angle * half[turned, 0]
    normal[round_side] = unit[round_side] * [1, 1, 0]
    ball = shape == Shape.SPHERE
    up[ball] = np.arcsin(np.clip(unit[ball, 2], -1, 1)) * half[ball, 0]
    normal[ball] = unit[ball]
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return np.einsum("pij,pi->pj", axes, normal), np.stack((across, up), 1)
