"""Masks of whole cells of a cloud, and jitter that hides where masked points were (sect. 3).

Random numbers come from a generator, or are given, so that a step can be repeated.
"""

import torch
from torch import Tensor

from models.concerto.clouds import batch_numbers


@torch.no_grad()
def mask_cells(
    coord: Tensor, offset: Tensor, size: float, ratio: float, draw: torch.Generator | Tensor
) -> Tensor:
    """Mask the points of a random share of the cells of all clouds together.

    Args:
        coord: (N, 3) in metres.
        offset: (B,) cumulative ends of the clouds.
        size: Side of a cell in metres.
        ratio: Share of the cells, rounded down to a number of cells.
        draw: Generator, or a permutation (cells,) whose first entries are masked.

    Returns:
        (N,) bool, True if masked.

    Raises:
        ValueError: If the size is not positive, the ratio no share, or the permutation of another
            length.
    """
    if not size > 0 or not 0 <= ratio <= 1:
        raise ValueError(f"mask_size={size}, mask_ratio={ratio}: must be > 0 and in [0, 1]")
    cell, count = cell_numbers(coord, offset, size)
    if isinstance(draw, torch.Generator):
        draw = torch.randperm(count, generator=draw, device=draw.device)
    elif len(draw) != count:
        raise ValueError(f"permutation of {len(draw)}: there are {count} cells")
    masked = torch.zeros(count, dtype=torch.bool, device=coord.device)
    masked[draw[: int(count * ratio)].to(coord.device)] = True
    return masked[cell]


def cell_numbers(coord: Tensor, offset: Tensor, size: float) -> tuple[Tensor, int]:
    """Number (N,) of the occupied cell of each point, ascending by cloud, x, y, z; and how many.

    Cells start at the least coordinates of each cloud.
    """
    if not len(coord):
        return coord.new_zeros(0, dtype=torch.int64), 0
    batch = batch_numbers(offset)
    index = batch[:, None].expand(-1, 3)
    origin = coord.new_full((len(offset), 3), torch.inf).scatter_reduce(0, index, coord, "amin")
    cell = torch.div(coord - origin[batch], size, rounding_mode="floor").long()  # (N, 3)
    extent = cell.amax(0) + 1
    key = ((batch * extent[0] + cell[:, 0]) * extent[1] + cell[:, 1]) * extent[2] + cell[:, 2]
    occupied, number = torch.unique(key, return_inverse=True)
    return number, len(occupied)


@torch.no_grad()
def jitter_masked(
    coord: Tensor, mask: Tensor, sigma: float, draw: torch.Generator | Tensor
) -> Tensor:
    """Move the masked points, so that a hidden surface cannot be read off the coordinates.

    Normal noise is cut at two deviations upwards only, as in the released code.

    Args:
        coord: (N, 3) in metres.
        mask: (N,) bool.
        sigma: Deviation in metres.
        draw: Generator, or standard normal noise (masked points, 3).

    Returns:
        (N, 3) coordinates; those of other points are unchanged.
    """
    if isinstance(draw, torch.Generator):
        draw = torch.randn((int(mask.sum()), 3), generator=draw, device=draw.device)
    moved = coord.clone()
    moved[mask] += (draw.to(coord) * sigma).clamp(max=2 * sigma)
    return moved
