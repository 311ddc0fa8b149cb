"""Captures with a transforms.json: nerfstudio, instant-ngp, DL3DV and Blender's synthetic scenes.

A frame's transform_matrix maps camera to world coordinates with OpenGL axes (y up, looking along
-z). Intrinsics stand at the top or in each frame: fl_x, fl_y, cx, cy, w, h in pixels, or the angle
of view camera_angle_x in radians. Frames are sorted by the numbers in their file names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import DataError
from datamodules.multiview.image_fit import stored_size
from datamodules.multiview.readers.photo_folders import PhotoFinder, PhotoFolders, PosedPhotos
from datamodules.multiview.readers.protocol import Cameras, SceneSplit
from datamodules.multiview.readers.scene_walk import walk_scenes
from datamodules.multiview.readers.split_folders import open_by_split

_FILE = "transforms.json"
_SPLIT_FILE = "transforms_train.json"
_DEEPEST = 4
_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
_MODELS = ("OPENCV", "FULL_OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
_REFUSED_TERMS = ("k3", "k4", "k5", "k6", "s1", "s2", "s3", "s4")


def _camera_file(folder: Path) -> Path | None:
    """File with the cameras of the scene in a folder, if it is one."""
    for name in (_FILE, _SPLIT_FILE):
        if (folder / name).is_file():
            return folder / name
    return None


def scene_folders(root: Path) -> list[Path]:
    """Sorted folders with a transforms.json (or transforms_train.json) at or below a root."""
    return walk_scenes(root, lambda folder: _camera_file(folder) is not None, _DEEPEST)


def open_transforms(root: Path) -> dict[SceneSplit, PhotoFolders]:
    """Open every scene below a root, by split where root/train, root/val or root/test hold them.

    Args:
        root: folder of one scene, or with scenes at most four folders deep.

    Returns:
        A reader for each split; "all" where the folders name no split.
    """
    if _camera_file(root) is not None:
        return {"all": _open([root], root.parent)}
    return open_by_split(root, scene_folders, _open)


def _open(folders: list[Path], root: Path) -> PhotoFolders:
    names = scene_names(folders, root)
    files = [file for folder in folders if (file := _camera_file(folder)) is not None]
    return PhotoFolders(names, folders, files, read_transforms)


def scene_names(folders: list[Path], root: Path) -> list[str]:
    """Names of scenes: of their folders, or of their paths where two folders share a name."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        return [folder.relative_to(root).as_posix() for folder in folders]
    return names


def frame_order(path: str) -> list[tuple[int, int, str]]:
    """Sorting key of a file name in which numbers count as numbers."""
    parts = re.split(r"(\d+)", path)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def read_transforms(folder: Path, file: Path) -> PosedPhotos:
    """Read the cameras of one scene and find its photographs.

    Args:
        folder: of the scene.
        file: transforms.json, or transforms_train.json beside transforms_test.json, whose frames
            then follow as held-out ones.

    Raises:
        DataError: one line naming the file, what is wrong with it and the remedy.
    """
    parts = [file]
    if file.name == _SPLIT_FILE:
        others = [file.with_name(f"transforms_{split}.json") for split in ("test", "val")]
        parts += [other for other in others if other.is_file()][:1]
    found = [_read_part(folder, part) for part in parts]
    cameras = [photos.cameras for photos in found]
    merged = Cameras(
        pose=np.concatenate([part.pose for part in cameras]),
        intrinsics=np.concatenate([part.intrinsics for part in cameras]),
        distortion=np.concatenate([part.distortion for part in cameras]),
        size=np.concatenate([part.size for part in cameras]),
        held_out=np.concatenate(
            [np.full(len(part), place > 0) for place, part in enumerate(cameras)]
        ),
    )
    return PosedPhotos(tuple(name for photos in found for name in photos.files), merged)


def _read_part(folder: Path, file: Path) -> PosedPhotos:
    try:
        stated = json.loads(file.read_bytes())
        frames = sorted(stated["frames"], key=lambda frame: frame_order(frame["file_path"]))
        paths = [str(frame["file_path"]) for frame in frames]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: expected frames with file_path ({error!r})") from error
    if not frames:
        raise DataError(f"{file}: no frames; add some or remove the file")
    files = PhotoFinder(folder, file).find(paths)
    rows = []
    for frame, name in zip(frames, files, strict=True):
        try:
            rows.append(_camera({**stated, **frame}, folder / name))
        except (KeyError, TypeError, ValueError, ArithmeticError, OSError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{file}: frame {frame['file_path']}: {reason}") from error
    pose, intrinsics, distortion, size = (np.array(part) for part in zip(*rows, strict=True))
    count = len(rows)
    return PosedPhotos(
        files, Cameras(pose, intrinsics, distortion, size, np.zeros(count, dtype=np.bool_))
    )


def _camera(frame: Mapping[str, Any], image: Path) -> tuple[Any, Any, Any, Any]:
    """Pose, normalised intrinsics, distortion and stated (height, width) of one frame.

    Args:
        frame: its own entries over those at the top of the file.
        image: its photograph, whose header is read where no size is stated.

    Raises:
        KeyError: if something is missing.
        ValueError: if something is unusable.
    """
    if "w" in frame and "h" in frame:
        height, width = float(frame["h"]), float(frame["w"])
    else:
        height, width = map(float, stored_size(image.read_bytes()))
    if min(height, width) < 1:
        raise ValueError(f"size {width:g} x {height:g}; expected w and h in pixels")
    focal = _focal_lengths(frame, height, width)
    centre = float(frame.get("cx", width / 2)), float(frame.get("cy", height / 2))
    pose = np.eye(4)
    pose[:3] = np.array(frame["transform_matrix"], dtype=np.float64)[:3]
    intrinsics = (focal[0] / width, focal[1] / height, centre[0] / width, centre[1] / height)
    size = (round(height), round(width))
    return pose @ _OPENGL_TO_OPENCV, intrinsics, _distortion(frame), size


def _focal_lengths(frame: Mapping[str, Any], height: float, width: float) -> tuple[float, float]:
    """Focal lengths in pixels; pixels are square unless told otherwise."""
    if "fl_x" in frame:
        across = float(frame["fl_x"])
        return across, float(frame.get("fl_y", across))
    if "camera_angle_x" not in frame:
        raise KeyError("fl_x or camera_angle_x")
    across = width / 2 / math.tan(float(frame["camera_angle_x"]) / 2)
    if "fl_y" in frame:
        return across, float(frame["fl_y"])
    if "camera_angle_y" in frame:
        return across, height / 2 / math.tan(float(frame["camera_angle_y"]) / 2)
    return across, across


def _distortion(frame: Mapping[str, Any]) -> tuple[float, ...]:
    """k1, k2, p1, p2; ValueError for lenses that these cannot describe."""
    model = frame.get("camera_model", "OPENCV")
    if model not in _MODELS or frame.get("is_fisheye"):
        raise ValueError(
            f"camera_model {'fisheye' if frame.get('is_fisheye') else model} is not supported; "
            f"undistort the images (colmap image_undistorter) and use {' or '.join(_MODELS[:3])}"
        )
    for term in _REFUSED_TERMS:
        if float(frame.get(term, 0)) != 0:
            raise ValueError(
                f"distortion {term}={frame[term]} is not supported, only k1, k2, p1, p2; "
                "undistort the images (colmap image_undistorter)"
            )
    return tuple(float(frame.get(term, 0)) for term in ("k1", "k2", "p1", "p2"))
