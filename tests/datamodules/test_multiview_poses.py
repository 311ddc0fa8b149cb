"""Normalised worlds, mirrored cameras and camera paths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from datamodules.multiview.poses import (
    interpolate_poses,
    mirror_poses,
    move_poses,
    normalise_poses,
    quaternions,
    rotation_matrices,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "clift"


def rotations(count: int) -> NDArray[np.float64]:
    return rotation_matrices(np.random.default_rng(0).standard_normal((count, 4)))


@pytest.mark.parametrize(
    "case", ["pose_norm_re10k_small_rot", "pose_norm_re10k_large_rot", "pose_norm_dl3dv"]
)
def test_normalised_poses_equal_the_released_codes(case: str) -> None:
    rule = json.loads((GOLDENS / f"{case}.json").read_text())["config"]["rule"]
    tensors = load_file(GOLDENS / f"{case}.safetensors")
    context, target = (tensors[f"{name}_c2w"].astype(np.float64) for name in ("context", "target"))
    normalised = normalise_poses(context, target, rule)
    for name, poses in zip(("context", "target"), normalised[:2], strict=True):
        np.testing.assert_allclose(poses, tensors[f"{name}_c2w_norm"], atol=1e-5, rtol=0)
    if rule == "re10k":
        expected = tensors["context_quaternions"]
        np.testing.assert_allclose(quaternions(context[:, :3, :3]), expected, atol=1e-5, rtol=0)


def test_quaternions_turn_back_into_their_rotations() -> None:
    turns = np.concatenate([rotations(50), np.diag([1.0, -1, -1])[None], np.eye(3)[None]])
    np.testing.assert_allclose(rotation_matrices(quaternions(turns)), turns, atol=1e-12)


@pytest.mark.parametrize("rule", ["re10k", "dl3dv"])
def test_normalised_worlds_do_not_depend_on_the_world_given(rule: str) -> None:
    poses = np.tile(np.eye(4), (7, 1, 1))
    small = np.random.default_rng(1).standard_normal((7, 4)) * 0.2 + np.array([1, 0, 0, 0])
    poses[:, :3, :3] = rotation_matrices(small)
    poses[:, :3, 3] = np.random.default_rng(2).standard_normal((7, 3))
    other = np.eye(4)
    other[:3, :3], other[:3, 3] = rotations(1)[0], (3, 4, 5)
    moved = other @ poses
    moved[:, :3, 3] *= 9
    for one, two in zip(
        normalise_poses(poses[:4], poses[4:], rule)[:2],  # type: ignore[arg-type]
        normalise_poses(moved[:4], moved[4:], rule)[:2],  # type: ignore[arg-type]
        strict=True,
    ):
        # The mean of quaternions turns with the world only to third order in their spread.
        np.testing.assert_allclose(one, two, atol=0.05 if rule == "re10k" else 1e-9)


@pytest.mark.parametrize("rule", ["re10k", "dl3dv"])
def test_cameras_in_one_place_stay_finite(rule: str) -> None:
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, :3, 3] = (1, 2, 3)
    context, target, _ = normalise_poses(poses[:2], poses[2:], rule)  # type: ignore[arg-type]
    np.testing.assert_allclose(context, np.tile(np.eye(4), (2, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(target, np.eye(4)[None], atol=1e-12)


@pytest.mark.parametrize("rule", ["re10k", "dl3dv"])
def test_opposite_cameras_stay_finite(rule: str) -> None:
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, :3] = np.diag([-1.0, 1, -1])
    poses[1, :3, 3] = (1, 0, 0)
    context = normalise_poses(poses, poses[:0], rule).context  # type: ignore[arg-type]
    assert np.isfinite(context).all()
    np.testing.assert_allclose(np.linalg.det(context[:, :3, :3]), 1)


def test_a_path_leaves_the_context_as_it_is() -> None:
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = (-1, 1, 100)
    context, far, _ = normalise_poses(poses[:2], poses[2:], "re10k", target_scales=False)
    np.testing.assert_allclose(context[:, 0, 3], (-1, 1))
    assert far[0, 0, 3] == pytest.approx(100)
    assert normalise_poses(poses[:2], poses[2:], "re10k")[1][0, 0, 3] == pytest.approx(1)


@pytest.mark.parametrize("target_scales", [True, False])
@pytest.mark.parametrize("rule", ["re10k", "dl3dv"])
def test_the_similarity_brings_points_and_cameras_of_the_world_along(
    rule: str, target_scales: bool
) -> None:
    generator = np.random.default_rng(4)
    poses = np.tile(np.eye(4), (6, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations(6), 5 + 9 * generator.standard_normal((6, 3))
    context, target, similarity = normalise_poses(
        poses[:4],
        poses[4:],
        rule,  # type: ignore[arg-type]
        target_scales=target_scales,
    )
    np.testing.assert_allclose(move_poses(poses[4:], similarity), target, atol=1e-12)
    np.testing.assert_allclose(move_poses(poses[:4], similarity), context, atol=1e-12)
    # A point in front of a camera stays on its pixel: same direction in the camera's own axes.
    point = np.array([1.0, 2, 3, 1])
    before = np.linalg.inv(poses[0]) @ point
    after = np.linalg.inv(context[0]) @ (similarity @ point)
    np.testing.assert_allclose(after[:2] / after[2], before[:2] / before[2], atol=1e-9)
    np.testing.assert_array_equal(similarity[3], (0, 0, 0, 1))


def test_mirroring_twice_gives_the_pose_back() -> None:
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations(5), 3
    mirrored = mirror_poses(poses)
    np.testing.assert_array_equal(mirror_poses(mirrored), poses)
    np.testing.assert_allclose(np.linalg.det(mirrored[:, :3, :3]), 1)


def test_paths_pass_through_the_given_cameras_at_even_speed() -> None:
    poses = np.tile(np.eye(4), (3, 1, 1))
    half, full = (rotation_matrices(np.array([[1.0, 0, w, 0]]))[0] for w in (np.tan(0.2), 1.0))
    poses[1, :3, :3], poses[1, :3, 3] = half, (2, 0, 0)
    poses[2, :3, :3], poses[2, :3, 3] = full, (2, 4, 0)
    path = interpolate_poses(poses, 9)
    np.testing.assert_allclose(path[[0, 4, 8]], poses, atol=1e-12)
    np.testing.assert_allclose(path[6, :3, 3], (2, 2, 0))
    np.testing.assert_allclose(path[2, :3, :3] @ path[2, :3, :3], half, atol=1e-12)
    assert interpolate_poses(poses[:1], 4).shape == (4, 4, 4)


def test_paths_turn_the_shorter_way() -> None:
    poses = np.tile(np.eye(4), (2, 1, 1))
    half = np.radians(50)
    turns = [[np.cos(half), 0, sign * np.sin(half), 0] for sign in (1, -1)]
    poses[:, :3, :3] = rotation_matrices(np.array(turns))
    # From +100 to -100 degrees about y the shorter way leads over 180 degrees.
    np.testing.assert_allclose(
        interpolate_poses(poses, 3)[1, :3, :3], np.diag([-1, 1, -1]), atol=1e-12
    )
