"""Rays against a camera model written in float64, with and without lens distortion."""

import pytest
import torch
from torch import Tensor

from models.clift.rays import plucker_rays, token_rays, view_directions
from tests.models.clift_networks import random_poses

INTRINSICS = torch.tensor([41.0, 43.0, 24.5, 15.0])
LENSES = {
    "barrel": (-0.28, 0.07, 0.0, 0.0),
    "pincushion": (0.12, -0.01, 0.0, 0.0),
    "tangential": (0.03, -0.02, 0.004, -0.003),
}


def project(points: Tensor, intrinsics: Tensor, distortion: Tensor) -> Tensor:
    """OpenCV projection of camera-space points (..., 3) to pixels (..., 2)."""
    x, y = points[..., 0] / points[..., 2], points[..., 1] / points[..., 2]
    k1, k2, p1, p2 = distortion
    square = x**2 + y**2
    radial = 1 + k1 * square + k2 * square**2
    u = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x**2)
    v = y * radial + p1 * (square + 2 * y**2) + 2 * p2 * x * y
    fx, fy, cx, cy = intrinsics
    return torch.stack([fx * u + cx, fy * v + cy], dim=-1)


@pytest.mark.parametrize("lens", LENSES)
def test_distorted_rays_project_back_onto_their_pixels(lens: str) -> None:
    pose = random_poses(1, 1)[0, 0]
    distortion = torch.tensor(LENSES[lens])
    direction = plucker_rays(INTRINSICS, pose, 32, 48, distortion)[3:].double()
    in_camera = (pose[:3, :3].double().T @ direction.flatten(1)).T  # (H * W, 3)
    pixels = project(in_camera, INTRINSICS.double(), distortion.double()).view(32, 48, 2)
    rows, columns = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    assert (pixels - torch.stack([columns, rows], dim=-1)).abs().max() < 5e-5


def test_rays_pass_through_the_camera_centre_and_are_unit() -> None:
    pose = random_poses(2, 3)
    moment, direction = plucker_rays(INTRINSICS.expand(2, 3, 4), pose, 32, 48).split(3, dim=2)
    centre = pose[..., :3, 3, None, None].expand_as(direction)
    torch.testing.assert_close(torch.linalg.cross(centre, direction, dim=2), moment)
    torch.testing.assert_close(direction.norm(dim=2), torch.ones(2, 3, 32, 48))


def test_no_distortion_and_zero_distortion_are_the_same_pinhole() -> None:
    pose = random_poses(1, 2)
    intrinsics = INTRINSICS.expand(1, 2, 4)
    plain = plucker_rays(intrinsics, pose, 32, 48)
    assert torch.equal(plain, plucker_rays(intrinsics, pose, 32, 48, torch.zeros(1, 2, 4)))


def test_cameras_of_a_batch_keep_their_own_lens() -> None:
    pose = random_poses(1, 2)[0]
    lenses = torch.tensor([LENSES["barrel"], (0.0, 0.0, 0.0, 0.0)])
    together = plucker_rays(INTRINSICS.expand(2, 4), pose, 32, 48, lenses)
    torch.testing.assert_close(together[1], plucker_rays(INTRINSICS, pose[1], 32, 48))
    alone = plucker_rays(INTRINSICS, pose[0], 32, 48, lenses[0])
    torch.testing.assert_close(together[0], alone)


def test_padded_views_have_zero_rays() -> None:
    pose, intrinsics = random_poses(1, 2), INTRINSICS.repeat(1, 2, 1)
    pose[:, 1], intrinsics[:, 1] = 0, 0
    rays = plucker_rays(intrinsics, pose, 16, 16, torch.zeros(1, 2, 4))
    assert rays[:, 0].any()
    assert not rays[:, 1].any()
    lens = torch.tensor([LENSES["barrel"], (0.0,) * 4])[None]
    assert not plucker_rays(intrinsics, pose, 16, 16, lens)[:, 1].any()


def test_lens_that_folds_inside_the_picture_is_refused_in_one_line() -> None:
    fold = torch.tensor([-1.5, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"^distortion=\[\[-1\.5.*calibration") as error:
        plucker_rays(INTRINSICS, torch.eye(4), 32, 48, fold)
    assert "\n" not in str(error.value)


def test_token_rays_are_those_of_the_patch_centres() -> None:
    pose = random_poses(2, 3)
    intrinsics = INTRINSICS.expand(2, 3, 4)
    lens = torch.tensor(LENSES["tangential"]).expand(2, 3, 4)
    found = token_rays(intrinsics, pose, 32, 48, patch_size=8, distortion=lens)
    # A pixel centre of a picture of twice the size lies on each patch centre of an odd patch.
    doubled = plucker_rays(3 / 8 * intrinsics, pose, 12, 18, lens)[..., 1::3, 1::3]
    torch.testing.assert_close(found.rays, doubled.flatten(-2).mT, atol=2e-6, rtol=0)
    assert torch.equal(found.camera[1, 2, 5], pose[1, 2, :3, 3])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 112), (48, 80)])
def test_view_grid_is_centred_and_square_for_any_picture(height: int, width: int) -> None:
    intrinsics = torch.tensor([50.0, 50.0, width / 2, height / 2])
    grid = view_directions(intrinsics, torch.eye(4), height, width, stride=16, cells=6)
    grid = (grid / grid[..., 2:]).view(6, 6, 3)
    steps = (torch.arange(6) - 2.5) * 16 / 50
    torch.testing.assert_close(grid[..., 0], steps.expand(6, 6))
    torch.testing.assert_close(grid[..., 1], steps[:, None].expand(6, 6))
