"""Choosing the stored tokens that a view needs (arXiv 2507.08776, sec. 3.4 and algorithm 1).

The distance of a token to a ray of the target view is the angle between the two rays plus a small
multiple of the distance of their cameras. Letters: T target views, S stored tokens, R rays of a
coarse grid over the target view.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.clift.rays import view_directions

# Rays of the coarse grid across the longer side of a view, and how many more reach beyond it.
_CELLS, _MARGIN = 16, 8
_SAME_CAMERA = 1e-3
_SAME_DIRECTION = 1e-6


@dataclass(frozen=True)
class SelectionRule:
    """How tokens are ranked; the defaults are those of the published table 2.

    Algorithm 1 as written in the paper has ``cell_tokens=None``, ``momentum=0.5`` and
    ``bonus=0.03``.

    Attributes:
        camera_weight: Weight of the camera distance, in radians per unit of the poses.
        cell_tokens: Nearest tokens that every ray of the grid is given first; None divides the
            wanted tokens evenly over the rays, rounding down.
        momentum: Share of the last frame's distances in this frame's, in [0, 1).
        bonus: Taken off the distance of tokens that the last frame used, in radians.
    """

    camera_weight: float = 0.02
    cell_tokens: int | None = 0
    momentum: float = 0.0
    bonus: float = 0.0

    def __post_init__(self) -> None:
        if self.cell_tokens is not None and self.cell_tokens < 0:
            raise ValueError(f"cell_tokens={self.cell_tokens}: must be >= 0, or null")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must be in [0, 1)")


class SelectionState(NamedTuple):
    """What one frame hands to the next.

    Attributes:
        distances: (S, R) of the last frame, with momentum and bonus.
        chosen: (S,) bool, tokens that the last frame used.
    """

    distances: Tensor
    chosen: Tensor


class Selection(NamedTuple):
    """Tokens for one frame of a camera path.

    Attributes:
        positions: (Nr,) int64 stored tokens, ascending.
        scores: (S,) smallest distance of each token to any ray.
        state: For the next frame.
    """

    positions: Tensor
    scores: Tensor
    state: SelectionState


def camera_distance(cameras: Tensor, target: Tensor) -> Tensor:
    """Root mean square over x, y, z of the distance of cameras (..., 3): (...)."""
    return (cameras.float() - target.float()).square().mean(-1).sqrt()


def score_tokens(
    rays: Tensor,
    camera: Tensor,
    directions: Tensor,
    target_camera: Tensor,
    camera_weight: float = 0.02,
) -> Tensor:
    """Smallest distance of each stored token to any ray of each view, by one matrix product.

    Args:
        rays: (..., S, 6) Plücker rays of the tokens.
        camera: (..., S, 3) camera of each token.
        directions: (..., T, R, 3) of the views, see `models.clift.rays.view_directions`.
        target_camera: (..., T, 3) centre of each view's camera.
        camera_weight: Weight of the camera distance.

    Returns:
        (..., T, S), smaller is nearer.
    """
    tokens, directions = rays[..., None, :, 3:].float(), directions.float()
    cosines = tokens @ directions.mT  # (..., T, S, R)
    angle = cosines.amax(-1).clamp(-1, 1).acos()
    apart = camera[..., None, :, :].float() - target_camera[..., None, :].float()  # (..., T, S, 3)
    same = apart.norm(dim=-1) < _SAME_CAMERA
    if bool(same.any()):
        nearest = cosines.argmax(-1)[..., None].expand(*angle.shape, 3)
        offset = (directions.gather(-2, nearest) - tokens).norm(dim=-1)
        angle = angle.masked_fill(same & (offset < _SAME_DIRECTION), 0)
    return angle + camera_weight * apart.square().mean(-1).sqrt()


def score_for_views(
    rays: Tensor, camera: Tensor, intrinsics: Tensor, pose: Tensor, height: int, width: int
) -> Tensor:
    """Scores (..., T, S) of stored tokens for target views, in float32 whatever autocast says.

    Args:
        rays: (..., S, 6) Plücker rays of the tokens.
        camera: (..., S, 3) camera of each token.
        intrinsics: (..., T, 4) of the views, in pixels.
        pose: (..., T, 4, 4) of the views.
        height: Rows of a view.
        width: Columns of a view.
    """
    stride = max(height, width) // _CELLS
    with torch.autocast(pose.device.type, enabled=False):  # angles need their digits
        grid = view_directions(intrinsics, pose, height, width, stride, _CELLS + _MARGIN)
        return score_tokens(rays, camera, grid, pose[..., :3, 3])


def nearest_tokens(scores: Tensor, keep: int, valid: Tensor | None = None) -> Tensor:
    """Positions (..., keep) of the tokens with the smallest scores (..., S), ascending.

    Args:
        scores: (..., S).
        keep: Tokens to choose, from 1 to S.
        valid: Bool, broadcastable to (..., S); padded tokens come last. None ranks all.

    Raises:
        ValueError: If ``keep`` is out of range.
    """
    if not 1 <= keep <= scores.shape[-1]:
        raise ValueError(f"keep={keep}: must be from 1 to the {scores.shape[-1]} stored tokens")
    if valid is not None:
        scores = scores.masked_fill(~valid, torch.inf)
    return scores.argsort(dim=-1, stable=True)[..., :keep].sort(dim=-1).values


def select_tokens(
    rays: Tensor,
    camera: Tensor,
    directions: Tensor,
    target_camera: Tensor,
    keep: int,
    rule: SelectionRule,
    state: SelectionState | None = None,
) -> Selection:
    """Choose the tokens for one frame of a camera path of one scene.

    Args:
        rays: (S, 6) Plücker rays of the tokens.
        camera: (S, 3) camera of each token.
        directions: (R, 3) of the view.
        target_camera: (3,) centre of the view's camera.
        keep: Tokens to choose, from 1 to S.
        rule: How to rank them.
        state: Of the frame before; None for the first one.

    Raises:
        ValueError: If ``keep`` is out of range.
    """
    distances = _distances(rays, camera, directions, target_camera, rule.camera_weight)
    if state is not None:
        distances = distances - rule.bonus * state.chosen[:, None].to(distances.dtype)
        distances = (1 - rule.momentum) * distances + rule.momentum * state.distances
    scores = distances.min(-1).values
    per_cell = rule.cell_tokens
    if per_cell is None:
        per_cell = keep // len(directions)
    positions = nearest_tokens(_prefer(scores, distances, per_cell, keep), keep)
    chosen = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, positions, True)
    return Selection(positions, scores, SelectionState(distances, chosen))


def _distances(
    rays: Tensor, camera: Tensor, directions: Tensor, target_camera: Tensor, weight: float
) -> Tensor:
    """(S, R) distance of every token to every ray."""
    tokens, directions = rays[:, 3:].float(), directions.float()
    angle = (tokens @ directions.T).clamp(-1, 1).acos()
    near = (camera.float() - target_camera.float()).norm(dim=-1) < _SAME_CAMERA  # (S,)
    if bool(near.any()):
        offset = (tokens[near][:, None] - directions).norm(dim=-1)
        angle[near] = angle[near].masked_fill(offset < _SAME_DIRECTION, 0)
    return angle + weight * camera_distance(camera, target_camera)[:, None]


def _prefer(scores: Tensor, distances: Tensor, per_cell: int, keep: int) -> Tensor:
    """Scores (S,) with the ``per_cell`` nearest tokens of every ray moved to the front."""
    if per_cell == 0:
        return scores
    per_cell = min(per_cell, len(scores))
    cell = distances.topk(per_cell, dim=0, largest=False).indices.flatten()
    first = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, cell, True)
    if int(first.sum()) <= keep:
        return scores.masked_fill(first, -torch.inf)
    return scores.masked_fill(~first, torch.inf)
