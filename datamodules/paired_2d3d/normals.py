"""Surface normals from depth maps, and from points alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodules.paired_2d3d.rgbd_frames import pixel_rays

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMOOTH = 0.25  # largest change of a slope, as a share of it, at which both sides are averaged
_LEAST = 1e-4  # 1 / metres; changes of inverse depth below this are noise
_AT_ONCE = 1 << 16  # points whose neighbourhoods are held in memory


def depth_normals(
    depth: NDArray[np.float32], intrinsics: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Normals at all pixels of a depth map, by differences of neighbouring pixels.

    Inverse depth is linear in the image of a plane, and its slope gives the normal exactly. Where
    a surface breaks off at an edge, the neighbour on the same side is used alone; without any
    known neighbour along a direction depth is taken as constant along it.

    Args:
        depth: (h, w) metres; 0 is unknown.
        intrinsics: (3, 3) pixels, without skew.

    Returns:
        (h, w, 3) unit normals in the camera's frame that look at the camera; zero where depth is
        unknown.
    """
    across, down = pixel_rays((depth.shape[0], depth.shape[1]), intrinsics)
    with np.errstate(divide="ignore"):
        inverse = np.where(depth > 0, 1 / depth.astype(np.float64), np.nan)
    right = np.nan_to_num(_slope(inverse)) * intrinsics[0, 0]
    below = np.nan_to_num(_slope(inverse.T).T) * intrinsics[1, 1]
    # For X on the plane n.X = 1 inverse depth is n.(across, down, 1), so this is n itself.
    normal = np.stack((right, below, inverse - across * right - down[:, None] * below), axis=2)
    normal /= -np.sqrt((normal * normal).sum(2, keepdims=True))
    known: NDArray[np.float64] = np.nan_to_num(normal)
    return known


def _slope(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Change (h, w) from column to column, on the smoother side of steps; NaN where unknown."""
    step = np.full((values.shape[0], values.shape[1] + 1), np.nan)
    step[:, 1:-1] = np.diff(values)
    behind, ahead = step[:, :-1], step[:, 1:]
    # Comparisons with NaN are false: a side that is unknown loses against the other.
    size_behind, size_ahead = np.abs(behind), np.abs(ahead)
    one_sided = np.where((size_ahead < size_behind) | np.isnan(behind), ahead, behind)
    smooth = np.abs(ahead - behind) < _SMOOTH * (size_ahead + size_behind) + _LEAST
    return np.where(smooth, (ahead + behind) / 2, one_sided)


def neighbour_normals(
    coord: NDArray[np.float64], towards: NDArray[np.float64], neighbours: int = 12
) -> NDArray[np.float64]:
    """Normals as the directions in which each point's neighbourhood extends least.

    Args:
        coord: (N, 3).
        towards: (N, 3) vectors into the half space that each normal shall point to.
        neighbours: points of a neighbourhood, the point itself included.

    Returns:
        (N, 3) unit normals.
    """
    from scipy.spatial import cKDTree

    tree = cKDTree(coord)
    count = min(neighbours, len(coord))
    normal = np.empty_like(coord)
    for start in range(0, len(coord), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        near = tree.query(coord[rows], k=np.arange(1, count + 1))[1]  # (n, count)
        spread = coord[near] - coord[near].mean(1, keepdims=True)
        normal[rows] = np.linalg.eigh(np.einsum("nki,nkj->nij", spread, spread))[1][:, :, 0]
    flipped = np.einsum("ni,ni->n", normal, towards) < 0
    normal[flipped] *= -1
    return normal
