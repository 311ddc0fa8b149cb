"""Some clouds of a batch, in another order."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.concerto.clouds import PointCloud


class SelectedRows(NamedTuple):
    """Rows of chosen clouds.

    Attributes:
        rows: (n,) int64 rows of the batch, cloud after cloud.
        offset: (b,) int64 cumulative ends of the chosen clouds.
    """

    rows: Tensor
    offset: Tensor


def select_rows(offset: Tensor, clouds: Tensor) -> SelectedRows:
    """Rows of clouds.

    Args:
        offset: (B,) int64 cumulative ends of all clouds.
        clouds: (b,) int64 numbers of the chosen ones.
    """
    sizes = offset.diff(prepend=offset.new_zeros(1))
    starts, sizes = (offset - sizes)[clouds], sizes[clouds]
    ends = sizes.cumsum(0)
    shift = (starts - (ends - sizes)).repeat_interleave(sizes)  # (n,)
    return SelectedRows(torch.arange(len(shift), device=offset.device) + shift, ends)


def select_clouds(cloud: PointCloud, chosen: SelectedRows) -> PointCloud:
    """The points of chosen clouds."""
    rows = chosen.rows
    return PointCloud(
        coord=cloud.coord[rows],
        feat=cloud.feat[rows],
        offset=chosen.offset,
        grid_coord=None if cloud.grid_coord is None else cloud.grid_coord[rows],
        origin_coord=None if cloud.origin_coord is None else cloud.origin_coord[rows],
    )


def principal_clouds(offset: Tensor) -> Tensor:
    """Numbers of the first of each two global views: 0, 2, 4, ..."""
    return torch.arange(0, len(offset), 2, device=offset.device)


def swapped_clouds(offset: Tensor) -> Tensor:
    """Numbers of the clouds with the two global views of each item swapped: 1, 0, 3, 2, ..."""
    return torch.arange(len(offset), device=offset.device) ^ 1
