"""Nearest neighbours between two views of the same clouds (sect. 3 of arXiv 2510.23607)."""

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

# Distances held at once, and the number above which a tree is faster on a CPU.
_CHUNK = 1 << 24
_TREE = 1 << 15


@torch.no_grad()
def match_nearest(
    coord1: Tensor, offset1: Tensor, coord2: Tensor, offset2: Tensor, radius: float
) -> Tensor:
    """Find for each point of the first view the nearest one of the same cloud in the second.

    Args:
        coord1: (n1, 3) in metres, in coordinates that both views share.
        offset1: (B,) cumulative ends of its clouds; a cloud may be empty.
        coord2: (n2, 3) likewise.
        offset2: (B,) likewise.
        radius: Pairs at this distance or further apart are left out.

    Returns:
        (m, 2) int64 rows of the first and of the second view, ascending in the first.

    Raises:
        ValueError: If the views do not have as many clouds.
    """
    ends1, ends2 = offset1.tolist(), offset2.tolist()
    if len(ends1) != len(ends2):
        raise ValueError(f"views of {len(ends1)} and {len(ends2)} clouds: must be as many")
    found = [coord1.new_empty((0, 2), dtype=torch.int64)]
    for start1, end1, start2, end2 in zip(
        [0, *ends1[:-1]], ends1, [0, *ends2[:-1]], ends2, strict=True
    ):
        if end1 == start1 or end2 == start2:
            continue
        own, other = coord1[start1:end1].float(), coord2[start2:end2].float()
        nearest = _nearest(own, other)  # (n,)
        near = (own - other[nearest]).norm(dim=1) < radius
        rows = near.nonzero()[:, 0]
        found.append(torch.stack((rows + start1, nearest[rows] + start2), 1))
    return torch.cat(found)


def _nearest(own: Tensor, other: Tensor) -> Tensor:
    """Row of ``other`` next to each row of ``own``, both of one cloud."""
    if own.device.type == "cpu" and len(own) * len(other) > _TREE:
        _, rows = cKDTree(other.numpy()).query(own.numpy())
        return torch.from_numpy(rows.astype(np.int64))
    # Differences, not scalar products: those lose millimetres far from the origin.
    mode = "donot_use_mm_for_euclid_dist"
    size = max(1, _CHUNK // len(other))
    parts = [
        torch.cdist(own[start : start + size], other, compute_mode=mode).argmin(1)
        for start in range(0, len(own), size)
    ]
    return torch.cat(parts)
