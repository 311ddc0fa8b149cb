"""Scenes that are a folder of photographs each, with a file that holds their cameras."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.multiview.readers.protocol import Cameras, check_cameras
from datamodules.readers.folder import SUFFIXES
from datamodules.readers.stamps import file_stamp

_KEPT_SCENES = 1024
_STAMPED_FILES = 64
# Folders with smaller copies of the photographs, as nerfstudio and DL3DV name them.
_SMALLER_COPIES = ("images_2", "images_4", "images_8")


class PosedPhotos(NamedTuple):
    """Photographs of a scene in order, with their cameras.

    Attributes:
        files: paths of the photographs, relative to the folder of the scene.
        cameras: of the photographs.
    """

    files: tuple[str, ...]
    cameras: Cameras


class PhotoFolders:
    """Scenes of one split, each in a folder of its own.

    Args:
        names: name of every scene.
        folders: folder of every scene, where its paths start.
        camera_files: file with the cameras of every scene.
        read: reads a scene, given its folder and the file with its cameras.
    """

    def __init__(
        self,
        names: Sequence[str],
        folders: Sequence[Path],
        camera_files: Sequence[Path],
        read: Callable[[Path, Path], PosedPhotos],
    ) -> None:
        self._names = tuple(names)
        self._folders = tuple(folders)
        self._camera_files = tuple(camera_files)
        self._read = read
        self._opened: OrderedDict[int, PosedPhotos] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """State without the scenes that were read."""
        return {**self.__dict__, "_opened": OrderedDict()}

    @property
    def names(self) -> Sequence[str]:
        """Names of the scenes' folders, sorted."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """Names of the scenes, sizes of their camera files and end bytes of some."""
        sizes = [file.stat().st_size for file in self._camera_files]
        some = np.linspace(0, len(sizes) - 1, min(len(sizes), _STAMPED_FILES)).astype(int)
        stamp = file_stamp(self._camera_files[place] for place in some.tolist())
        key = repr((self._names, sizes, stamp)).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(key, digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._names)

    def _scene(self, position: int) -> PosedPhotos:
        photos = self._opened.get(position)
        if photos is None:
            file = self._camera_files[position]
            try:
                photos = self._read(self._folders[position], file)
            except SampleError:
                raise
            except DataError as error:
                raise SampleError(str(error)) from error
            check_cameras(photos.cameras, str(file))
            self._opened[position] = photos
            if len(self._opened) > _KEPT_SCENES:
                self._opened.popitem(last=False)
        return photos

    def num_frames(self, position: int) -> int:
        """Number of photographs of a scene."""
        return len(self._scene(position).files)

    def cameras(self, position: int) -> Cameras:
        """Cameras of a scene; SampleError if they cannot be used."""
        return self._scene(position).cameras

    def image(self, position: int, frame: int) -> bytes:
        """Encoded photograph; SampleError if it cannot be read."""
        path = self._folders[position] / self._scene(position).files[frame]
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError(f"{path}: cannot be read ({error.strerror})") from error

    def frame_id(self, position: int, frame: int) -> str:
        """Path of the photograph."""
        return str(self._folders[position] / self._scene(position).files[frame])


class PhotoFinder:
    """Finds the photographs that a camera file names, in one listing of each folder.

    Args:
        folder: of the scene; nothing outside it is found.
        camera_file: for messages.
    """

    def __init__(self, folder: Path, camera_file: Path) -> None:
        self._folder = folder
        self._camera_file = camera_file
        self._listed: dict[str, frozenset[str]] = {}

    def find(self, paths: Sequence[str]) -> tuple[str, ...]:
        """Path of every photograph relative to the folder.

        A missing ending is added, and where the folder images is missing, a folder of smaller
        copies (images_2, images_4, images_8) is taken.

        Raises:
            DataError: if a path leads out of the folder, or photographs are missing.
        """
        found = [self._find(path) for path in paths]
        missing = [path for path, file in zip(paths, found, strict=True) if file is None]
        if missing:
            raise DataError(
                f"{self._camera_file}: {len(missing)} of {len(paths)} images are missing: "
                f"{', '.join(missing[:5])}; add them below {self._folder}, or remove their frames"
            )
        return tuple(file for file in found if file is not None)

    def _find(self, path: str) -> str | None:
        named = PurePosixPath(path.replace("\\", "/"))
        if named.is_absolute() or ".." in named.parts:
            raise DataError(
                f"{self._camera_file}: image path {path!r} leads out of the scene's folder; "
                "paths must be relative to it"
            )
        places = [named]
        if named.parts[:1] == ("images",):
            places += [PurePosixPath(copy, *named.parts[1:]) for copy in _SMALLER_COPIES]
        for place in places:
            files = self._list(str(place.parent))
            for ending in ("", *SUFFIXES, *map(str.upper, SUFFIXES)):
                if place.name + ending in files:
                    return str(place.parent / (place.name + ending))
        return None

    def _list(self, place: str) -> frozenset[str]:
        if place not in self._listed:
            try:
                with os.scandir(self._folder / place) as entries:
                    files = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                files = frozenset()
            self._listed[place] = files
        return self._listed[place]
