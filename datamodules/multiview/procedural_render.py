"""Pictures and depths of procedural scenes by ray casting: texture, diffuse and specular light.

A colour is albedo * (0.45 + 0.6 max(n.l, 0)) + 0.15 max(n.h, 0)**24 with the surface's normal n,
the direction l to the point light and the half vector h (Blinn's form of Phong's highlight);
there are no shadows. A picture's pixel is the mean of 2 x 2 samples.

Shape letters: S scenes, V views, R rays of a view, P = V R points, T texels along a tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.multiview.procedural_rays import Hits, Rays, camera_rays, cast_rays
from datamodules.multiview.procedural_scene import FOCAL_SHARE, Scenes
from datamodules.multiview.procedural_surfaces import (
    Surfaces,
    surface_colours,
    surface_frames,
    tabulate_surfaces,
)

AMBIENT, DIFFUSE, SPECULAR = 0.45, 0.6, 0.15
SAMPLES = 2  # points along a pixel's side

_RAYS_AT_ONCE = 1 << 16  # keeps the working set of a pass near a core's cache


def render_views(
    scenes: Scenes, poses: Tensor, atlas: Tensor, image_size: int, samples: int = SAMPLES
) -> Tensor:
    """Render views of scenes; a scene's pictures do not depend on the others in the batch.

    Args:
        scenes: S scenes.
        poses: (S, V, 4, 4) camera to world, inside the rooms.
        atlas: (3, 256, T, T) textures.
        image_size: pixels along a side of the square pictures.
        samples: points along a pixel's side that are averaged.

    Returns:
        (S, V, 3, image_size, image_size) in [0, 1].
    """
    at_once = max(_RAYS_AT_ONCE // (image_size * samples) ** 2, 1)
    side = image_size * samples
    pictures = []
    for number, views in enumerate(poses):
        scene = scenes.scene(number)
        surfaces = tabulate_surfaces(scene)
        for group in views.split(at_once):
            rays = camera_rays(group, image_size, samples)
            colour = _shade(surfaces, scene.light, rays, cast_rays(scene, rays), atlas)
            fine = colour.reshape(3, -1, side, side)  # (3, V, H * samples, W * samples)
            pictures.append(F.avg_pool2d(fine, samples).transpose(0, 1))  # (V, 3, H, W)
    return torch.cat(pictures).reshape(*poses.shape[:2], 3, image_size, image_size)


def render_depths(scenes: Scenes, poses: Tensor, image_size: int) -> Tensor:
    """Exact depths at the pixels' centres, along the cameras' z axes.

    Args:
        scenes: S scenes.
        poses: (S, V, 4, 4) camera to world, inside the rooms.
        image_size: pixels along a side.

    Returns:
        (S, V, image_size, image_size) in scene units.
    """
    depths = [
        cast_rays(scenes.scene(number), camera_rays(views, image_size)).depth
        for number, views in enumerate(poses)
    ]
    return torch.stack(depths).reshape(*poses.shape[:2], image_size, image_size)


def pixel_intrinsics(image_size: int) -> Tensor:
    """Intrinsics (4,) of every camera: fx, fy, cx, cy in pixels."""
    return torch.tensor([FOCAL_SHARE, FOCAL_SHARE, 0.5, 0.5]) * image_size


def _shade(surfaces: Surfaces, light: Tensor, rays: Rays, hits: Hits, atlas: Tensor) -> Tensor:
    """Colours (3, V, R) in [0, 1] of what the rays meet."""
    row = hits.row.flatten()
    point = (rays.origin + hits.depth * rays.direction).flatten(1)  # (3, P)
    normal, place = surface_frames(surfaces, point, row)
    colour = surface_colours(surfaces, atlas, place, row)
    to_light = light[:, None] - point
    to_light /= to_light.square().sum(0).sqrt()
    to_eye = -rays.direction.flatten(1)
    to_eye /= to_eye.square().sum(0).sqrt()
    facing = (normal * to_light).sum(0)
    # The half vector's length follows from the angle between the two unit vectors.
    half_length = (2 + 2 * (to_light * to_eye).sum(0)).clamp(min=1e-6).sqrt()
    mirrored = ((facing + (normal * to_eye).sum(0)) / half_length).clamp(min=0)
    highlight = (_power24(mirrored)).masked_fill(facing <= 0, 0)
    colour *= AMBIENT + DIFFUSE * facing.clamp(min=0)
    lit = colour.add_(highlight, alpha=SPECULAR).clamp_(0, 1)
    return lit.reshape(3, *hits.depth.shape)


def _power24(values: Tensor) -> Tensor:
    """24th power by products, several times as fast as ``pow``."""
    eighth = values.square().square().square()
    return eighth * eighth.square()
