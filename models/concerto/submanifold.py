"""Submanifold 3x3x3 convolution of sparse voxels (arXiv 1706.01307), deterministic, torch alone.

Only occupied voxels get an output, and only they contribute. When several rows share a voxel, their
first row stands for it as a neighbour: row i reads the first row of each neighbouring voxel, and
only the first row of a voxel reads, from the voxels that precede it (x, then y, then z), all of
their rows. The centre tap reads the own row alone. This is the rule of spconv's CPU kernel, whose
CUDA kernel takes whichever row wins a race.

Letters in shape comments: N rows, U occupied voxels, M pairs of neighbouring voxels.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.concerto.ordering import group_rows

TAPS = 27
_CENTRE = 13
# Voxels whose inputs and outputs of some 50 channels fit into a core's second-level cache.
_BLOCK = 4096


class NeighbourPairs(NamedTuple):
    """Neighbouring occupied voxels, numbered in the order of (cloud, x, y, z).

    Attributes:
        here: (M,) int64 voxels, grouped by offset, ascending in each group. Only the 13 offsets
            that are lexicographically positive are listed, in their order: taps 14 to 26 of the
            kernel. Tap 26 - k is the mirror of tap k.
        there: (M,) int64 voxel at ``here`` plus the offset.
        spans: Tap, start and end of runs of pairs, in the order of work.
        first: (U,) int64 first row of each voxel; None if row i is voxel i.
        voxel: (N,) int64 voxel of each row; None likewise.
        by_voxel: (N,) int64 rows sorted by voxel; None if no two rows share a voxel.
    """

    here: Tensor
    there: Tensor
    spans: tuple[tuple[int, int, int], ...]
    first: Tensor | None
    voxel: Tensor | None
    by_voxel: Tensor | None


def voxel_keys(grid_coord: Tensor, batch: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Number the cells of a batch so that keys sort by (cloud, x, y, z).

    One empty layer of cells separates neighbours in y, in z and in clouds.

    Returns:
        Keys (N,) int64 and the steps of the key along x and along y.
    """
    if not len(grid_coord):
        return batch, (1, 1)
    x_size, y_size, z_size = (int(size) + 2 for size in grid_coord.amax(0))
    x, y, z = grid_coord.unbind(1)
    return ((batch * x_size + x) * y_size + y) * z_size + z, (y_size * z_size, z_size)


@torch.no_grad()
def neighbour_pairs(grid_coord: Tensor, batch: Tensor) -> NeighbourPairs:
    """Find the pairs of neighbouring voxels of a batch, by sorting.

    Args:
        grid_coord: (N, 3) int64 >= 0.
        batch: (N,) int64, cloud of each row.
    """
    keys, steps = voxel_keys(grid_coord, batch)
    if bool((keys.diff() > 0).all()):
        return NeighbourPairs(*_pairs(keys, *steps), None, None, None)
    groups = group_rows(keys)
    first = groups.rows.index_select(0, groups.starts)
    shared = groups.rows if len(first) < len(keys) else None
    return NeighbourPairs(*_pairs(groups.keys, *steps), first, groups.group, shared)


def _pairs(
    keys: Tensor, x_step: int, y_step: int
) -> tuple[Tensor, Tensor, tuple[tuple[int, int, int], ...]]:
    """Pairs of ascending keys (U,) that differ by one of the 13 positive offsets, and spans."""
    last = len(keys) - 1
    near = (keys.diff() == 1).nonzero()[:, 0]
    here, there = [near], [near + 1]
    for step in (y_step, x_step - y_step, x_step, x_step + y_step):
        # The three cells of a column follow one another, so one search finds them all.
        place = torch.searchsorted(keys, keys + (step - 1))
        for dz in (-1, 0, 1):
            found = keys.index_select(0, place.clamp(max=last)) == keys + (step + dz)
            here.append(found.nonzero()[:, 0])
            there.append(place.index_select(0, here[-1]))
            place = place + found
    return torch.cat(here), torch.cat(there), _spans(here, len(keys))


def _spans(here: list[Tensor], voxels: int) -> tuple[tuple[int, int, int], ...]:
    """Runs of pairs whose voxels lie close together.

    On a CPU all taps are applied to one block of voxels before the next, so that the block stays
    in the cache; elsewhere a tap is applied at once.
    """
    block = _BLOCK if here[0].device.type == "cpu" else max(voxels, 1)
    borders = torch.arange(0, voxels + block, block, device=here[0].device)
    ends = torch.stack([torch.searchsorted(rows, borders) for rows in here]).tolist()
    before = [0, *accumulate(len(rows) for rows in here)]
    return tuple(
        (_CENTRE + 1 + tap, before[tap] + row[number], before[tap] + row[number + 1])
        for number in range(len(borders) - 1)
        for tap, row in enumerate(ends)
        if row[number] < row[number + 1]
    )


def _first_rows(x: Tensor, pairs: NeighbourPairs) -> Tensor:
    """First row (U, C) of each voxel."""
    return x if pairs.first is None else x.index_select(0, pairs.first)


def _all_rows(x: Tensor, first: Tensor, pairs: NeighbourPairs) -> Tensor:
    """Sum of the rows (U, C) of each voxel; ``first`` itself if each voxel has one row."""
    if pairs.by_voxel is None or pairs.voxel is None:
        return first
    sizes = pairs.voxel.bincount(minlength=len(first))
    rows = x.index_select(0, pairs.by_voxel)
    rows = rows.to(torch.promote_types(x.dtype, torch.float32))
    return torch.segment_reduce(rows, "sum", lengths=sizes, unsafe=True).to(x.dtype)


class _Totals:
    """Sums that voxels gather, on their way to rows.

    Args:
        rows: (N, C) to add to; itself the sum where row i is voxel i.
        pairs: Of the batch.
    """

    def __init__(self, rows: Tensor, pairs: NeighbourPairs) -> None:
        self.rows, self.pairs = rows, pairs
        kind = torch.promote_types(rows.dtype, torch.float32)
        direct = pairs.first is None and rows.dtype == kind
        voxels = len(rows if pairs.first is None else pairs.first)
        #: (U, C) for all rows of each voxel, and for its first row only.
        self.every = rows if direct else rows.new_zeros(voxels, rows.shape[1], dtype=kind)
        self.first = self.every if pairs.by_voxel is None else torch.zeros_like(self.every)

    def spread(self) -> Tensor:
        """The rows with all sums added, in place."""
        if self.every is self.rows:
            return self.rows
        if self.first is not self.every and self.pairs.first is not None:
            self.rows.index_add_(0, self.pairs.first, self.first.to(self.rows.dtype))
        voxel = self.pairs.voxel
        return self.rows.add_(self.every if voxel is None else self.every.index_select(0, voxel))


class _Workspace:
    """Memory that all spans of one call use in turn, so that none is asked for in the loop."""

    def __init__(self, pairs: NeighbourPairs, *tables: Tensor) -> None:
        longest = max((end - start for _, start, end in pairs.spans), default=0)
        self.buffers = [table.new_empty(longest, table.shape[1]) for table in tables]

    def gather(self, slot: int, table: Tensor, rows: Tensor) -> Tensor:
        """Rows of a table, in the buffer of that number."""
        return torch.index_select(table, 0, rows, out=self.buffers[slot][: len(rows)])

    def add_product(
        self, slot: int, total: Tensor, rows: Tensor, values: Tensor, weight: Tensor
    ) -> None:
        """Add ``values @ weight`` to rows of ``total``; each row may appear once."""
        product = torch.mm(values, weight, out=self.buffers[slot][: len(rows)])
        total.index_add_(0, rows, product.to(total.dtype))


class _TapGradients:
    """Gradient (out, 27, in) of the kernel, tap by tap; nothing is cleared that is written."""

    def __init__(self, taps: Tensor) -> None:
        self.total = torch.empty_like(taps)
        self.unseen = set(range(TAPS))

    def add(self, tap: int, gradient: Tensor, values: Tensor) -> None:
        """Add the outer products of rows (p, out) and rows (p, in)."""
        if tap in self.unseen:
            self.unseen.remove(tap)
            torch.mm(gradient.T, values, out=self.total[:, tap])
        else:
            self.total[:, tap].addmm_(gradient.T, values)

    def finish(self) -> Tensor:
        """The gradient, zero for the taps without pairs."""
        for tap in self.unseen:
            self.total[:, tap] = 0
        return self.total


class _Convolution(torch.autograd.Function):
    """Submanifold convolution of rows; saves nothing but its inputs.

    Within a tap every voxel is read once and written once, so no sum depends on the order of
    additions, on any device. Sums over taps are kept in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        pairs: NeighbourPairs,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.pairs = pairs
        taps = weight.flatten(1, 3)  # (out, 27, in)
        totals = _Totals(torch.addmm(bias, x, taps[:, _CENTRE].T), pairs)
        first = _first_rows(x, pairs)
        every = _all_rows(x, first, pairs)
        work = _Workspace(pairs, x, totals.rows)
        for tap, start, end in pairs.spans:
            here, there = pairs.here[start:end], pairs.there[start:end]
            work.add_product(1, totals.every, here, work.gather(0, first, there), taps[:, tap].T)
            mirror = taps[:, TAPS - 1 - tap].T
            work.add_product(1, totals.first, there, work.gather(0, every, here), mirror)
        return totals.spread()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        pairs: NeighbourPairs = ctx.pairs
        taps = weight.flatten(1, 3)  # (out, 27, in)
        kernel = _TapGradients(taps)
        kernel.add(_CENTRE, gradient, x)
        totals = _Totals(gradient @ taps[:, _CENTRE], pairs)
        first, g_first = _first_rows(x, pairs), _first_rows(gradient, pairs)
        every, g_every = _all_rows(x, first, pairs), _all_rows(gradient, g_first, pairs)
        work = _Workspace(pairs, x, gradient, x)
        for tap, start, end in pairs.spans:
            here, there = pairs.here[start:end], pairs.there[start:end]
            for index, total, sources, g_sources, rows, g_rows in (
                (tap, totals.first, first, g_every, there, here),
                (TAPS - 1 - tap, totals.every, every, g_first, here, there),
            ):
                g = work.gather(1, g_sources, g_rows)
                kernel.add(index, g, work.gather(0, sources, rows))
                work.add_product(2, total, rows, g, taps[:, index])
        return totals.spread(), kernel.finish().view_as(weight), gradient.sum(0), None


class SubmanifoldConv3d(nn.Module):
    """3x3x3 submanifold convolution (cross-correlation) with bias.

    Args:
        in_channels: Channels of the input rows.
        out_channels: Channels of the output rows.

    Attributes:
        weight: (out, 3, 3, 3, in); tap (i, j, k) reads the voxel at (i - 1, j - 1, k - 1).
        bias: (out,).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, 3, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, pairs: NeighbourPairs) -> Tensor:
        """Convolve rows (N, in): (N, out), in the autocast type where one is active."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(kind), weight.to(kind), bias.to(kind)
        out: Tensor = _Convolution.apply(x, weight, bias, pairs)
        return out
