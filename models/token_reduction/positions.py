"""Positions of tokens on a grid, learned or of sines, for any grid size.

Without them a reconstructor is blind to which slot it fills: all dropped tokens of an image would
get the same output. Letters: h rows, w columns, C channels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PositionKind = Literal["learned", "sincos"]


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of row and column, a quarter of the channels each, (h, w, C).

    The wavelengths go geometrically from 2 pi to 2 pi * 10^4 tokens, as for sequences.

    Raises:
        ValueError: If the width is no multiple of four.
    """
    if width % 4:
        raise ValueError(f"width={width}: sincos positions need a multiple of 4; or use 'learned'")
    frequencies = 1e-4 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)  # (n, C/2)
    height, across = grid
    table = [rows[:, None].expand(-1, across, -1), columns[None].expand(height, -1, -1)]
    return torch.cat(table, dim=2).float()


class GridPositions(nn.Module):
    """A table of positions (h, w, C), bicubically interpolated to other grids.

    Args:
        grid: Rows and columns of the table.
        width: Channels C.
        kind: "learned" starts from noise of deviation .02, "sincos" is fixed.
    """

    table: Tensor

    def __init__(self, grid: tuple[int, int], width: int, kind: PositionKind = "learned") -> None:
        super().__init__()
        if kind not in ("learned", "sincos"):
            raise ValueError(f"positions={kind!r}: expected 'learned' or 'sincos'")
        self.grid = grid
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(*grid, width))
            nn.init.trunc_normal_(self.table, std=0.02)
        else:
            self.register_buffer("table", sincos_positions(grid, width))

    def forward(self, grid: tuple[int, int] | None = None) -> Tensor:
        """Positions of a grid in raster order, (h * w, C); None is the table's own grid."""
        if grid is None or tuple(grid) == tuple(self.grid):
            return self.table.flatten(0, 1)
        planes = self.table.permute(2, 0, 1)[None].float()  # (1, C, h, w)
        resized = F.interpolate(planes, grid, mode="bicubic", antialias=True)
        return resized[0].flatten(1).T.to(self.table.dtype)
