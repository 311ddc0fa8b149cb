"""Camera poses: into the normalised world of a scene, mirrored, and along a path.

Poses are (V, 4, 4) float64, camera to world, with OpenCV axes (x right, y down, z forward);
quaternions are (V, 4), real part first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PoseRule = Literal["re10k", "dl3dv"]
"""How the world of a scene is placed and scaled, see ``normalise_poses``."""

_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


class NormalisedPoses(NamedTuple):
    """Poses in the normalised world of a scene.

    Attributes:
        context: (C, 4, 4).
        target: (T, 4, 4).
        similarity: (4, 4) from the world given to the normalised one, for points; see
            ``move_poses`` for other cameras.
    """

    context: NDArray[np.float64]
    target: NDArray[np.float64]
    similarity: NDArray[np.float64]


def quaternions(rotations: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit quaternions whose real part is not negative.

    Args:
        rotations: (V, 3, 3) rotation matrices.

    Returns:
        (V, 4), real part first.
    """
    m = rotations
    xx, yy, zz = m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]
    wx, wy, wz = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    xy, xz, yz = m[:, 0, 1] + m[:, 1, 0], m[:, 0, 2] + m[:, 2, 0], m[:, 1, 2] + m[:, 2, 1]
    # Row i is 4 q_i q: the row with the largest q_i is the most exact.
    rows = np.stack(
        [
            np.stack([1 + xx + yy + zz, wx, wy, wz], -1),
            np.stack([wx, 1 + xx - yy - zz, xy, xz], -1),
            np.stack([wy, xy, 1 - xx + yy - zz, yz], -1),
            np.stack([wz, xz, yz, 1 - xx - yy + zz], -1),
        ],
        axis=1,
    )  # (V, 4, 4)
    best = np.einsum("vii->vi", rows).argmax(axis=1)
    chosen = rows[np.arange(len(rows)), best]  # (V, 4)
    chosen = np.where(chosen[:, :1] < 0, -chosen, chosen)
    unit: NDArray[np.float64] = chosen / np.linalg.norm(chosen, axis=1, keepdims=True)
    return unit


def rotation_matrices(turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrices (V, 3, 3) of quaternions (V, 4) of any length but zero."""
    unit = turns / np.linalg.norm(turns, axis=1, keepdims=True)
    w, x, y, z = unit.T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)  # (V, 3, 3)


def _mean_quaternion_pose(context: NDArray[np.float64]) -> NDArray[np.float64]:
    """Plain mean of quaternions, without sign alignment, and of positions."""
    mean = np.eye(4)
    turn = quaternions(context[:, :3, :3]).mean(axis=0, keepdims=True)
    # Opposite turns by 180 degrees cancel out; any of them is as good a mean as another.
    cancelled = np.linalg.norm(turn) < 1e-9
    mean[:3, :3] = context[0, :3, :3] if cancelled else rotation_matrices(turn)[0]
    mean[:3, 3] = context[:, :3, 3].mean(axis=0)
    return mean


def _mean_axes_pose(context: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean forward axis, levelled by the mean down axis, and mean position."""
    forward = context[:, :3, 2].mean(axis=0)
    right = np.cross(context[:, :3, 1].mean(axis=0), forward)
    if min(np.linalg.norm(forward), np.linalg.norm(right)) < 1e-9:
        return _mean_quaternion_pose(context)  # cameras all round, whose axes cancel out
    forward /= np.linalg.norm(forward)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    mean = np.eye(4)
    mean[:3, :] = np.stack([right, down, forward, context[:, :3, 3].mean(axis=0)], axis=1)
    return mean


def normalise_poses(
    context: NDArray[np.float64],
    target: NDArray[np.float64],
    rule: PoseRule,
    *,
    target_scales: bool = True,
) -> NormalisedPoses:
    """Put the mean context camera at the origin and scale the cameras into the unit cube.

    Args:
        context: (C, 4, 4) poses that fix the new world.
        target: (T, 4, 4) further poses, T >= 0.
        rule: re10k takes the mean of quaternions, and scales by the largest coordinate of context
            and target cameras; dl3dv takes the mean axes, and scales by the context alone. Both
            as released with CLiFT (arXiv 2507.08776).
        target_scales: False scales by the context alone under re10k as well, so that a camera
            path leaves the context as it is.

    Returns:
        The poses in the new world, and the way there. Cameras that all share one place keep
        their scale.
    """
    mean = _mean_quaternion_pose(context) if rule == "re10k" else _mean_axes_pose(context)
    similarity = np.linalg.inv(mean).astype(np.float64)
    moved = similarity @ np.concatenate([context, target])
    scaled_by = moved if rule == "re10k" and target_scales else moved[: len(context)]
    extent = np.abs(scaled_by[:, :3, 3]).max()
    if extent > 1e-9:
        moved[:, :3, 3] /= extent
        similarity[:3] /= extent
    return NormalisedPoses(moved[: len(context)], moved[len(context) :], similarity)


def move_poses(poses: NDArray[np.float64], similarity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cameras (..., 4, 4) of one world as they stand in another, rotations staying rotations.

    Args:
        poses: (..., 4, 4).
        similarity: (4, 4) between the worlds: rotation, positive scale and translation of points.
    """
    moved: NDArray[np.float64] = similarity @ poses
    moved[..., :3, :3] /= np.cbrt(np.linalg.det(similarity[:3, :3]))
    return moved


def mirror_poses(poses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Poses (..., 4, 4) of the cameras of the scene as seen in a mirror at x = 0."""
    mirrored: NDArray[np.float64] = _MIRROR @ poses @ _MIRROR
    return mirrored


def interpolate_poses(poses: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Camera path through the given poses at equal shares of the way from each to the next.

    Args:
        poses: (V, 4, 4) cameras to pass, in order.
        count: poses of the path.

    Returns:
        (count, 4, 4): positions on straight lines, rotations on great circles (slerp); the first
        and the last are the ends of ``poses``.
    """
    place = np.linspace(0, len(poses) - 1, count)
    start = np.minimum(place.astype(np.int64), max(len(poses) - 2, 0))
    end = np.minimum(start + 1, len(poses) - 1)
    share = (place - start)[:, None]  # (count, 1)
    turns = quaternions(poses[:, :3, :3])
    path = np.tile(np.eye(4), (count, 1, 1))
    path[:, :3, :3] = rotation_matrices(_slerp(turns[start], turns[end], share))
    path[:, :3, 3] = (1 - share) * poses[start, :3, 3] + share * poses[end, :3, 3]
    return path


def _slerp(
    start: NDArray[np.float64], end: NDArray[np.float64], share: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Quaternions (N, 4) at the given shares (N, 1) of the shorter way."""
    cosine = np.sum(start * end, axis=1, keepdims=True)
    end = np.where(cosine < 0, -end, end)
    angle = np.arccos(np.clip(np.abs(cosine), 0, 1))
    near = angle < 1e-6
    sine = np.where(near, 1, np.sin(angle))
    first = np.where(near, 1 - share, np.sin((1 - share) * angle) / sine)
    second = np.where(near, share, np.sin(share * angle) / sine)
    turned: NDArray[np.float64] = first * start + second * end
    return turned
