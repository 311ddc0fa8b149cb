"""Camera rays in Plücker form, for whole pictures and for token grids (arXiv 2507.08776, sec. 3.1).

Poses are camera to world with OpenCV axes (x right, y down, z forward); intrinsics are
(fx, fy, cx, cy) in pixels; pixel (row i, column j) has its centre at (j + 0.5, i + 0.5).
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MAX_STEPS = 30
_STEP_TOLERANCE = 1e-6  # in units of the focal length
_RESIDUAL_TOLERANCE = 1e-5


def plucker_rays(
    intrinsics: Tensor,
    pose: Tensor,
    height: int,
    width: int,
    distortion: Tensor | None = None,
) -> Tensor:
    """Plücker coordinates [o × d, d] of every pixel: the moment first, then the unit direction.

    Args:
        intrinsics: (..., 4) fx, fy, cx, cy in pixels.
        pose: (..., 4, 4) camera to world.
        height: Rows of the picture.
        width: Columns of the picture.
        distortion: (..., 4) OpenCV k1, k2, p1, p2; None is a pinhole.

    Returns:
        (..., 6, height, width) float32; zeros for a padded view, all of whose entries are zero.

    Raises:
        ValueError: If the distortion cannot be undone inside the picture.
    """
    device = pose.device
    columns = torch.arange(width, device=device, dtype=torch.float32) + 0.5
    rows = torch.arange(height, device=device, dtype=torch.float32) + 0.5
    rotation = pose[..., :3, :3].float()
    origin = pose[..., :3, 3, None].float().expand_as(rotation)
    # o × (R d) is linear in d, so moment and direction come from one 6 x 3 matrix.
    matrix = torch.cat([torch.linalg.cross(origin, rotation, dim=-2), rotation], dim=-2)
    return _map_grid(matrix, intrinsics, rows, columns, distortion)


def ray_directions(
    intrinsics: Tensor,
    pose: Tensor,
    rows: Tensor,
    columns: Tensor,
    distortion: Tensor | None = None,
) -> Tensor:
    """Unit directions in the world of a grid of picture points.

    Args:
        intrinsics: (..., 4) in pixels.
        pose: (..., 4, 4) camera to world.
        rows: (h,) vertical pixel coordinates.
        columns: (w,) horizontal pixel coordinates.
        distortion: (..., 4) OpenCV k1, k2, p1, p2; None is a pinhole.

    Returns:
        (..., 3, h, w) float32.
    """
    return _map_grid(pose[..., :3, :3].float(), intrinsics, rows, columns, distortion)


def _map_grid(
    matrix: Tensor, intrinsics: Tensor, rows: Tensor, columns: Tensor, distortion: Tensor | None
) -> Tensor:
    """Apply a matrix (..., C, 3) to the unit direction of each point in camera space.

    Returns:
        (..., C, h, w), zeros for a padded view, whose matrix and intrinsics are zeros.
    """
    fx, fy, cx, cy = intrinsics.float()[..., None, None].unbind(-3)  # each (..., 1, 1)
    x = (columns.float() - cx) / torch.where(fx == 0, 1, fx)  # (..., 1, w)
    y = (rows.float()[:, None] - cy) / torch.where(fy == 0, 1, fy)  # (..., h, 1)
    if distortion is not None and bool(distortion.any()):
        x, y = _undistort(x + torch.zeros_like(y), y + torch.zeros_like(x), distortion.float())
    per_x, per_y, ahead = matrix[..., None, None].unbind(-3)  # each (..., C, 1, 1)
    length = (x * x + y * y + 1).sqrt()  # (..., h, w)
    x, y = x[..., None, :, :], y[..., None, :, :]
    return (per_x * x + (per_y * y + ahead)) / length[..., None, :, :]


def _undistort(x: Tensor, y: Tensor, distortion: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the OpenCV distortion of points (..., h, w) on the plane z = 1 by Newton's method."""
    k1, k2, p1, p2 = distortion[..., None, None].unbind(-3)  # each (..., 1, 1)
    u, v = x, y
    miss_x = miss_y = torch.zeros_like(x)
    for _ in range(_MAX_STEPS):
        square = u * u + v * v
        radial = 1 + square * (k1 + square * k2)
        slope = 2 * k1 + 4 * k2 * square  # d radial / du = slope u, d radial / dv = slope v
        miss_x = u * radial + 2 * p1 * u * v + p2 * (square + 2 * u * u) - x
        miss_y = v * radial + p1 * (square + 2 * v * v) + 2 * p2 * u * v - y
        xx = radial + slope * u * u + 2 * p1 * v + 6 * p2 * u
        yy = radial + slope * v * v + 6 * p1 * v + 2 * p2 * u
        xy = slope * u * v + 2 * p1 * u + 2 * p2 * v  # the Jacobian is symmetric
        determinant = xx * yy - xy * xy
        step_x = (yy * miss_x - xy * miss_y) / determinant
        step_y = (xx * miss_y - xy * miss_x) / determinant
        u, v = u - step_x, v - step_y
        if bool((step_x.abs().amax() < _STEP_TOLERANCE) & (step_y.abs().amax() < _STEP_TOLERANCE)):
            break
    worst = torch.maximum(miss_x.abs(), miss_y.abs()).amax()
    if not bool(worst < _RESIDUAL_TOLERANCE) or not bool((determinant > 0).all()):
        raise ValueError(
            f"distortion={distortion.reshape(-1, 4).tolist()}: expected (k1, k2, p1, p2) that can "
            "be undone everywhere in the picture; check the calibration, or undistort the pictures"
        )
    return u, v


class TokenRays(NamedTuple):
    """Where the tokens of a picture look, one ray through the centre of each patch.

    Attributes:
        rays: (..., h * w, 6) Plücker coordinates [o × d, d] in raster order, float32.
        camera: (..., h * w, 3) centre of the token's camera.
    """

    rays: Tensor
    camera: Tensor


def token_rays(
    intrinsics: Tensor,
    pose: Tensor,
    height: int,
    width: int,
    patch_size: int = 8,
    distortion: Tensor | None = None,
) -> TokenRays:
    """Rays through the centres of all patches, by which tokens are chosen for a view.

    Args:
        intrinsics: (..., 4) in pixels of the whole picture.
        pose: (..., 4, 4) camera to world.
        height: Rows of the picture, a multiple of ``patch_size``.
        width: Columns of the picture, a multiple of ``patch_size``.
        patch_size: Side of a patch in pixels.
        distortion: (..., 4) OpenCV k1, k2, p1, p2; None is a pinhole.
    """
    rows = (torch.arange(height // patch_size, device=pose.device) + 0.5) * patch_size
    columns = (torch.arange(width // patch_size, device=pose.device) + 0.5) * patch_size
    direction = ray_directions(intrinsics, pose, rows, columns, distortion)
    direction = direction.flatten(-2).mT  # (..., h * w, 3)
    camera = pose[..., None, :3, 3].float().expand_as(direction)
    moment = torch.linalg.cross(camera, direction, dim=-1)
    return TokenRays(torch.cat([moment, direction], dim=-1), camera)


def view_directions(
    intrinsics: Tensor,
    pose: Tensor,
    height: int,
    width: int,
    stride: int = 16,
    cells: int = 24,
) -> Tensor:
    """Directions of a coarse square grid centred on a picture, reaching beyond its edges or not.

    Args:
        intrinsics: (..., 4) in pixels of the whole picture.
        pose: (..., 4, 4) camera to world.
        height: Rows of the picture.
        width: Columns of the picture.
        stride: Distance of neighbouring rays in pixels.
        cells: Rays in each direction.

    Returns:
        (..., cells * cells, 3) unit directions in raster order, float32.
    """
    steps = (torch.arange(cells, device=pose.device) + 0.5 - cells / 2) * stride
    direction = ray_directions(intrinsics, pose, steps + height / 2, steps + width / 2)
    return direction.flatten(-2).mT
