"""Random procedural scenes and cameras, each a function of (seed, split, scene number).

A scene is a box-shaped room with three spheres and two boxes turned about the vertical, each
surface with its own texture, and one point light. Lengths are in scene units; a room is about 5
wide. Axes are OpenCV's: x right, y down, z forward, from the cameras near the origin.

Shape letters: S scenes, V views. Surfaces are numbered: 0-5 the walls -x, +x, -y (ceiling),
+y (floor), -z, +z; 6-8 the spheres; 9-10 the boxes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.keyed_random import keyed_generator
from datamodules.multiview.procedural_textures import SPLIT_KEYS, TILES, Split

SPHERES, BOXES = 3, 2
SURFACES = 6 + SPHERES + BOXES
VIEWS = 14
QUADRANT_VIEWS = 8  # views 2q and 2q + 1 stand in quadrant q of the camera rectangle
CONTEXT_FRAMES = (0, 2, 4, 6)  # evaluation: one view of every quadrant
TARGET_FRAMES = tuple(range(QUADRANT_VIEWS, VIEWS))
FOCAL_SHARE = 0.8  # focal length over picture size: 64 degrees across

_ROOM_LOW = ((-3.0, -2.0, -2.0), (-2.2, -1.4, -2.0))  # range of the corner of small x, y, z
_ROOM_HIGH = ((2.2, 1.2, 4.2), (3.0, 1.8, 5.4))
_OBJECT = ((-1.5, -0.9, 2.2), (1.5, 0.9, 3.7))  # range of the objects' centres
_RADIUS = (0.28, 0.6)  # of the spheres
_HALF_SIZE = (0.2, 0.5)  # of the boxes, along each of their axes
_LIGHT = ((-1.5, -1.3, 0.0), (1.5, -0.6, 2.5))  # range of its place: high up, in the middle
_MIX = (0.25, 0.85)  # share of the texture in a surface's colour, the rest is a plain colour
_WALL_TILES = (0.2, 0.4)  # tiles per unit length on walls
_OBJECT_TILES = (0.35, 0.7)  # tiles per unit length on boxes
_CAMERA_REACH = (1.4, 0.7, 0.4)  # cameras stand within plus or minus this
_QUADRANT_INNER = 0.55  # quadrant views keep this share of the reach away from the axes
_LOOK_AT = (0.0, 0.0, 3.2)  # amid the objects
_SCENE_JITTER = 0.2  # of the point looked at, the same for all views of a scene
_VIEW_JITTER = (0.6, 0.35, 0.1)  # of the point looked at, for every view
_ROLL = 0.05  # radians
_NUMBERS = 256  # uniform numbers drawn for a scene; more than it uses


class Scenes(NamedTuple):
    """Geometry, light and surfaces of S scenes.

    Attributes:
        room: (S, 2, 3) corners of smallest and largest x, y, z.
        sphere_centre: (S, 3, 3).
        sphere_radius: (S, 3).
        box_centre: (S, 2, 3).
        box_half: (S, 2, 3) half the edge lengths along the box's own axes.
        box_yaw: (S, 2) turn about the vertical in radians, from z towards x.
        light: (S, 3) place of the point light.
        tile: (S, 11) int64 texture of each surface.
        mix: (S, 11) share of the texture in the colour.
        base: (S, 11, 3) plain colour of the rest.
        tiles_per_unit: (S, 11) texture scale of walls and boxes; a sphere bears two tiles around.
        turn: (S, 11) angle of the texture on walls and boxes in radians.
        shift: (S, 11, 2) place of the texture in tiles.
    """

    room: Tensor
    sphere_centre: Tensor
    sphere_radius: Tensor
    box_centre: Tensor
    box_half: Tensor
    box_yaw: Tensor
    light: Tensor
    tile: Tensor
    mix: Tensor
    base: Tensor
    tiles_per_unit: Tensor
    turn: Tensor
    shift: Tensor

    def scene(self, position: int) -> Scenes:
        """One scene, without the leading S."""
        return Scenes(*(field[position] for field in self))


class _Draws:
    """Uniform numbers of several scenes, handed out in order."""

    def __init__(self, seed: int, split: Split, scenes: Sequence[int]) -> None:
        generators = (keyed_generator(seed, SPLIT_KEYS[split], scene) for scene in scenes)
        rows = [torch.rand(_NUMBERS, generator=generator) for generator in generators]
        self._numbers = torch.stack(rows)  # (S, 256)
        self._used = 0

    def uniform(
        self, low: float | Sequence[float], high: float | Sequence[float], *shape: int
    ) -> Tensor:
        """Numbers (S, *shape) between bounds that broadcast against the last dimension."""
        start, self._used = self._used, self._used + math.prod(shape)
        if self._used > _NUMBERS:
            raise IndexError(f"a scene takes more than {_NUMBERS} numbers: raise _NUMBERS")
        numbers = self._numbers[:, start : self._used].reshape(-1, *shape)
        bottom, top = torch.tensor(low), torch.tensor(high)
        return bottom + (top - bottom) * numbers


def sample_scenes(seed: int, split: Split, scenes: Sequence[int]) -> tuple[Scenes, Tensor]:
    """Draw scenes and their cameras; each depends on its own number only.

    Args:
        seed: seed of the whole data set.
        split: "train" or "test".
        scenes: numbers of the S scenes.

    Returns:
        The scenes, and the poses (S, 14, 4, 4), camera to world. Views 0-7 stand in the quadrants
        of the camera rectangle, two in each; views 8-13 anywhere in it.
    """
    draws = _Draws(seed, split, scenes)
    poses = _draw_poses(draws)
    wall_tiles = draws.uniform(*_WALL_TILES, 6)
    object_tiles = draws.uniform(*_OBJECT_TILES, SPHERES + BOXES)
    drawn = Scenes(
        room=torch.stack((draws.uniform(*_ROOM_LOW, 3), draws.uniform(*_ROOM_HIGH, 3)), dim=1),
        sphere_centre=draws.uniform(*_OBJECT, SPHERES, 3),
        sphere_radius=draws.uniform(*_RADIUS, SPHERES),
        box_centre=draws.uniform(*_OBJECT, BOXES, 3),
        box_half=draws.uniform(*_HALF_SIZE, BOXES, 3),
        box_yaw=draws.uniform(0, math.pi / 2, BOXES),
        light=draws.uniform(*_LIGHT, 3),
        tile=draws.uniform(0, TILES, SURFACES).long().clamp(max=TILES - 1),
        mix=draws.uniform(*_MIX, SURFACES),
        base=draws.uniform(0.1, 0.95, SURFACES, 3),
        tiles_per_unit=torch.cat((wall_tiles, object_tiles), dim=1),  # (S, 11)
        turn=draws.uniform(0, 2 * math.pi, SURFACES),
        shift=draws.uniform(0, 2, SURFACES, 2),
    )
    return drawn, poses


def _draw_poses(draws: _Draws) -> Tensor:
    """Poses (S, 14, 4, 4) of a scene's cameras."""
    reach = torch.tensor(_CAMERA_REACH)
    side = torch.tensor([-1.0, 1.0])
    quadrants = torch.cartesian_prod(side, side).repeat_interleave(2, dim=0)  # (8, 2)
    spread = draws.uniform(_QUADRANT_INNER, 1, QUADRANT_VIEWS, 2) * quadrants  # (S, 8, 2)
    depth = draws.uniform(-1, 1, QUADRANT_VIEWS, 1)  # (S, 8, 1)
    outer = torch.cat((spread, depth), dim=2)  # (S, 8, 3)
    inner = draws.uniform(-1, 1, VIEWS - QUADRANT_VIEWS, 3)  # (S, 6, 3)
    eye = torch.cat((outer, inner), dim=1) * reach  # (S, 14, 3)
    looked_at = torch.tensor(_LOOK_AT) + draws.uniform(-_SCENE_JITTER, _SCENE_JITTER, 1, 3)
    jitter = torch.tensor(_VIEW_JITTER) * draws.uniform(-1, 1, VIEWS, 3)
    roll = draws.uniform(-_ROLL, _ROLL, VIEWS)
    return look_at(eye, looked_at + jitter, roll)


def look_at(eye: Tensor, target: Tensor, roll: Tensor) -> Tensor:
    """Pose of a camera that looks at a point, its picture upright but for the roll.

    Args:
        eye: (..., 3) place of the camera.
        target: (..., 3) point that falls on the principal point.
        roll: (...) turn about the viewing direction in radians, clockwise.

    Returns:
        (..., 4, 4) camera to world, OpenCV axes.
    """
    forward = torch.nn.functional.normalize(target - eye, dim=-1)
    vertical = torch.tensor([0.0, 1.0, 0.0]).expand_as(forward)
    right = torch.nn.functional.normalize(torch.linalg.cross(vertical, forward), dim=-1)
    down = torch.linalg.cross(forward, right)
    cosine, sine = torch.cos(roll).unsqueeze(-1), torch.sin(roll).unsqueeze(-1)
    axes = (cosine * right + sine * down, cosine * down - sine * right, forward, eye)
    top = torch.stack(axes, dim=-1)  # (..., 3, 4)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(*top.shape[:-2], 1, 4)
    return torch.cat((top, bottom), dim=-2)
