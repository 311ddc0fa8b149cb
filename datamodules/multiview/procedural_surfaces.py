"""Normals, texture coordinates and colours at the points where rays meet a procedural scene.

Shape letters: P points, F = 21 rows of the surface table (one for each plane side or sphere), T
texels along a tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.multiview.procedural_rays import SPHERE_ROW, yaw_axes
from datamodules.multiview.procedural_scene import BOXES, SPHERES, Scenes


class Surfaces(NamedTuple):
    """What shading needs of one scene's plane sides and spheres; rows last for quick lookup.

    Attributes:
        normal: (3, F) outward from boxes, inward from walls; zero for spheres.
        texture: (2, 4, F) affine maps from a point (x, y, z, 1) to texture coordinates in tiles;
            for spheres only the shift.
        plain: (3, F) the part of the colour that is no texture.
        mix: (F,) share of the texture.
        tile: (F,) int64.
        sphere_centre: (3 coordinates, 3 spheres).
        sphere_radius: (3,).
    """

    normal: Tensor
    texture: Tensor
    plain: Tensor
    mix: Tensor
    tile: Tensor
    sphere_centre: Tensor
    sphere_radius: Tensor


def tabulate_surfaces(scene: Scenes) -> Surfaces:
    """Lay the surfaces of one scene, without leading S, out in the rows that ``Hits`` names."""
    first_box = 6 + SPHERES
    boxes = torch.arange(first_box, first_box + BOXES).repeat_interleave(6)
    owner = torch.cat((torch.arange(first_box), boxes))  # (F,) surface of each row
    mix = scene.mix[owner]
    normal, across, down, centre = _plane_frames(scene)
    cosine, sine = torch.cos(scene.turn[owner, None]), torch.sin(scene.turn[owner, None])
    turned = torch.stack((cosine * across + sine * down, cosine * down - sine * across))
    scaled = turned * scene.tiles_per_unit[owner, None]  # (2, F, 3)
    shift = scene.shift[owner].T - (scaled * centre).sum(-1)  # (2, F)
    return Surfaces(
        normal=normal.T.contiguous(),
        texture=torch.cat((scaled.transpose(1, 2), shift.unsqueeze(1)), dim=1).contiguous(),
        plain=((1 - mix)[:, None] * scene.base[owner]).T.contiguous(),
        mix=mix,
        tile=scene.tile[owner],
        sphere_centre=scene.sphere_centre.T.contiguous(),
        sphere_radius=scene.sphere_radius,
    )


def _plane_frames(scene: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normal, two tangents and a fixed point of every row, (F, 3) each; zero for spheres."""
    axes = torch.cat((torch.eye(3)[None], yaw_axes(scene.box_yaw)))  # (3 solids, 3 axes, 3)
    normal = axes.unsqueeze(2) * torch.tensor([[-1.0], [1.0]])  # (3, 3, 2 sides, 3)
    normal[0] *= -1  # the room is seen from within
    centre = torch.cat((torch.zeros(1, 3), scene.box_centre))[:, None, None]  # (3, 1, 1, 3)
    tangents = (axes.roll(-1, dims=1).unsqueeze(2), axes.roll(-2, dims=1).unsqueeze(2))
    fields = (field.expand(3, 3, 2, 3).flatten(0, 2) for field in (normal, *tangents, centre))
    rows = [
        torch.cat((field[:SPHERE_ROW], torch.zeros(SPHERES, 3), field[SPHERE_ROW:]))
        for field in fields
    ]
    return rows[0], rows[1], rows[2], rows[3]


def surface_frames(surfaces: Surfaces, point: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Normals and texture coordinates of points on surfaces.

    Args:
        surfaces: of one scene.
        point: (3, P) places.
        row: (P,) rows of the surface table.

    Returns:
        (3, P) unit normals and (2, P) texture coordinates in tiles. On a sphere these are
        longitude and latitude over pi.
    """
    normal = surfaces.normal.index_select(1, row)
    maps = surfaces.texture.flatten(0, 1).index_select(1, row).reshape(2, 4, -1)
    place = maps[:, 3]
    for axis in range(3):
        place = place.addcmul(maps[:, axis], point[axis])
    on_sphere = ((row >= SPHERE_ROW) & (row < SPHERE_ROW + SPHERES)).nonzero().squeeze(1)
    number = row[on_sphere] - SPHERE_ROW
    outward = point[:, on_sphere] - surfaces.sphere_centre[:, number]
    outward = outward / surfaces.sphere_radius[number]
    angles = (torch.atan2(outward[0], -outward[2]), torch.asin(outward[1].clamp(-1, 1)))
    normal[:, on_sphere] = outward
    place[:, on_sphere] += torch.stack(angles) / math.pi
    return normal, place


def look_up_texture(atlas: Tensor, tile: Tensor, place: Tensor) -> Tensor:
    """Read a tile repeated by reflection, interpolating bilinearly.

    Args:
        atlas: (3, tiles, T, T).
        tile: (P,) int64.
        place: (2, P) coordinates across and down in tiles.

    Returns:
        (3, P) colours.
    """
    texels = atlas.shape[-1]
    folded = place - 2 * torch.floor(place / 2 + 0.5)  # -1 .. 1, the period of the reflection
    inner = (folded.abs() * texels - 0.5).clamp(0, texels - 1)
    corner = inner.floor().clamp(max=texels - 2)
    across, down = inner - corner
    column, line = corner.long()
    first = (tile * texels + line) * texels + column
    planes = atlas.flatten(1)  # (3, tiles * T * T)
    lines = []
    for left in (first, first + texels):
        start, end = planes.index_select(1, left), planes.index_select(1, left + 1)
        lines.append(torch.lerp(start, end, across))
    return torch.lerp(lines[0], lines[1], down)


def surface_colours(surfaces: Surfaces, atlas: Tensor, place: Tensor, row: Tensor) -> Tensor:
    """Colours (3, P) of surfaces before lighting, from texture coordinates (2, P)."""
    texture = look_up_texture(atlas, surfaces.tile.index_select(0, row), place)
    return surfaces.plain.index_select(1, row).addcmul_(surfaces.mix.index_select(0, row), texture)
