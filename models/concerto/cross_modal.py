"""Cross-modal loss: points predict the image features of the patches they are seen in (sect. 3).

Letters: N points, V images of an item at most, I images of the batch, P = rows * columns patches
of an image, C and D channels of a point's and of a patch's feature. Positions in an image are
fractional (row, column) in patches; -1 is not visible.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Brings 1 - cosine to the size of the clustering losses; not in the paper, in the released code.
_SCALE = 10.0


class PatchMeans(NamedTuple):
    """Mean features of the points in each patch that has points.

    Attributes:
        feature: (m, C) float32.
        patch: (m,) int64 patch number, image * P + row * columns + column, ascending.
    """

    feature: Tensor
    patch: Tensor


@torch.no_grad()
def pool_correspondence(correspondence: Tensor, inverse: Tensor, count: int) -> Tensor:
    """Mean position of the visible points of each voxel.

    Args:
        correspondence: (N, V, 2) positions of points.
        inverse: (N,) int64 voxel of each point.
        count: Number n of voxels.

    Returns:
        (n, V, 2) float32; -1 where no point of the voxel is visible.
    """
    visible = (correspondence >= 0).all(-1, keepdim=True)  # (N, V, 1)
    shape = (count, correspondence.shape[1])
    total = correspondence.new_zeros((*shape, 2), dtype=torch.float32)
    total.index_add_(0, inverse, torch.where(visible, correspondence.float(), 0))
    number = total.new_zeros((*shape, 1)).index_add_(0, inverse, visible.float())
    return torch.where(number > 0, total / number.clamp(min=1), -1.0)


@torch.no_grad()
def patch_numbers(
    correspondence: Tensor, item: Tensor, image_number: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which points are seen in which patches.

    Args:
        correspondence: (n, V, 2) positions of the points of principal views; positions outside
            the grid count as not visible.
        item: (n,) int64 item of each point.
        image_number: (B,) int64 images of each item; their rows follow each other in the batch.
        grid: Rows and columns of patches of an image.

    Returns:
        Rows (m,) of points and numbers (m,) of patches, one entry for each pair.
    """
    cell = correspondence.floor().long()  # (n, V, 2)
    row, column = cell.unbind(-1)
    view = torch.arange(cell.shape[1], device=cell.device)
    seen = (cell >= 0).all(-1) & (row < grid[0]) & (column < grid[1])
    seen &= view < image_number[item][:, None]
    first_image = (image_number.cumsum(0) - image_number)[item]  # (n,)
    image = first_image[:, None] + view  # (n, V)
    patch = (image * grid[0] + row) * grid[1] + column
    rows, views = seen.nonzero(as_tuple=True)
    return rows, patch[rows, views]


def patch_means(features: Tensor, rows: Tensor, patches: Tensor) -> PatchMeans:
    """Average the features (n, C) of the points in each patch.

    Args:
        features: (n, C).
        rows: (m,) int64 rows of points, from `patch_numbers`.
        patches: (m,) int64 patches likewise.
    """
    filled, inverse, number = torch.unique(patches, return_inverse=True, return_counts=True)
    with torch.autocast(features.device.type, enabled=False):
        picked = features.float().index_select(0, rows)  # (m, C)
        total = picked.new_zeros((len(filled), features.shape[1])).index_add(0, inverse, picked)
        return PatchMeans(total / number[:, None], filled)


def cross_modal_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Ten times one minus the Pearson correlation over channels, mean over patches.

    A vector's own channel mean is taken off before the cosine, so the loss is 0 for affine copies.

    Args:
        predicted: (m, D) from the points.
        target: (m, D) from the image encoder.

    Returns:
        Scalar in float32; 0 without gradient if there are no patches.
    """
    if not len(predicted):
        return predicted.float().sum()
    with torch.autocast(predicted.device.type, enabled=False):
        ours, theirs = predicted.float(), target.float()
        ours, theirs = (x - x.mean(-1, keepdim=True) for x in (ours, theirs))
        return _SCALE * (1 - F.cosine_similarity(ours, theirs, eps=1e-6)).mean()
