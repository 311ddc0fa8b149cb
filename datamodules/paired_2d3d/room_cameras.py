"""Where the cameras of a procedural room stand and look.

Azimuths are radians from east to north about the middle of the floor. The walls 0 to 3 stand
north, east, south and west, and a room has the first two, three or all of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TRIES = 30
_CLEARANCE = 0.5  # metres to anything as high as a camera
# Middle and half width of the azimuths from which pictures are taken, by the number of walls.
_SECTORS = {2: (-0.75 * math.pi, 0.36 * math.pi), 3: (math.pi, 0.3 * math.pi), 4: (0.0, math.pi)}


class Plan(NamedTuple):
    """What cameras have to respect.

    Attributes:
        size: (2,) metres from east to west and from south to north.
        walls: 2, 3 or 4.
        obstacles: (O, 3) x, y and radius of everything as high as a camera.
    """

    size: NDArray[np.float64]
    walls: int
    obstacles: NDArray[np.float64]


def draw_cameras(
    rng: np.random.Generator, plan: Plan, images: int, extra_views: int
) -> NDArray[np.float64]:
    """Poses of the cameras that take pictures, then of those that only see.

    The first stand side by side along the open sides, or all round where there is none; the
    others stand all round, further in.

    Returns:
        (images + extra_views, 4, 4) camera to the room's own frame, OpenCV axes.
    """
    middle, reach = _SECTORS[plan.walls]
    if plan.walls == 4:
        middle = rng.uniform(-math.pi, math.pi)
    poses = []
    for number in range(images):
        azimuth = middle + reach * (2 * (number + 0.5) / images - 1)
        poses.append(_camera(rng, plan, azimuth, 0.5 * reach / images, inside=False))
    start = rng.uniform(-math.pi, math.pi)
    for number in range(extra_views):
        azimuth = start + 2 * math.pi * number / extra_views
        poses.append(_camera(rng, plan, azimuth, 0.3, inside=True))
    return np.stack(poses)


def _camera(
    rng: np.random.Generator, plan: Plan, azimuth: float, spread: float, inside: bool
) -> NDArray[np.float64]:
    """A camera near an azimuth that stands clear of obstacles, looking across the room."""
    for _ in range(_TRIES):
        place = _place(rng, plan, azimuth + rng.uniform(-spread, spread), inside)
        gaps = np.hypot(*(plan.obstacles[:, :2] - place[:2]).T) - plan.obstacles[:, 2]
        if (gaps > _CLEARANCE).all():
            break
    target = np.append(rng.uniform(-0.12, 0.12, 2) * plan.size, rng.uniform(0.3, 0.55))
    return look_at(place, target)


def _place(
    rng: np.random.Generator, plan: Plan, azimuth: float, inside: bool
) -> NDArray[np.float64]:
    """A place in front of the wall at an azimuth, or around the limit where it is open."""
    direction = np.array([math.cos(azimuth), math.sin(azimuth)])
    limits = plan.size / 2 / np.maximum(np.abs(direction), 1e-9)
    axis = int(limits.argmin())
    wall = (1 if direction[0] > 0 else 3) if axis == 0 else (0 if direction[1] > 0 else 2)
    gap = rng.uniform(0.12, 0.3) if wall < plan.walls or inside else rng.uniform(-0.4, 0.1)
    distance = limits[axis] * (rng.uniform(0.6, 1.0) if inside else 1.0) - gap
    return np.append(direction * distance, rng.uniform(1.2, 1.55))


def look_at(place: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pose (4, 4) of an upright camera at a place (3,) that looks at a target (3,)."""
    forward = (target - place) / np.linalg.norm(target - place)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack((right, np.cross(forward, right), forward, place), axis=1)
    return pose
