"""The Middlebury motorcycle of scikit-image as paired data: a real cloud and its two photographs.

The pair belongs to the Middlebury stereo data of 2014 (Scharstein et al., GCPR 2014) and is read
from an installed scikit-image: 741 x 500 pixels, measured disparity at 343,000 pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.paired_2d3d.cloud_fusion import Cloud
from datamodules.paired_2d3d.normals import depth_normals
from datamodules.paired_2d3d.rgbd_frames import (
    RgbdFrame,
    back_project,
    project,
    scale_intrinsics,
    to_world,
)
from datamodules.paired_2d3d.scene_writing import ConversionOptions, convert_scene, write_split
from datamodules.written_once import ensure_written

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMAT = 1
_FILES = ("motorcycle_left.png", "motorcycle_right.png", "motorcycle_disp.npz")

# Calibration of the images as scikit-image holds them (docstring of stereo_motorcycle).
FOCAL = 994.978  # pixels
CENTRE = (311.193, 254.877)  # pixels, left camera; pixel centres at whole numbers
CENTRE_SHIFT = 31.086  # pixels, right camera's column of the principal point minus the left's
BASELINE = 0.193001  # metres

# Left camera to a world whose z axis points up: its x axis, its depth, and its y axis reversed.
_UPRIGHT = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])


def motorcycle_tree(
    folder: Path, scale: float = 1.0, grid_size: float | None = None, tolerance: float = 0.02
) -> Path:
    """Make sure that the motorcycle lies on disk as a tree of one scene, and say where.

    Args:
        folder: for caches of any arguments; made if missing.
        scale: size of photographs and depth map, of those of scikit-image; a cloud has
            343,000 points at 1 and a quarter of these at 0.5.
        grid_size: metres between the points of the cloud; None keeps one point a pixel.
        tolerance: of the depth test, metres.

    Returns:
        Root with the split "train", whose item has the left and the right photograph.

    Raises:
        ValueError: if a number is out of range.
        DataError: if scikit-image is missing, or the folder cannot be written.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale={scale}: must be > 0 and at most 1")
    stated = json.dumps([_FORMAT, scale, grid_size, tolerance])
    digest = hashlib.sha256(stated.encode())
    for name in ("cloud_fusion", "motorcycle", "normals", "rgbd_frames", "scene_writing"):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    options = ConversionOptions(grid_size=grid_size or 0.02, tolerance=tolerance)
    write = partial(_write, scale=scale, one_per_pixel=grid_size is None, options=options)
    return ensure_written(folder / f"motorcycle-{digest.hexdigest()[:12]}", write)


def motorcycle_frames(scale: float = 1.0) -> tuple[RgbdFrame, RgbdFrame]:
    """Left and right photograph, in a world with the left camera at the origin and z up.

    The left depth map comes from the measured disparity. The right one is the left one as seen
    from the right camera and serves the depth test alone.

    Args:
        scale: size, of that of the files.

    Raises:
        DataError: if scikit-image is missing.
    """
    left, right, disparity = _read_pair()
    size = (left.shape[0], left.shape[1])
    small = (round(size[0] * scale), round(size[1] * scale))
    with np.errstate(invalid="ignore"):
        depth = BASELINE * FOCAL / (disparity + CENTRE_SHIFT)
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
    rows = ((np.arange(small[0]) + 0.5) * size[0] / small[0]).astype(int)
    columns = ((np.arange(small[1]) + 0.5) * size[1] / small[1]).astype(int)
    depth = depth[rows][:, columns]
    intrinsics = _intrinsics(0.0, size, small)
    pose = _UPRIGHT.copy()
    pose[0, 3] = BASELINE
    first = _frame("left", _resize(left, small), depth, _UPRIGHT, intrinsics)
    other = _frame("right", _resize(right, small), depth, pose, _intrinsics(1.0, size, small))
    points = to_world(back_project(depth, intrinsics)[depth > 0], _UPRIGHT)
    return first, _as_seen(other, points)


def _frame(
    name: str,
    colour: NDArray[np.uint8],
    depth: NDArray[np.float32],
    pose: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
) -> RgbdFrame:
    return RgbdFrame(
        name=name,
        colour=colour,
        depth=depth,
        pose=pose,
        intrinsics=intrinsics,
        depth_intrinsics=intrinsics,
        in_cloud=name == "left",
    )


def _intrinsics(right: float, size: tuple[int, int], small: tuple[int, int]) -> NDArray[np.float64]:
    """Intrinsics of the left (0) or right (1) camera, pixel centres at half-integers."""
    x, y = CENTRE[0] + right * CENTRE_SHIFT + 0.5, CENTRE[1] + 0.5
    return scale_intrinsics(np.array([[FOCAL, 0, x], [0, FOCAL, y], [0, 0, 1]]), size, small)


def _as_seen(frame: RgbdFrame, points: NDArray[np.float64]) -> RgbdFrame:
    """The frame with the depth of the nearest of the points (P, 3) at each pixel.

    Each point fills the two by two pixels whose centres are around it, as neighbouring points
    move apart on surfaces that the other camera sees at a steeper angle.
    """
    height, width = frame.depth.shape
    place, depth = project(points, frame.pose, frame.intrinsics)
    corner = np.floor(place - 0.5).astype(np.int64)
    nearest = np.full((height, width), np.inf, dtype=np.float32)
    for right in (0, 1):
        for below in (0, 1):
            column, row = corner[:, 0] + right, corner[:, 1] + below
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            np.minimum.at(nearest, (row[inside], column[inside]), depth[inside].astype("f4"))
    nearest[np.isinf(nearest)] = 0
    return replace(frame, depth=nearest)


def _write(root: Path, scale: float, one_per_pixel: bool, options: ConversionOptions) -> None:
    frames = motorcycle_frames(scale)
    cloud = _pixel_cloud(frames[0]) if one_per_pixel else None
    items = convert_scene(frames, root, "train", "motorcycle", options, cloud)
    write_split(root, "train", items)


def _pixel_cloud(frame: RgbdFrame) -> Cloud:
    """One point for every pixel with a depth, in the order of the pixels."""
    known = frame.depth > 0
    normal = depth_normals(frame.depth, frame.depth_intrinsics)[known] @ frame.pose[:3, :3].T
    coord = to_world(back_project(frame.depth, frame.depth_intrinsics)[known], frame.pose)
    return Cloud(coord.astype(np.float32), frame.colour[known], normal.astype(np.float32))


def _resize(photo: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    if photo.shape[:2] == size:
        return photo
    resized = Image.fromarray(photo).resize((size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(resized)


def _read_pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Left and right photograph (500, 741, 3) and disparity (500, 741) in pixels, NaN unknown."""
    from PIL import Image

    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the motorcycle is part of scikit-image, which is not installed; "
            'pip install -e ".[scenes]"'
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    missing = [name for name in _FILES if not (data / name).is_file()]
    if missing:
        raise DataError(f"{data}: lacks {', '.join(missing)}; install scikit-image >= 0.25")
    photos = []
    for name in _FILES[:2]:
        with Image.open(data / name) as photo:
            photos.append(np.asarray(photo.convert("RGB")))
    with np.load(data / _FILES[2], allow_pickle=False) as archive:
        disparity: NDArray[np.float32] = archive[archive.files[0]]
    return photos[0], photos[1], disparity
