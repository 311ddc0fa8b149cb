"""Exact intersections of camera rays with the room, spheres and boxes of a procedural scene.

A ray is origin + t * direction, where the direction has length 1 along the camera's z axis, so
that t is the depth as a camera measures it (the third coordinate in the camera's frame).

Shape letters: V views, R rays of a view, F rows of the surface table. Rays are kept as three
planes x, y, z, each contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.multiview.procedural_scene import BOXES, FOCAL_SHARE, SPHERES, Scenes

# Rows of the surface table: one for every plane side, so that a row has one normal.
WALL_ROWS = 6
SPHERE_ROW = WALL_ROWS
BOX_ROW = WALL_ROWS + SPHERES
ROWS = BOX_ROW + 6 * BOXES

_TINY = 1e-20  # added to directions: an exact zero would make 0 * inf of a ray along a plane


class Hits(NamedTuple):
    """Nearest surface along each ray.

    Attributes:
        depth: (V, R) depth along the camera's z axis, > 0.
        row: (V, R) int64 row of the surface table: 0-5 the walls, 6-8 the spheres, 9-14 and 15-20
            the sides -x, +x, -y, +y, -z, +z of the boxes.
    """

    depth: Tensor
    row: Tensor


class Rays(NamedTuple):
    """Rays of V views.

    Attributes:
        origin: (3, V, 1) camera centres.
        direction: (3, V, R), of length 1 along the camera's z axis.
    """

    origin: Tensor
    direction: Tensor


def camera_rays(poses: Tensor, image_size: int, samples: int = 1) -> Rays:
    """Rays through a regular grid of points in every pixel.

    Args:
        poses: (V, 4, 4) camera to world, OpenCV axes.
        image_size: pixels along a side; focal length 0.8 times that, principal point in the centre.
        samples: points along a pixel's side; 1 takes the pixel's centre.

    Returns:
        R = (image_size * samples)**2 rays in raster order.
    """
    count = image_size * samples
    place = ((torch.arange(count) + 0.5) / count - 0.5) / FOCAL_SHARE
    x, y = place.repeat(count), place.repeat_interleave(count)  # (R,), (R,)
    axes = poses[:, :3, :3].permute(1, 2, 0).unsqueeze(-1)  # (3 world, 3 camera, V, 1)
    direction = axes[:, 0] * x + axes[:, 1] * y + axes[:, 2]  # (3, V, R)
    return Rays(poses[:, :3, 3].T.unsqueeze(-1), direction)


def cast_rays(scene: Scenes, rays: Rays) -> Hits:
    """Find what every ray meets first.

    Args:
        scene: one scene, without leading S; its room contains the cameras, its objects do not.
        rays: from the cameras.
    """
    hits = _cast_room(scene.room, rays)
    for number in range(SPHERES):
        depth = _cast_sphere(scene.sphere_centre[number], scene.sphere_radius[number], rays)
        hits = _nearer(hits, depth, torch.tensor(SPHERE_ROW + number))
    for number in range(BOXES):
        centre, half = scene.box_centre[number], scene.box_half[number]
        depth, side = _cast_box(centre, half, scene.box_yaw[number], rays)
        hits = _nearer(hits, depth, side + (BOX_ROW + 6 * number))
    return hits


def yaw_axes(yaw: Tensor) -> Tensor:
    """Axes of a box turned about the vertical: (..., 3, 3), whose rows are its x, y and z axes."""
    cosine, sine, zero = torch.cos(yaw), torch.sin(yaw), torch.zeros_like(yaw)
    rows = (cosine, zero, -sine, zero, zero + 1, zero, sine, zero, cosine)
    return torch.stack(rows, dim=-1).reshape(*yaw.shape, 3, 3)


def _nearer(hits: Hits, depth: Tensor, row: Tensor) -> Hits:
    """Hits with an object in front; its depth is infinite where it is missed."""
    closer = depth < hits.depth
    return Hits(torch.where(closer, depth, hits.depth), torch.where(closer, row, hits.row))


def _cast_room(room: Tensor, rays: Rays) -> Hits:
    """Where rays that start in the room leave it; room is (2, 3)."""
    corner = room[:, :, None, None] - rays.origin  # (2, 3, V, 1)
    inverse = 1 / (rays.direction + _TINY)
    exits = torch.maximum(corner[0] * inverse, corner[1] * inverse)  # (3, V, R)
    negative_depth, side = _last_plane(-exits, rays.direction > 0)
    return Hits(-negative_depth, side)


def _cast_sphere(centre: Tensor, radius: Tensor, rays: Rays) -> Tensor:
    """Depth (V, R) of a sphere's near side, infinite where it is missed or behind."""
    offset = centre[:, None, None] - rays.origin  # (3, V, 1)
    squared = rays.direction.square().sum(0)  # (V, R)
    along = (offset * rays.direction).sum(0)
    discriminant = along.square() - squared * (offset.square().sum(0) - radius.square())
    depth = (along - discriminant.clamp(min=0).sqrt()) / squared
    return depth.masked_fill((discriminant < 0) | (depth <= 0), torch.inf)


def _cast_box(centre: Tensor, half: Tensor, yaw: Tensor, rays: Rays) -> tuple[Tensor, Tensor]:
    """Depth (V, R) of a box, infinite where it is missed, and the side (V, R) that is met."""
    axes = yaw_axes(yaw)[:, :, None, None]  # (3 axes, 3 coordinates, 1, 1)
    start = (axes * (rays.origin - centre[:, None, None])).sum(1)  # (3, V, 1) in the box's frame
    # By sums and not as a matrix product, which may run at a lower precision.
    step = axes[:, 0] * rays.direction[0] + axes[:, 1] * rays.direction[1]
    step += axes[:, 2] * rays.direction[2]  # (3, V, R)
    inverse = 1 / (step + _TINY)
    middle, reach = -start * inverse, half[:, None, None] * inverse.abs()
    entry, side = _last_plane(middle - reach, step < 0)
    leave = (middle + reach).amin(0)
    return entry.masked_fill_((entry >= leave) | (entry <= 0), torch.inf), side


def _last_plane(depth: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of the depths (3, V, R) along the axes, and its side: 2 axis + upper[axis]."""
    x, y, z = depth
    second, third = y > x, z > torch.maximum(x, y)
    side = torch.where(third, upper[2] + 4, torch.where(second, upper[1] + 2, upper[0] + 0))
    return torch.where(third, z, torch.maximum(x, y)), side
