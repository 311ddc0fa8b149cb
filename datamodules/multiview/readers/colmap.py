"""Captures reconstructed with COLMAP: a sparse model beside the photographs (needs pycolmap)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import DataError
from datamodules.multiview.readers.photo_folders import PhotoFinder, PhotoFolders, PosedPhotos
from datamodules.multiview.readers.protocol import Cameras, SceneSplit
from datamodules.multiview.readers.scene_walk import walk_scenes
from datamodules.multiview.readers.split_folders import open_by_split
from datamodules.multiview.readers.transforms import frame_order, scene_names

_MODELS = ("sparse/0", "sparse", "colmap/sparse/0", "dense/sparse")
_CAMERA_FILES = ("images.bin", "images.txt")
_DEEPEST = 3
# Places of fx, fy, cx, cy, k1, k2, p1, p2 among a model's parameters; -1 for one it does not have.
_PARAMETERS = {
    "SIMPLE_PINHOLE": (0, 0, 1, 2, -1, -1, -1, -1),
    "PINHOLE": (0, 1, 2, 3, -1, -1, -1, -1),
    "SIMPLE_RADIAL": (0, 0, 1, 2, 3, -1, -1, -1),
    "RADIAL": (0, 0, 1, 2, 3, 4, -1, -1),
    "OPENCV": (0, 1, 2, 3, 4, 5, 6, 7),
}


def model_file(folder: Path) -> Path | None:
    """File with the poses of the sparse model in a scene's folder, if there is one."""
    for place in _MODELS:
        for name in _CAMERA_FILES:
            if (folder / place / name).is_file():
                return folder / place / name
    return None


def scene_folders(root: Path) -> list[Path]:
    """Sorted folders with a sparse model, at or at most three below a root."""
    return walk_scenes(root, lambda folder: model_file(folder) is not None, _DEEPEST)


def open_colmap(root: Path) -> dict[SceneSplit, PhotoFolders]:
    """Open every sparse model below a root, by split where its folders name one.

    Raises:
        DataError: if pycolmap is not installed.
    """
    _pycolmap()
    return open_by_split(root, scene_folders, _open)


def _open(folders: list[Path], root: Path) -> PhotoFolders:
    files = [file for folder in folders if (file := model_file(folder)) is not None]
    return PhotoFolders(scene_names(folders, root), folders, files, read_colmap)


def _pycolmap() -> Any:  # noqa: ANN401 - an optional module
    try:
        return importlib.import_module("pycolmap")
    except ImportError as error:
        raise DataError(
            "reading COLMAP models needs pycolmap, which is not installed; run "
            "'pip install pycolmap', or convert the capture to transforms.json"
        ) from error


def read_colmap(folder: Path, file: Path) -> PosedPhotos:
    """Read the cameras of one sparse model and find its photographs below folder/images.

    Args:
        folder: of the scene.
        file: of the sparse model.

    Raises:
        DataError: one line naming the file, what is wrong with it and the remedy.
    """
    try:
        model = _pycolmap().Reconstruction(str(file.parent))
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file.parent}: pycolmap cannot read the model ({reason})") from error
    images = [image for image in model.images.values() if getattr(image, "has_pose", True)]
    images.sort(key=lambda image: frame_order(image.name))
    if not images:
        raise DataError(f"{file}: no image with a pose; reconstruct the capture again")
    files = PhotoFinder(folder, file).find([f"images/{image.name}" for image in images])
    rows = [_camera(model.cameras[image.camera_id], file) for image in images]
    lenses, sizes = (np.array(part) for part in zip(*rows, strict=True))
    height, width = sizes.T.astype(np.float64)
    cameras = Cameras(
        pose=np.stack([_pose(image) for image in images]),
        intrinsics=lenses[:, :4] / np.stack([width, height, width, height], axis=1),
        distortion=lenses[:, 4:],
        size=sizes,
        held_out=np.zeros(len(images), dtype=np.bool_),
    )
    return PosedPhotos(files, cameras)


def _pose(image: Any) -> Any:  # noqa: ANN401 - pycolmap's
    """Camera to world, (4, 4)."""
    stored = image.cam_from_world
    # A property up to pycolmap 3.12, a method from then on.
    world_to_camera = np.eye(4)
    world_to_camera[:3] = (stored() if callable(stored) else stored).matrix()
    return np.linalg.inv(world_to_camera)


def _camera(camera: Any, file: Path) -> tuple[list[float], tuple[int, int]]:  # noqa: ANN401
    """Parameters fx, fy, cx, cy, k1, k2, p1, p2, and (height, width)."""
    model = camera.model.name
    if model not in _PARAMETERS:
        raise DataError(
            f"{file}: camera model {model} is not supported, only {', '.join(_PARAMETERS)}; "
            "undistort the images (colmap image_undistorter)"
        )
    places = _PARAMETERS[model]
    values = [0.0 if place < 0 else float(camera.params[place]) for place in places]
    return values, (int(camera.height), int(camera.width))
