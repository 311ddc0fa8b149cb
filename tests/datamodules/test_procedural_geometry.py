"""Procedural scenes: rays, depths and normals against closed forms, and views on each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.multiview.procedural_rays import Hits, Rays, camera_rays, cast_rays, yaw_axes
from datamodules.multiview.procedural_render import (
    pixel_intrinsics,
    render_depths,
    render_views,
)
from datamodules.multiview.procedural_scene import Scenes, look_at, sample_scenes
from datamodules.multiview.procedural_surfaces import surface_frames, tabulate_surfaces
from datamodules.multiview.procedural_textures import build_atlas

FAR = 100.0  # outside the room, where no ray arrives


@pytest.fixture(scope="module")
def drawn() -> tuple[Scenes, Tensor]:
    return sample_scenes(0, "test", range(4))


def _empty_room() -> Scenes:
    """A room of x -2 .. 2, y -1 .. 1, z -2 .. 5 with its objects out of sight."""
    scene = sample_scenes(0, "train", [0])[0].scene(0)
    return scene._replace(
        room=torch.tensor([[-2.0, -1.0, -2.0], [2.0, 1.0, 5.0]]),
        sphere_centre=torch.full((3, 3), FAR),
        box_centre=torch.full((2, 3), FAR),
    )


def _ray(origin: list[float], direction: list[float]) -> Rays:
    return Rays(torch.tensor(origin).reshape(3, 1, 1), torch.tensor(direction).reshape(3, 1, 1))


@pytest.mark.parametrize(
    ("direction", "depth", "row"),
    [
        ([0.0, 0.0, 1.0], 5.0, 5),
        ([1.0, 0.0, 1.0], 2.0, 1),
        ([-1.0, 0.0, 1.0], 2.0, 0),
        ([0.0, 0.5, 1.0], 2.0, 3),
        ([0.0, -0.25, 1.0], 4.0, 2),
        ([0.0, 0.0, -1.0], 2.0, 4),
    ],
)
def test_walls_are_met_at_their_distance(direction: list[float], depth: float, row: int) -> None:
    hits = cast_rays(_empty_room(), _ray([0.0, 0.0, 0.0], direction))
    assert hits.depth.item() == pytest.approx(depth)
    assert hits.row.item() == row


def test_a_sphere_is_met_where_the_closed_form_says() -> None:
    scene = _empty_room()
    scene.sphere_centre[1] = torch.tensor([0.3, 0.0, 3.0])
    scene.sphere_radius[1] = 0.5
    hits = cast_rays(scene, _ray([0.0, 0.0, 0.0], [0.0, 0.0, 1.0]))
    assert hits.depth.item() == pytest.approx(3 - math.sqrt(0.5**2 - 0.3**2))
    assert hits.row.item() == 7


@pytest.mark.parametrize(("yaw", "depth"), [(0.0, 2.6), (math.pi / 4, 3 - 0.4 * math.sqrt(2))])
def test_a_turned_box_is_met_at_its_side_or_edge(yaw: float, depth: float) -> None:
    scene = _empty_room()
    scene.box_centre[0] = torch.tensor([0.0, 0.0, 3.0])
    scene.box_half[0] = 0.4
    scene.box_yaw[0] = yaw
    hits = cast_rays(scene, _ray([1e-4, 0.0, 0.0], [0.0, 0.0, 1.0]))
    assert hits.depth.item() == pytest.approx(depth, abs=2e-4)
    assert 9 <= hits.row.item() < 15


def test_objects_behind_the_camera_are_not_seen() -> None:
    scene = _empty_room()
    scene.sphere_centre[0] = torch.tensor([0.0, 0.0, -1.2])
    scene.box_centre[0] = torch.tensor([0.0, 0.0, -1.2])
    hits = cast_rays(scene, _ray([0.0, 0.0, 0.0], [0.0, 0.0, 1.0]))
    assert (hits.depth.item(), hits.row.item()) == (5.0, 5)


def _cast(drawn: tuple[Scenes, Tensor], number: int) -> tuple[Scenes, Rays, Hits, Tensor]:
    scenes, poses = drawn
    scene, rays = scenes.scene(number), camera_rays(poses[number], 48)
    hits = cast_rays(scene, rays)
    return scene, rays, hits, rays.origin + hits.depth * rays.direction


def _inside(scene: Scenes, points: Tensor) -> Tensor:
    """Signed measure of points (3, ...): below 0 within an object or beyond a wall."""
    spread = (3,) + (1,) * (points.ndim - 1)
    low, high = (corner.reshape(spread) for corner in scene.room)
    measures = [(points - low).amin(0), (high - points).amin(0)]
    for centre, radius in zip(scene.sphere_centre, scene.sphere_radius, strict=True):
        measures.append((points - centre.reshape(spread)).norm(dim=0) - radius)
    for centre, half, yaw in zip(scene.box_centre, scene.box_half, scene.box_yaw, strict=True):
        local = torch.einsum("ac,c...->a...", yaw_axes(yaw), points - centre.reshape(spread))
        measures.append((local.abs() - half.reshape(spread)).amax(0))
    return torch.stack(measures).amin(0)


@pytest.mark.parametrize("number", range(4))
def test_every_hit_lies_on_a_surface_and_nothing_lies_before_it(
    drawn: tuple[Scenes, Tensor], number: int
) -> None:
    scene, rays, hits, points = _cast(drawn, number)
    assert _inside(scene, points).abs().max() < 2e-5
    for share in torch.linspace(0.02, 0.98, 33):
        assert _inside(scene, rays.origin + share * hits.depth * rays.direction).min() > -1e-5
    assert hits.row.unique().numel() > 6  # walls and objects are in sight


@pytest.mark.parametrize("number", range(4))
def test_normals_face_the_camera_and_are_perpendicular_to_the_surface(
    drawn: tuple[Scenes, Tensor], number: int
) -> None:
    scene, rays, hits, points = _cast(drawn, number)
    flat, row = points.flatten(1), hits.row.flatten()
    normal, _ = surface_frames(tabulate_surfaces(scene), flat, row)
    assert torch.allclose(normal.norm(dim=0), torch.ones_like(normal[0]), atol=1e-4)
    assert (normal * rays.direction.flatten(1)).sum(0).max() < 1e-3
    # Steps from a pixel to the next on the same plane lie in the surface.
    step, plane = flat[:, 1:] - flat[:, :-1], (row < 6) | (row > 8)
    same = (row[1:] == row[:-1]) & plane[1:]
    assert (step * normal[:, 1:]).sum(0)[same].abs().max() < 1e-4
    on_sphere = (row >= 6) & (row <= 8)
    centre = scene.sphere_centre[row[on_sphere] - 6].T
    outward = F.normalize(flat[:, on_sphere] - centre, dim=0)
    assert torch.allclose(normal[:, on_sphere], outward, atol=1e-4)


def test_rays_pass_through_the_pixels_that_the_intrinsics_name(
    drawn: tuple[Scenes, Tensor],
) -> None:
    pose = drawn[1][0, :1]
    rays = camera_rays(pose, 16)
    points = (rays.origin + 2.5 * rays.direction)[:, 0]  # (3, 256)
    local = pose[0, :3, :3].T @ (points - pose[0, :3, 3:])
    fx, fy, cx, cy = pixel_intrinsics(16)
    rows, columns = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    assert torch.allclose(local[2], torch.full((256,), 2.5), atol=1e-5)
    assert torch.allclose(fx * local[0] / 2.5 + cx, columns.flatten(), atol=1e-4)
    assert torch.allclose(fy * local[1] / 2.5 + cy, rows.flatten(), atol=1e-4)


def test_looking_at_a_point_puts_it_into_the_centre_upright() -> None:
    eye, target = torch.tensor([1.0, -0.5, 0.2]), torch.tensor([0.3, 0.1, 3.0])
    pose = look_at(eye, target, torch.tensor(0.0))
    local = torch.linalg.inv(pose) @ torch.cat((target, torch.ones(1)))
    assert torch.allclose(local[:2], torch.zeros(2), atol=1e-6)
    assert local[2] > 0
    assert pose[:3, 0] @ torch.tensor([0.0, 1.0, 0.0]) == pytest.approx(0)
    assert pose[1, 1] > 0.9  # down in the picture is down in the world
    assert torch.allclose(pose[:3, :3].T @ pose[:3, :3], torch.eye(3), atol=1e-6)
    assert torch.linalg.det(pose[:3, :3]) == pytest.approx(1)


def _reproject(points: Tensor, pose: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pixels (N, 2) and depths (N,) of world points (3, N)."""
    local = pose[:3, :3].T @ (points - pose[:3, 3:])
    fx, fy, cx, cy = pixel_intrinsics(size)
    return torch.stack((fx * local[0] / local[2] + cx, fy * local[1] / local[2] + cy), 1), local[2]


@pytest.mark.parametrize("views", [(0, 2), (8, 4), (6, 1)])
def test_two_views_agree_where_both_see_the_same_point(
    drawn: tuple[Scenes, Tensor], views: tuple[int, int]
) -> None:
    size, (scenes, poses) = 96, drawn
    chosen = poses[:, list(views)]
    pictures = render_views(scenes, chosen, build_atlas("test", 0, 32), size)
    depths = render_depths(scenes, chosen, size)
    for number in range(len(poses)):
        rays = camera_rays(chosen[number, :1], size)
        points = (rays.origin + depths[number, 0].flatten() * rays.direction)[:, 0]  # (3, P)
        pixel, depth = _reproject(points, chosen[number, 1], size)
        grid = (pixel / size * 2 - 1)[None, None]  # (1, 1, P, 2)
        seen = F.grid_sample(depths[number, 1][None, None], grid, align_corners=False)[0, 0, 0]
        both = (grid[0, 0].abs() < 0.97).all(1) & ((seen - depth).abs() < 0.01) & (depth > 0)
        colour = F.grid_sample(pictures[number, 1:2], grid, align_corners=False)[0, :, 0, both]
        error = (colour - pictures[number, 0].flatten(1)[:, both]).square().mean()
        assert both.float().mean() > 0.2
        assert -10 * torch.log10(error) > 28
