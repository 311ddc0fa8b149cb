"""Views made without any learning: what a method has to beat.

Shape letters: B scenes, V context views, T target views, H x W pixels. Poses are camera to world
4 x 4 with OpenCV axes; intrinsics are fx, fy, cx, cy in pixels. Poses and depths may be in any
unit, but in the same one. Padded context views, where ``valid`` is False, are never used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_context(
    context_poses: Tensor, target_poses: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Find the context view whose camera centre is nearest to each target's.

    Args:
        context_poses: (B, V, 4, 4).
        target_poses: (B, T, 4, 4).
        valid: (B, V) bool; None takes all views.

    Returns:
        (B, T) int64 context views; the first of equally near ones.
    """
    offset = target_poses[:, :, None, :3, 3] - context_poses[:, None, :, :3, 3]  # (B, T, V, 3)
    distance = offset.float().square().sum(-1)
    if valid is not None:
        distance = distance.masked_fill(~valid[:, None], torch.inf)
    return distance.argmin(-1)


def copy_nearest(
    context_images: Tensor,
    context_poses: Tensor,
    target_poses: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Show the nearest context view unchanged.

    Args:
        context_images: (B, V, 3, H, W).
        context_poses: (B, V, 4, 4).
        target_poses: (B, T, 4, 4).
        valid: (B, V) bool; None takes all views.

    Returns:
        (B, T, 3, H, W).
    """
    return _take_views(context_images, nearest_context(context_poses, target_poses, valid))


def mean_context(context_images: Tensor, targets: int, valid: Tensor | None = None) -> Tensor:
    """Show the mean of a scene's context views.

    Args:
        context_images: (B, V, 3, H, W).
        targets: number of target views T.
        valid: (B, V) bool; None takes all views.

    Returns:
        (B, T, 3, H, W), the same picture for every target of a scene.
    """
    if valid is None:
        valid = torch.ones(context_images.shape[:2], dtype=torch.bool, device=context_images.device)
    weight = valid.to(context_images.dtype)[:, :, None, None, None]  # (B, V, 1, 1, 1)
    mean = (context_images * weight).sum(1) / weight.sum(1).clamp(min=1)
    return mean.unsqueeze(1).expand(-1, targets, -1, -1, -1)


def warp_plane(
    context_images: Tensor,
    context_poses: Tensor,
    context_intrinsics: Tensor,
    target_poses: Tensor,
    target_intrinsics: Tensor,
    depth: float | Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Warp the nearest context view as if the scene were one plane facing the target camera.

    Points outside the context view take the colour at its edge. Lens distortion is left out.

    Args:
        context_images: (B, V, 3, H, W).
        context_poses: (B, V, 4, 4).
        context_intrinsics: (B, V, 4).
        target_poses: (B, T, 4, 4).
        target_intrinsics: (B, T, 4), for pictures of the context images' size.
        depth: distance of the plane along the target camera's z axis, > 0: one for all scenes, or
            (B,), since a fixed distance differs between scenes once their poses are normalised.
        valid: (B, V) bool; None takes all views.

    Returns:
        (B, T, 3, H, W).

    Raises:
        ValueError: if a depth is not positive.
    """
    distance = torch.as_tensor(depth, dtype=torch.float32, device=target_poses.device)
    if not bool((distance > 0).all()):
        raise ValueError(f"depth={depth}: must be > 0, in the unit of the poses")
    height, width = context_images.shape[-2:]
    nearest = nearest_context(context_poses, target_poses, valid)
    points = _plane_points(target_intrinsics.float(), height, width)  # (B, T, H, W, 3)
    points = points * distance.reshape(-1, 1, 1, 1, 1)
    # From the target camera's axes to those of the context camera.
    motion = torch.linalg.inv(_take_views(context_poses, nearest).float()) @ target_poses.float()
    moved = torch.einsum("btij,bthwj->bthwi", motion[..., :3, :3], points)
    x, y, z = (moved + motion[..., None, None, :3, 3]).unbind(-1)  # (B, T, H, W)
    z = z.clamp(min=1e-6)  # behind the context camera: far off the picture, hence its edge
    fx, fy, cx, cy = _take_views(context_intrinsics, nearest)[..., None, None, :].float().unbind(-1)
    grid = torch.stack(((fx * x / z + cx) * 2 / width, (fy * y / z + cy) * 2 / height), dim=-1) - 1
    warped = F.grid_sample(
        _take_views(context_images, nearest).flatten(0, 1).float(),
        grid.flatten(0, 1),
        padding_mode="border",
        align_corners=False,
    )  # (B * T, 3, H, W)
    return warped.reshape(*nearest.shape, *warped.shape[1:]).to(context_images.dtype)


def _take_views(views: Tensor, chosen: Tensor) -> Tensor:
    """Views (B, V, ...) at positions (B, T): (B, T, ...)."""
    scene = torch.arange(len(views), device=views.device).unsqueeze(1)  # (B, 1)
    return views[scene, chosen]


def _plane_points(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Points (..., H, W, 3) at depth 1 seen at the pixels' centres by cameras (..., 4)."""
    rows = torch.arange(height, device=intrinsics.device) + 0.5
    columns = torch.arange(width, device=intrinsics.device) + 0.5
    fx, fy, cx, cy = intrinsics[..., None, None, :].unbind(-1)  # (..., 1, 1)
    x, y = (columns - cx) / fx, (rows[:, None] - cy) / fy  # (..., 1, W), (..., H, 1)
    one = torch.ones_like(x + y)
    return torch.stack((x * one, y * one, one), dim=-1)
