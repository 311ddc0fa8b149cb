"""Grid pooling between the levels of the encoder (Point Transformer V3, Sonata variant).

Letters in shape comments: N rows, n rows of the next level, B clouds.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.concerto.clouds import batch_offset
from models.concerto.ordering import group_rows, invert_order, permute_rows
from models.concerto.submanifold import voxel_keys


class Cells(NamedTuple):
    """Rows grouped by the voxels of the next level, which are sorted by (cloud, x, y, z).

    Attributes:
        inverse: (N,) int64 voxel of each row.
        by_voxel: (N,) int64 rows sorted by voxel, equal ones by row.
        places: (N,) int64 place of each row among them.
        pointer: (n + 1,) int64 borders of the voxels among the sorted rows.
        grid_coord: (n, 3) int64 of the next level.
        batch: (n,) int64 cloud of each voxel.
        offset: (B,) int64 cumulative numbers of voxels.
    """

    inverse: Tensor
    by_voxel: Tensor
    places: Tensor
    pointer: Tensor
    grid_coord: Tensor
    batch: Tensor
    offset: Tensor


@torch.no_grad()
def group_cells(grid_coord: Tensor, batch: Tensor, clouds: int) -> Cells:
    """Group rows by ``grid_coord // 2`` within each cloud.

    Args:
        grid_coord: (N, 3) int64 >= 0.
        batch: (N,) int64, cloud of each row.
        clouds: Number of clouds B.
    """
    coarse = grid_coord >> 1
    keys, _ = voxel_keys(coarse, batch)
    groups = group_rows(keys)
    pointer = torch.cat([groups.starts, groups.starts.new_tensor([len(keys)])])
    first = groups.rows.index_select(0, groups.starts)
    batch = batch.index_select(0, first)
    grid_coord = coarse.index_select(0, first)
    offset = batch_offset(batch, clouds)
    places = invert_order(groups.rows)
    return Cells(groups.group, groups.rows, places, pointer, grid_coord, batch, offset)


def cell_means(values: Tensor, cells: Cells) -> Tensor:
    """Mean (n, C) of the rows (N, C) of each voxel."""
    rows = values.index_select(0, cells.by_voxel)
    return torch.segment_reduce(rows, "mean", offsets=cells.pointer, unsafe=True)


class GridPooling(nn.Module):
    """Linear, maximum over the rows of each voxel, layer norm and GELU.

    Args:
        in_channels: Channels of the finer level.
        out_channels: Channels of the coarser one.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, out_channels)
        self.norm = nn.Sequential(nn.LayerNorm(out_channels))

    def forward(self, x: Tensor, cells: Cells) -> Tensor:
        """Pool rows (N, in): (n, out)."""
        rows = self.proj(permute_rows(x, cells.by_voxel, cells.places))
        largest = torch.segment_reduce(rows, "max", offsets=cells.pointer, unsafe=True)
        return F.gelu(self.norm(largest))
