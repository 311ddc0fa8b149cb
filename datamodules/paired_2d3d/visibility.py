"""Which points of a cloud an image shows, by projection and a test against its depth map."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.paired_2d3d.rgbd_frames import pixels_of, project

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.rgbd_frames import RgbdFrame


class Sightings(NamedTuple):
    """M points that an image shows.

    Attributes:
        point: (M,) int64 rows of the cloud, ascending.
        pixel: (M, 2) int64 column and row of the image.
    """

    point: NDArray[np.int64]
    pixel: NDArray[np.int64]


def find_visible(coord: NDArray[np.float64], frame: RgbdFrame, tolerance: float) -> Sightings:
    """Points that project into an image and lie on the surface that its depth map measured.

    A point is seen where its depth differs from the map's by less than the tolerance (Concerto,
    arXiv 2510.23607, section 3: 1 cm). The map is read both at the pixel that holds the point and
    between the four nearest centres, where inverse depth is linear on a plane: a slanted surface
    is then no deeper at the point than at the pixel's centre.

    Args:
        coord: (N, 3) points in the world, metres.
        frame: depth map, image size and camera.
        tolerance: metres.
    """
    place, depth = project(coord, frame.pose, frame.intrinsics)
    inside, pixel = pixels_of(place, (frame.colour.shape[0], frame.colour.shape[1]))
    point = np.flatnonzero(inside)
    at_depth, _ = project(coord[point], frame.pose, frame.depth_intrinsics)
    held, cell = pixels_of(at_depth, (frame.depth.shape[0], frame.depth.shape[1]))
    measured = np.where(held, frame.depth[cell[:, 1], cell[:, 0]], 0)
    seen = (measured > 0) & (np.abs(measured - depth[point]) < tolerance)
    between = _between_centres(frame.depth, at_depth)
    seen |= held & (np.abs(between - depth[point]) < tolerance)
    return Sightings(point[seen], pixel[point[seen]])


def _between_centres(depth: NDArray[np.float32], place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Depth (P,) at places (P, 2) from the four nearest pixels; infinite where one is unknown."""
    height, width = depth.shape
    if min(height, width) < 2:
        return np.full(len(place), np.inf)
    inner = np.clip(np.nan_to_num(place) - 0.5, 0, (width - 1, height - 1))
    corner = np.minimum(np.floor(inner), (width - 2, height - 2)).astype(np.int64)
    across, down = (inner - corner).T
    with np.errstate(divide="ignore"):
        inverse = np.where(depth > 0, 1 / depth.astype(np.float64), np.nan)
    column, row = corner.T
    upper = (1 - across) * inverse[row, column] + across * inverse[row, column + 1]
    lower = (1 - across) * inverse[row + 1, column] + across * inverse[row + 1, column + 1]
    mixed = (1 - down) * upper + down * lower
    return np.where(mixed > 0, 1 / np.where(mixed > 0, mixed, 1), np.inf)
