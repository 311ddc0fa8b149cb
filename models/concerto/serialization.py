"""Orders of points along space-filling curves (Point Transformer V3, arXiv 2312.10035, section 4).

Letters in shape comments: N points, B clouds. The four curves are always in the order z, z with x
and y swapped, Hilbert, Hilbert with x and y swapped.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.concerto.ordering import invert_order, sort_stably

CURVES = 4
_MAX_DEPTH = 16
_MAX_CLOUDS = 2 ** (63 - 3 * _MAX_DEPTH)


class Serialization(NamedTuple):
    """Four orders of the points of a batch; the clouds follow one another in each.

    Attributes:
        code: (4, N) int64, place on each curve with the cloud number above it.
        order: (4, N) int64, row at each place; rows of one voxel keep their order.
        inverse: (4, N) int64, place of each row.
        depth: Bits per coordinate.
    """

    code: Tensor
    order: Tensor
    inverse: Tensor
    depth: int


def curve_depth(grid_coord: Tensor) -> int:
    """Bits per coordinate that hold every voxel of the batch.

    Raises:
        ValueError: A voxel number is negative or too large for the codes.
    """
    if not len(grid_coord):
        return 1
    low, high = (int(x) for x in torch.stack(grid_coord.aminmax()))
    depth = (high + 1).bit_length()
    if low < 0 or depth > _MAX_DEPTH:
        raise ValueError(
            f"grid_coord from {low} to {high}: must lie in [0, {2**_MAX_DEPTH - 2}]; "
            "shift the cloud or use a larger grid_size"
        )
    return depth


def _interleave(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Bit i of x, y, z becomes bit 3 i + 2, 3 i + 1, 3 i."""
    return (_spread(x) << 2) | (_spread(y) << 1) | _spread(z)


def _spread(x: Tensor) -> Tensor:
    """Put two zeros between the bits of 16-bit numbers."""
    x = x.long()
    for shift, mask in (
        (16, 0x0000_FF00_00FF),
        (8, 0x00F0_0F00_F00F),
        (4, 0x0C30_C30C_30C3),
        (2, 0x2492_4924_9249),
    ):
        x = (x | (x << shift)) & mask
    return x


def _hilbert(x: Tensor, y: Tensor, z: Tensor, depth: int) -> Tensor:
    """Place on the Hilbert curve of a cube of side 2**depth (Skilling, AIP Conf. 707, 2004)."""
    axes = [axis.int() for axis in (x, y, z)]
    for bit in reversed(range(1, depth)):
        below = (1 << bit) - 1
        for axis in range(3):
            # All ones where the bit is set: there x is mirrored, elsewhere swapped with the axis.
            mirrored = -((axes[axis] >> bit) & 1)
            swap = (axes[0] ^ axes[axis]) & ~mirrored & below
            axes[0] = axes[0] ^ (swap | (mirrored & below))
            if axis:
                axes[axis] = axes[axis] ^ swap
    code = _interleave(*axes)
    # Gray code to binary: each bit is the parity of those above it.
    for shift in (1, 2, 4, 8, 16, 32):
        code = code ^ (code >> shift)
    return code


def curve_codes(grid_coord: Tensor, batch: Tensor, depth: int) -> Tensor:
    """Codes (4, N) int64 of voxels: place on the curve plus ``batch << 3 * depth``.

    Args:
        grid_coord: (N, 3) int64 in [0, 2**depth).
        batch: (N,) int64, cloud of each row, at most 32,767.
        depth: Bits per coordinate, 1 to 16; the Hilbert curve depends on it.
    """
    if not 1 <= depth <= _MAX_DEPTH:
        raise ValueError(f"depth={depth}: must be in [1, {_MAX_DEPTH}]")
    x, y, z = grid_coord.unbind(1)
    straight, swapped = _spread(x), _spread(y)
    low = _spread(z)
    plain = torch.stack(
        [(straight << 2) | (swapped << 1) | low, (swapped << 2) | (straight << 1) | low]
    )
    hilbert = _hilbert(torch.stack([x, y]), torch.stack([y, x]), z.expand(2, -1), depth)
    return torch.cat([plain, hilbert]) | (batch << (3 * depth))


@torch.no_grad()
def serialize(grid_coord: Tensor, batch: Tensor, depth: int | None = None) -> Serialization:
    """Order the points of a batch along the four curves, ties by row.

    Args:
        grid_coord: (N, 3) int64 >= 0.
        batch: (N,) int64, cloud of each row, ascending.
        depth: Bits per coordinate. By default as many as the largest voxel number of the batch
            needs, as in the released code: Hilbert orders of a cloud then depend on the extent of
            its companions. A given depth makes them the cloud's own.

    Raises:
        ValueError: The voxels do not fit ``depth``, or there are too many clouds.
    """
    needed = curve_depth(grid_coord)
    depth = needed if depth is None else depth
    # The default leaves a spare cell; a given depth only has to hold the voxels.
    if depth < needed and int(grid_coord.max()) >= 2**depth:
        raise ValueError(f"depth={depth}: the voxels of this batch need {needed}")
    if len(batch) and int(batch[-1]) >= _MAX_CLOUDS:
        raise ValueError(f"{int(batch[-1]) + 1} clouds: a batch may hold {_MAX_CLOUDS}")
    code = curve_codes(grid_coord, batch, depth)
    _, order = sort_stably(code)
    return Serialization(code, order, invert_order(order), depth)


def draw_orders(stages: int, generator: torch.Generator) -> Tensor:
    """Permutations (stages, 4) int64 of the four curves, one per stage of an encoder."""
    return torch.stack(
        [
            torch.randperm(CURVES, generator=generator, device=generator.device)
            for _ in range(stages)
        ]
    )
