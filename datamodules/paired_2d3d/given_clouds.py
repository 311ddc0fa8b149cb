"""Clouds that come with the frames, such as the vertices of a mesh, completed from the frames."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodules.cloud_files import read_cloud
from datamodules.paired_2d3d.cloud_fusion import Cloud
from datamodules.paired_2d3d.normals import neighbour_normals
from datamodules.paired_2d3d.visibility import find_visible

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datamodules.paired_2d3d.rgbd_frames import FrameSource, RgbdFrame

_NEIGHBOURS = 12
_GREY = 128  # of points that no image shows


def load_cloud(path: Path, frames: FrameSource | Sequence[RgbdFrame], tolerance: float) -> Cloud:
    """Read a cloud in the world of the frames' poses; what it lacks is taken from the frames.

    Colours are means over the images that show a point; normals are fitted to the nearest points
    and look at the cameras that see them, or else at the middle of all cameras.

    Args:
        path: PLY, LAS or npz file, or a folder with coord.npy.
        frames: of the scene.
        tolerance: of the depth test, metres.

    Raises:
        DataError: if the cloud cannot be read.
    """
    points = read_cloud(path)
    coord = points.coord
    if points.colour is not None and points.normal is not None:
        return Cloud(coord.astype(np.float32), points.colour, points.normal)
    colour, towards, seen = np.zeros_like(coord), np.zeros_like(coord), np.zeros((len(coord), 1))
    centres = []
    for frame in frames:
        sightings = find_visible(coord, frame, tolerance)
        column, row = sightings.pixel.T
        colour[sightings.point] += frame.colour[row, column]
        towards[sightings.point] += frame.pose[:3, 3] - coord[sightings.point]
        seen[sightings.point] += 1
        centres.append(frame.pose[:3, 3])
    unseen = seen[:, 0] == 0
    towards[unseen] = np.mean(centres, 0) - coord[unseen]
    colour = np.where(unseen[:, None], _GREY, colour / np.maximum(seen, 1))
    if points.colour is not None:
        colour = points.colour.astype(np.float64)
    normal = points.normal
    if normal is None:
        normal = neighbour_normals(coord, towards, _NEIGHBOURS).astype(np.float32)
    return Cloud(coord.astype(np.float32), np.rint(colour).astype(np.uint8), normal)
