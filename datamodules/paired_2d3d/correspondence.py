"""Links between pixels and points: which patch of a photograph saw a point."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.patch_grid import PatchGrid
    from datamodules.paired_2d3d.scene_tree import SceneTree


def read_places(
    tree: SceneTree,
    path: str,
    image_size: tuple[int, int],
    grid: PatchGrid,
    rows: NDArray[np.int64],
    num_points: int,
) -> NDArray[np.float32]:
    """Places in units of patches at which a photograph saw points (arXiv 2510.23607, section 3).

    Args:
        tree: the root.
        path: file of rows (u = column, v = row, point), in pixels of the image as stored; of
            several rows of a point the last counts, and rows with point -1 mean nothing.
        image_size: height and width of this very image, pixels.
        grid: patches of every image.
        rows: (n,) points to look up, of the cloud as stored.
        num_points: points of the cloud as stored.

    Returns:
        (n, 2) float32 fractional row and column; (-1, -1) where the point is not seen.

    Raises:
        DataError: naming the file, if it cannot be read or names points that do not exist.
    """
    links = np.asarray(tree.array(path, 3))
    point = links[:, 2].astype(np.float64)
    if not (point < num_points).all():
        raise DataError(
            f"{tree.root / path}: names point {point.max():.0f} of a cloud of {num_points}; write "
            "the cloud and its correspondences anew"
        )
    used = np.flatnonzero(point >= 0)
    last = np.full(num_points, -1, dtype=np.int64)
    # Assignments run in order, so the last of several rows of a point stays.
    last[point[used].astype(np.int64)] = used
    link = last[rows]
    seen = np.flatnonzero(link >= 0)
    chosen = links[link[seen], :2].astype(np.float32)
    places = np.full((len(rows), 2), -1, dtype=np.float32)
    places[seen] = grid.locate(chosen[:, 0], chosen[:, 1], *image_size)
    return places
