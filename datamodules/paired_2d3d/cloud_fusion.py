"""A point cloud out of many depth maps: one point for every occupied cell of a grid.

Shape letters: N points of the cloud, S samples (pixels) of one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.errors import DataError
from datamodules.paired_2d3d.normals import depth_normals
from datamodules.paired_2d3d.rgbd_frames import back_project, colours_at_depth, to_world

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.rgbd_frames import RgbdFrame

_CELL_BITS = 21  # of a cell number along one axis
_TABLE = 1 << 22  # pairs of cell and label that are counted in a table instead of sorted
_MERGE_ROWS = 1 << 21  # samples that wait for being merged

# Columns of a sample or of a cell's running sums.
_PLACE, _OFFSET = slice(0, 3), 3  # metres; squared distance to the cell's centre, in cells
_COLOUR, _NORMAL, _COUNT, _SUMS = slice(4, 7), slice(7, 10), 10, slice(4, 11)


class Cloud(NamedTuple):
    """N points of a scene.

    Attributes:
        coord: (N, 3) float32, metres.
        color: (N, 3) uint8.
        normal: (N, 3) float32 unit vectors.
        segment: (N,) int64 classes, -1 unlabelled; None without labels.
        instance: (N,) int64 things, -1 none; None without.
    """

    coord: NDArray[np.float32]
    color: NDArray[np.uint8]
    normal: NDArray[np.float32]
    segment: NDArray[np.int64] | None = None
    instance: NDArray[np.int64] | None = None


class _Votes(NamedTuple):
    """Labels (S,) that were seen in cells (S,), and how often (S,)."""

    cell: NDArray[np.int64]
    label: NDArray[np.int64]
    times: NDArray[np.int64]


class CloudFusion:
    """Adds depth maps up to a cloud, in memory that grows with the cloud and not with the frames.

    Of all samples in a cell the one nearest to the cell's centre gives the point's place, which
    thereby lies on a measured surface; colour and normal are means, labels the most frequent.
    """

    def __init__(self, grid_size: float, depth_range: tuple[float, float] = (0.0, np.inf)) -> None:
        """Start with no point.

        Args:
            grid_size: side of a cell, metres.
            depth_range: nearest and farthest depth that is used, metres.
        """
        self.grid_size = grid_size
        self.depth_range = depth_range
        self._keys: list[NDArray[np.int64]] = []
        self._rows: list[NDArray[np.float64]] = []  # (S, 11), see _PLACE and what follows
        self._votes: dict[str, list[_Votes]] = {}
        self._waiting = 0

    def add(self, frame: RgbdFrame) -> None:
        """Add all pixels of a frame whose depth and colour are known.

        Raises:
            DataError: if the world is too large for the grid.
        """
        colours, coloured = colours_at_depth(frame)
        low, high = self.depth_range
        used = (frame.depth > low) & (frame.depth <= high) & coloured
        points = back_project(frame.depth, frame.depth_intrinsics)[used]
        normal = depth_normals(frame.depth, frame.depth_intrinsics)[used]
        rows = np.ones((len(points), 11))
        rows[:, _PLACE] = to_world(points, frame.pose)
        rows[:, _COLOUR] = colours[used]
        rows[:, _NORMAL] = normal @ frame.pose[:3, :3].T
        cell = np.floor(rows[:, _PLACE] / self.grid_size)
        rows[:, _OFFSET] = ((rows[:, _PLACE] / self.grid_size - cell - 0.5) ** 2).sum(1)
        key = self._cell_keys(cell, frame.name)
        self._rows.append(rows)
        self._keys.append(key)
        for name, labels in (("segment", frame.segment), ("instance", frame.instance)):
            if labels is not None:
                votes = _Votes(key, labels[used].astype(np.int64), np.ones_like(key))
                self._votes.setdefault(name, []).append(votes)
        self._waiting += len(key)
        if self._waiting > _MERGE_ROWS:
            self._merge()

    def finish(self) -> Cloud:
        """The cloud, ordered by cell.

        Raises:
            DataError: if no pixel had a depth.
        """
        if sum(map(len, self._keys)) == 0:
            raise DataError("no pixel of any frame has a depth; check depth maps and depth range")
        self._merge()
        key, rows = self._keys[0], self._rows[0]
        normal = rows[:, _NORMAL]
        length = np.linalg.norm(normal, axis=1, keepdims=True)
        normal = np.where(length > 1e-9, normal / np.maximum(length, 1e-9), (0.0, 0.0, 1.0))
        labels = {name: _winners(votes[0], key) for name, votes in self._votes.items()}
        return Cloud(
            rows[:, _PLACE].astype(np.float32),
            np.rint(rows[:, _COLOUR] / rows[:, _COUNT, None]).astype(np.uint8),
            normal.astype(np.float32),
            labels.get("segment"),
            labels.get("instance"),
        )

    def _cell_keys(self, cell: NDArray[np.float64], name: str) -> NDArray[np.int64]:
        limit = 1 << (_CELL_BITS - 1)
        if not (np.abs(cell) < limit).all():
            raise DataError(
                f"frame {name}: points lie {np.abs(cell).max() * self.grid_size:.3g} m from the "
                f"origin, beyond {limit * self.grid_size:.3g} m; check pose and depth unit, or "
                "choose a larger grid size"
            )
        x, y, z = (cell.astype(np.int64) + limit).T
        keys: NDArray[np.int64] = (x << 2 * _CELL_BITS) | (y << _CELL_BITS) | z
        return keys

    def _merge(self) -> None:
        """Reduce all rows to one a cell."""
        key, rows = np.concatenate(self._keys), np.concatenate(self._rows)
        order = np.argsort(key, kind="stable")
        key, rows = key[order], rows[order]
        first = _starts(key)
        nearest = np.minimum.reduceat(rows[:, _OFFSET], first)
        size = np.diff(first, append=len(key))
        best = np.flatnonzero(rows[:, _OFFSET] == np.repeat(nearest, size))
        best = best[np.searchsorted(best, first)]  # the first of several that are as near
        merged = rows[best]
        merged[:, _SUMS] = np.add.reduceat(rows[:, _SUMS], first)
        self._keys, self._rows, self._waiting = [key[first]], [merged], 0
        for name, votes in self._votes.items():
            self._votes[name] = [_count_votes(votes, self._keys[0])]


def _starts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows at which a new value starts, of sorted values."""
    return np.flatnonzero(np.diff(values, prepend=values[:1] - 1))


def _count_votes(votes: list[_Votes], key: NDArray[np.int64]) -> _Votes:
    """Each pair of cell and label once, ordered by cell, then by label.

    Args:
        votes: of cells in ``key``.
        key: (N,) all cells, ascending.
    """
    cell, label, count = (np.concatenate(part) for part in zip(*votes, strict=True))
    low = label.min()
    span = label.max() - low + 1
    code = np.searchsorted(key, cell) * span + (label - low)
    if len(key) * span <= _TABLE:
        table = np.bincount(code, weights=count, minlength=1)
        code = np.flatnonzero(table)
        counted = table[code].astype(np.int64)
    else:
        order = np.argsort(code, kind="stable")
        first = _starts(code[order])
        counted = np.add.reduceat(count[order], first)
        code = code[order][first]
    return _Votes(key[code // span], code % span + low, counted)


def _winners(votes: _Votes, key: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most frequent label (N,) in each cell of ``key`` (ascending), the lowest at a tie."""
    order = np.lexsort((votes.label, -votes.times, votes.cell))
    cell = votes.cell[order]
    first = _starts(cell)
    labels = np.full(len(key), -1, dtype=np.int64)
    labels[np.searchsorted(key, cell[first])] = votes.label[order][first]
    return labels
