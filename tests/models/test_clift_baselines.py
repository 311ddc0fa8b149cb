"""Baselines without learning: nearest view, mean of the views, nearest view warped by a plane."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.clift.baselines import copy_nearest, mean_context, nearest_context, warp_plane

SIZE = 48
INTRINSICS = torch.tensor([40.0, 44.0, 23.0, 25.0])


def _pose(x: float, y: float, z: float, yaw: float = 0.0) -> Tensor:
    pose = torch.eye(4)
    cosine, sine = math.cos(yaw), math.sin(yaw)
    pose[0, 0], pose[0, 2], pose[2, 0], pose[2, 2] = cosine, sine, -sine, cosine
    pose[:3, 3] = torch.tensor([x, y, z])
    return pose


def _pattern(x: Tensor, y: Tensor) -> Tensor:
    """A smooth picture (3, ...) on a plane."""
    waves = (torch.sin(2 * x) * torch.cos(y), torch.cos(3 * x + y), torch.sin(x - 2 * y))
    return torch.stack(waves) * 0.4 + 0.5


def _see_plane(pose: Tensor, intrinsics: Tensor, depth: float) -> Tensor:
    """Exact picture (3, H, W) of the pattern on the world's plane z = depth."""
    fx, fy, cx, cy = intrinsics
    rows, columns = torch.meshgrid(
        torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij"
    )
    rays = torch.stack(((columns - cx) / fx, (rows - cy) / fy, torch.ones_like(rows)))
    rays = torch.einsum("ij,jhw->ihw", pose[:3, :3], rays)
    points = pose[:3, 3, None, None] + (depth - pose[2, 3]) / rays[2] * rays
    return _pattern(points[0], points[1])


def _scene(depth: float = 3.0, scale: float = 1.0) -> dict[str, Tensor]:
    """Two context views, one of them turned, and a target that faces the plane."""
    context = torch.stack([_pose(0.3, 0.1, -0.2, yaw=0.15), _pose(2.0, 0.0, 0.0)])
    target = torch.stack([_pose(0.0, 0.0, 0.0), _pose(0.1, -0.2, 0.1)])
    intrinsics = torch.stack([INTRINSICS, INTRINSICS + 3])
    scaled = torch.ones(4, 4)
    scaled[:3, 3] = scale
    return {
        "context_images": torch.stack(
            [_see_plane(p, k, depth) for p, k in zip(context, intrinsics, strict=True)]
        )[None],
        "context_poses": context[None] * scaled,
        "context_intrinsics": intrinsics[None],
        "target_poses": target[None] * scaled,
        "target_intrinsics": INTRINSICS.expand(1, 2, 4),
    }


def _truth(depth: float = 3.0) -> Tensor:
    poses = _scene()["target_poses"][0]
    return torch.stack([_see_plane(pose, INTRINSICS, depth) for pose in poses])[None]


def _psnr(image: Tensor, truth: Tensor) -> float:
    inner = (image - truth)[..., 10:-10, 10:-10]  # what the context view sees too
    return float(-10 * torch.log10(inner.square().mean()))


def test_the_nearest_context_is_the_one_whose_centre_is_nearest() -> None:
    context = torch.stack([_pose(0, 0, 0), _pose(0, 0, 2, yaw=3), _pose(0, 5, 0)])[None]
    target = torch.stack([_pose(0, 0, 1.2), _pose(0, 3, 0), _pose(0, 0, 0.9)])[None]
    assert nearest_context(context, target).tolist() == [[1, 2, 0]]


def test_padded_views_are_never_used() -> None:
    images = torch.rand(1, 3, 3, 4, 4)
    poses = torch.stack([_pose(0, 0, 1), _pose(0, 0, 2), torch.zeros(4, 4)])[None]
    target = torch.stack([_pose(0, 0, 0)])[None]
    valid = torch.tensor([[True, True, False]])
    intrinsics = INTRINSICS.expand(1, 3, 4) * torch.tensor([1.0, 1.0, 0.0])[None, :, None]
    assert torch.equal(copy_nearest(images, poses, target, valid)[:, 0], images[:, 0])
    assert torch.allclose(mean_context(images, 2, valid)[:, 1], images[:, :2].mean(1))
    warped = warp_plane(images, poses, intrinsics, target, INTRINSICS[None, None], 3.0, valid)
    assert warped.isfinite().all()


def test_the_mean_is_that_of_all_views_for_every_target() -> None:
    images = torch.rand(2, 3, 3, 4, 4)
    mean = mean_context(images, 5)
    assert mean.shape == (2, 5, 3, 4, 4)
    assert torch.allclose(mean, images.mean(1, keepdim=True).expand_as(mean))


def test_a_plane_is_warped_exactly_at_its_depth_and_worse_at_others() -> None:
    scene, truth = _scene(), _truth()
    # The second target stands 0.1 closer to the plane.
    exact = torch.cat(
        [warp_plane(**scene, depth=depth)[:, n : n + 1] for n, depth in ((0, 3.0), (1, 2.9))], 1
    )
    assert _psnr(exact, truth) > 45
    assert _psnr(warp_plane(**scene, depth=4.5), truth) < 30
    copied = copy_nearest(scene["context_images"], scene["context_poses"], scene["target_poses"])
    assert _psnr(copied, truth) < 20


def test_a_view_warped_to_its_own_camera_is_itself_at_any_depth() -> None:
    scene = _scene()
    scene["target_poses"] = scene["context_poses"]
    scene["target_intrinsics"] = scene["context_intrinsics"]
    for depth in (0.5, 30.0):
        assert torch.allclose(warp_plane(**scene, depth=depth), scene["context_images"], atol=1e-4)


def test_the_unit_of_length_does_not_matter() -> None:
    in_metres = warp_plane(**_scene(), depth=3.0)
    assert torch.allclose(warp_plane(**_scene(scale=0.2), depth=0.6), in_metres, atol=1e-4)


def test_every_scene_may_have_a_depth_of_its_own() -> None:
    scene = {name: field.repeat_interleave(2, 0) for name, field in _scene().items()}
    both = warp_plane(**scene, depth=torch.tensor([3.0, 5.0]))
    for number, depth in enumerate((3.0, 5.0)):
        assert torch.allclose(both[number], warp_plane(**_scene(), depth=depth)[0], atol=1e-6)


@pytest.mark.parametrize("depth", [0.0, -1.0, math.nan])
def test_a_depth_that_is_not_positive_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match="must be > 0"):
        warp_plane(**_scene(), depth=depth)
