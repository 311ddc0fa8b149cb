"""Pictures, depths and label maps of procedural rooms, with diffuse light and soft shadows.

A colour is albedo * (0.5 + 0.55 s max(n.l, 0)) with the surface's normal n, the direction l to the
lamp at the ceiling and the share s of the lamp that is seen, from a depth map taken by the lamp.
Light does not depend on the camera, so a point has one colour in all pictures.

Shape letters: H x W pixels, P pixels that see something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.paired_2d3d.room_solids import Camera, cast_rays, ray_places, surface_frames
from datamodules.paired_2d3d.room_textures import PhotoSet, build_atlas, look_up

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.room_layout import Room

FOCAL_SHARE = 0.62  # focal length over the picture's side: an angle of view of 78 degrees
AMBIENT, DIFFUSE, SHADOW = 0.5, 0.55, 0.55
BACKGROUND = (0.86, 0.89, 0.92)

_SHADOW_SIDE, _SHADOW_FOCAL = 160, 0.3  # pixels of the lamp's depth map, and its focal share
_SHADOW_BIAS = 0.04  # metres
_BORDER = 3  # pixels around the lamp's depth map
_BLUR = ((-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0), (1, 0), (-1, 1), (0, 1), (1, 1))


class Rendering(NamedTuple):
    """What one camera sees.

    Attributes:
        colour: (H, W, 3) uint8.
        depth: (H, W) float32, metres along the camera's z axis; 0 where nothing is.
        segment: (H, W) int64 classes; -1 where nothing is.
        instance: (H, W) int64 things; -1 where nothing is.
    """

    colour: NDArray[np.uint8]
    depth: NDArray[np.float32]
    segment: NDArray[np.int64]
    instance: NDArray[np.int64]


def room_camera(pose: NDArray[np.float64], image_size: int) -> Camera:
    """The camera at a pose (4, 4), with square pictures of ``image_size`` pixels a side."""
    focal, centre = FOCAL_SHARE * image_size, image_size / 2
    intrinsics = np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])
    return Camera(intrinsics, pose, image_size, image_size)


class RoomRenderer:
    """Renders one room from any camera."""

    def __init__(self, room: Room, photos: PhotoSet) -> None:
        """Look the materials up and take the lamp's depth map.

        Args:
            room: what to render.
            photos: the photographs that it was furnished from.
        """
        self._room = room
        self._atlas = build_atlas(photos)
        numbers = {material: row for row, material in enumerate(self._atlas.materials)}
        self._material = np.array([numbers[skin.material] for skin in room.skins])
        self._span = np.array([skin.span for skin in room.skins])
        self._shift = np.array([skin.shift for skin in room.skins])
        self._tint = np.array([skin.tint for skin in room.skins], dtype=np.float32)
        down = np.eye(4)
        down[:3, :3] = np.diag([1.0, -1.0, -1.0])
        down[:3, 3] = room.light
        focal, centre = _SHADOW_FOCAL * _SHADOW_SIDE, _SHADOW_SIDE / 2
        intrinsics = np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])
        self._lamp = Camera(intrinsics, down, _SHADOW_SIDE, _SHADOW_SIDE)
        depth = cast_rays(room.solids, self._lamp).depth
        depth[depth == 0] = np.inf
        self._lamp_depth = np.pad(depth, _BORDER, constant_values=np.inf).ravel()

    def render(self, camera: Camera) -> Rendering:
        """Render one view."""
        room = self._room
        hits = cast_rays(room.solids, camera)
        seen = hits.solid >= 0
        solid, depth = hits.solid[seen], hits.depth[seen].astype(np.float64)
        across, down = ray_places(camera)
        rays = np.ones((*seen.shape, 3))
        rays[..., 0], rays[..., 1] = across[None], down[:, None]
        ray = rays[seen] @ camera.pose[:3, :3].T  # (P, 3)
        points = camera.pose[:3, 3] + depth[:, None] * ray
        normal, place = surface_frames(room.solids, solid, points)
        slope = -np.einsum("pi,pi->p", normal, ray) / np.linalg.norm(ray, axis=1)
        footprint = depth / camera.intrinsics[0, 0] / np.sqrt(np.maximum(slope, 0.1))
        colour = np.tile(np.array(BACKGROUND, dtype=np.float32), (*seen.shape, 1))
        colour[seen] = self._albedo(solid, place, footprint) * self._light(points, normal)[:, None]
        return Rendering(
            np.rint(np.clip(colour, 0, 1) * 255).astype(np.uint8),
            hits.depth,
            np.where(seen, room.segment[hits.solid], -1),
            np.where(seen, room.instance[hits.solid], -1),
        )

    def _albedo(
        self, solid: NDArray[np.int64], place: NDArray[np.float64], footprint: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Colours (P, 3) without light, from places (P, 2) in metres across and up."""
        span = self._span[solid]
        tiled = place / span * (1, -1) + self._shift[solid]
        colour = look_up(self._atlas, self._material[solid], tiled, footprint / span[:, 1])
        return colour * self._tint[solid]

    def _light(
        self, points: NDArray[np.float64], normal: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        """Light (P,) that falls on points (P, 3) with normals (P, 3)."""
        to_lamp = self._room.light - points
        facing = np.einsum("pi,pi->p", normal, to_lamp) / np.linalg.norm(to_lamp, axis=1)
        lit = 1 - SHADOW * (1 - self._lamp_share(points))
        light: NDArray[np.float32] = (AMBIENT + DIFFUSE * lit * np.maximum(facing, 0)).astype("f4")
        return light

    def _lamp_share(self, points: NDArray[np.float64]) -> NDArray[np.float32]:
        """Share (P,) of nine neighbouring rays from the lamp that reach each point."""
        camera = self._lamp
        seen = (points - camera.pose[:3, 3]) @ camera.pose[:3, :3]
        place = (seen @ camera.intrinsics.T)[:, :2] / np.maximum(seen[:, 2:], 1e-3)
        # Rays past the lamp's depth map end in its border of two pixels, where nothing is met.
        column, row = np.clip(np.floor(place), -2, _SHADOW_SIDE + 1).astype(np.int64).T
        width = _SHADOW_SIDE + 2 * _BORDER
        cell = (row + _BORDER) * width + column + _BORDER
        depth = seen[:, 2].astype(np.float32) - np.float32(_SHADOW_BIAS)
        reached = np.zeros(len(points), dtype=np.float32)
        for right, below in _BLUR:
            reached += depth < self._lamp_depth[cell + (below * width + right)]
        return reached / np.float32(len(_BLUR))
