"""Folders of posed RGB-D frames: nerfstudio's transforms.json, and ScanNet-style folders.

nerfstudio: transforms.json whose frames have depth_file_path (PNG of ``depth_unit_scale_factor``
metres a level, 0.001 by default, or .npy); camera to world with OpenGL axes.

ScanNet-style, poses camera to world with OpenCV axes, pixel centres at whole numbers:
```
color/<n>.jpg|png
depth/<n>.png                       uint16 millimetres, of any size with the images' shape
pose/<n>.txt|npy                    4 x 4
intrinsic/{intrinsic_color,intrinsic_depth}.txt|npy, or one file, or <n>.txt|npy      3 x 3 or 4 x 4
```
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.errors import DataError
from datamodules.image_transforms import decode_image
from datamodules.multiview.readers.transforms import frame_order, read_transforms
from datamodules.paired_2d3d.rgbd_files import read_depth, read_matrix
from datamodules.paired_2d3d.rgbd_frames import RgbdFrame, scale_intrinsics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_CAMERAS = "transforms.json"
_IMAGES, _DEPTHS, _MATRICES = (".jpg", ".jpeg", ".png"), (".png",), (".txt", ".npy")
_SHAPE_TOLERANCE = 0.02  # of width over height, between images and depth maps
_RIGID_TOLERANCE = 1e-2


class FrameFiles(NamedTuple):
    """Where the parts of one frame are.

    Attributes:
        name: of the frame.
        colour: image file.
        depth: depth map file.
        pose: (4, 4) camera to world, OpenCV axes.
        intrinsics: (3, 3) of an image of height 1 and width 1, pixel centres in their middle;
            None if ``intrinsics_file`` holds those of the image in pixels.
        intrinsics_file: see above; pixel centres at whole numbers.
        depth_intrinsics_file: the same of the depth map; None takes those of the image.
        unit: metres of one level of the depth map.
    """

    name: str
    colour: Path
    depth: Path
    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64] | None
    intrinsics_file: Path | None
    depth_intrinsics_file: Path | None
    unit: float


@dataclass(frozen=True)
class FrameFolder:
    """Frames of one folder, read from disk whenever they are passed.

    Attributes:
        files: of the usable frames, in order.
        skipped: frames that were left out because their pose is not finite.
        gap: every how manieth frame becomes an image of an item.
        cloud_gap: every how manieth frame adds to the cloud.
    """

    files: tuple[FrameFiles, ...]
    skipped: int
    gap: int = 1
    cloud_gap: int = 1

    def __post_init__(self) -> None:
        for name in ("gap", "cloud_gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 1; 1 takes all frames")

    def _uses(self) -> list[tuple[FrameFiles, bool, bool]]:
        """Frames that are used, and whether in items and in the cloud."""
        marked = [
            (files, row % self.gap == 0, row % self.cloud_gap == 0)
            for row, files in enumerate(self.files)
        ]
        return [mark for mark in marked if mark[1] or mark[2]]

    def __len__(self) -> int:
        """Frames that are used."""
        return len(self._uses())

    def __iter__(self) -> Iterator[RgbdFrame]:
        """Read the frames one after the other.

        Raises:
            DataError: naming the file, if one cannot be read or does not fit the others.
        """
        for files, in_items, in_cloud in self._uses():
            yield _read_frame(files, in_items, in_cloud)


def open_frames(folder: Path, gap: int = 1, cloud_gap: int = 1) -> FrameFolder:
    """Find the frames of a folder.

    Args:
        folder: of one scene, in one of the two layouts.
        gap: every how manieth usable frame becomes an image of an item.
        cloud_gap: every how manieth usable frame adds to the cloud.

    Raises:
        DataError: naming the file, if something is missing or wrong.
    """
    if (folder / _CAMERAS).is_file():
        files = _nerfstudio_files(folder)
    elif (folder / "color").is_dir():
        files = _scannet_files(folder)
    else:
        raise DataError(
            f"{folder}: no frames; expected transforms.json with depth_file_path (nerfstudio), or "
            "folders color, depth, pose and intrinsic (ScanNet)"
        )
    usable = tuple(frame for frame in files if np.isfinite(frame.pose).all())
    if not usable:
        raise DataError(f"{folder}: none of {len(files)} frames has a finite pose")
    for frame in usable:
        _check_pose(frame, folder)
    return FrameFolder(usable, len(files) - len(usable), gap, cloud_gap)


def _check_pose(frame: FrameFiles, folder: Path) -> None:
    turn = frame.pose[:3, :3]
    rigid = np.abs(turn @ turn.T - np.eye(3)).max() < _RIGID_TOLERANCE and np.linalg.det(turn) > 0
    if not rigid or not np.allclose(frame.pose[3], [0, 0, 0, 1], atol=1e-6):
        raise DataError(
            f"{folder}: the pose of frame {frame.name} is no rotation and translation; give "
            "camera-to-world matrices in metres"
        )


def _nerfstudio_files(folder: Path) -> list[FrameFiles]:
    path = folder / _CAMERAS
    photos = read_transforms(folder, path)
    cameras = photos.cameras
    if np.abs(cameras.distortion).max() > 1e-9:
        raise DataError(
            f"{path}: has lens distortion; undistort the images first (colmap image_undistorter)"
        )
    stated = json.loads(path.read_bytes())
    frames = sorted(stated["frames"], key=lambda frame: frame_order(frame["file_path"]))
    depths = [frame.get("depth_file_path") for frame in frames]
    without = sum(not isinstance(depth, str) for depth in depths)
    if without:
        raise DataError(
            f"{path}: {without} of {len(frames)} frames have no depth_file_path; export depth maps "
            "and name them, or remove these frames"
        )
    try:
        unit = float(stated.get("depth_unit_scale_factor", 1e-3))
    except (TypeError, ValueError):
        unit = 0.0
    if not 0 < unit < np.inf:
        raise DataError(f"{path}: depth_unit_scale_factor must be > 0, metres of one level")
    files = []
    for row, (name, depth) in enumerate(zip(photos.files, depths, strict=True)):
        place = _inside(folder, str(depth), path)
        across, down, x, y = cameras.intrinsics[row]
        matrix = np.array([[across, 0, x], [0, down, y], [0, 0, 1]])
        stem = f"{row:06d}"
        frame = FrameFiles(stem, folder / name, place, cameras.pose[row], matrix, None, None, unit)
        files.append(frame)
    _check_depths(files, path)
    return files


def _inside(folder: Path, name: str, stated_in: Path) -> Path:
    place = folder / name
    if not place.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{stated_in}: the path {name!r} leads out of the folder; correct it")
    return place


def _check_depths(files: list[FrameFiles], place: Path) -> None:
    missing = [frame.depth for frame in files if not frame.depth.is_file()]
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(files)} depth maps are missing, such as "
            f"{missing[0]}; add them, or remove their frames"
        )


def _scannet_files(folder: Path) -> list[FrameFiles]:
    images = _by_stem(folder / "color", _IMAGES)
    depths, poses = _by_stem(folder / "depth", _DEPTHS), _by_stem(folder / "pose", _MATRICES)
    if not images:
        raise DataError(f"{folder / 'color'}: no images; expected .jpg or .png files")
    for kind, found in (("depth", depths), ("pose", poses)):
        lacking = sorted(set(images) - set(found), key=frame_order)
        if lacking:
            raise DataError(
                f"{folder / kind}: {len(lacking)} of {len(images)} frames have no {kind} file, "
                f"such as {lacking[0]}; add it, or remove their images"
            )
    matrices = _by_stem(folder / "intrinsic", _MATRICES)
    shared = {stem: path for stem, path in matrices.items() if not stem.startswith("extrinsic")}
    colour = shared.get("intrinsic_color")
    if colour is None and len(shared) == 1:
        colour = next(iter(shared.values()))
    files = []
    for stem in sorted(images, key=frame_order):
        own = colour or shared.get(stem)
        if own is None:
            raise DataError(
                f"{folder / 'intrinsic'}: no intrinsics of frame {stem}; expected intrinsic_color, "
                "one file for all frames, or one for each"
            )
        pose = read_matrix(poses[stem], (4,))
        depth_own = shared.get("intrinsic_depth")
        parts = images[stem], depths[stem], pose, None, own, depth_own
        files.append(FrameFiles(stem, *parts, unit=1e-3))
    return files


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder with one of the endings, by their names without it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one beside color (ScanNet's layout)")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and path.is_file():
            if path.stem in found:
                raise DataError(f"{path}: a second file of frame {path.stem}; remove one")
            found[path.stem] = path
    return found


def _read_frame(files: FrameFiles, in_items: bool, in_cloud: bool) -> RgbdFrame:
    try:
        colour = np.asarray(decode_image(files.colour.read_bytes(), 3))
    except (OSError, ValueError) as error:
        raise DataError(f"{files.colour}: {error}; add or repair it") from error
    depth = read_depth(files.depth, files.unit)
    size, depth_size = (colour.shape[0], colour.shape[1]), (depth.shape[0], depth.shape[1])
    shapes = size[1] / size[0], depth_size[1] / depth_size[0]
    if abs(shapes[0] / shapes[1] - 1) > _SHAPE_TOLERANCE and files.depth_intrinsics_file is None:
        raise DataError(
            f"{files.depth}: {depth_size[1]} x {depth_size[0]} pixels do not fit an image of "
            f"{size[1]} x {size[0]}; resize one, or give intrinsic_depth"
        )
    if files.intrinsics is not None:
        intrinsics = scale_intrinsics(files.intrinsics, (1, 1), size)
    else:
        intrinsics = _pixel_intrinsics(files.intrinsics_file)
    if files.depth_intrinsics_file is not None:
        depth_intrinsics = _pixel_intrinsics(files.depth_intrinsics_file)
    else:
        depth_intrinsics = scale_intrinsics(intrinsics, size, depth_size)
    return RgbdFrame(
        name=files.name,
        colour=colour,
        depth=depth,
        pose=files.pose,
        intrinsics=intrinsics,
        depth_intrinsics=depth_intrinsics,
        in_items=in_items,
        in_cloud=in_cloud,
    )


def _pixel_intrinsics(path: Path | None) -> NDArray[np.float64]:
    """Intrinsics of a file that counts pixel centres as whole numbers."""
    if path is None:
        raise DataError("a frame has no intrinsics; add them")
    matrix = read_matrix(path, (3, 4))[:3, :3]
    if not np.isfinite(matrix).all() or not (np.diag(matrix) > 0).all():
        raise DataError(f"{path}: focal lengths must be > 0; give a matrix in pixels")
    if abs(matrix[0, 1]) > 1e-3 * matrix[0, 0]:
        raise DataError(f"{path}: has skew ({matrix[0, 1]:g}); only cameras without are supported")
    matrix[:2, 2] += 0.5
    return matrix
