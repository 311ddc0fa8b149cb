"""Scenes in .torch files: chunks of many scenes with an index.json, or one file per scene.

A scene is a dictionary with key, cameras (F, 18) and F images, each the bytes of an encoded file.
A row of cameras is fx / W, fy / H, cx / W, cy / H, 0, 0 and the 3 x 4 matrix from world to camera
coordinates, row by row, OpenCV axes (RealEstate10K as packed for pixelSplat). Only the files'
tables of contents and the images asked for are ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from datamodules.errors import DataError, SampleError
from datamodules.multiview.readers.protocol import Cameras, check_cameras
from datamodules.multiview.readers.torch_contents import (
    StoredTensor,
    read_array,
    read_contents,
)
from datamodules.readers.stamps import file_stamp

INDEX = "index.json"
"""File beside the chunks that says in which of them each scene is."""

_KEPT_FILES = 256
_LONG_SCAN = 200
_STAMPED_FILES = 16


class _StoredScene(NamedTuple):
    """Places of a scene in its file.

    Attributes:
        cameras: (F, 18) tensor.
        images: (F, 3) int64, record, start and length of each image's bytes.
    """

    cameras: StoredTensor
    images: NDArray[np.int64]


class TorchScenes:
    """Scenes in the .torch files of one split.

    Args:
        folder: where the files lie.
        names: name of every scene.
        files: name of the file of every scene.
        single: whether every file holds one scene, whose name is the file's.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], files: Sequence[str], *, single: bool
    ) -> None:
        self._folder = folder
        self._names = tuple(names)
        self._files = tuple(files)
        self._single = single
        self._opened: OrderedDict[str, dict[str, _StoredScene]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """State without the tables that were read."""
        return {**self.__dict__, "_opened": OrderedDict()}

    @property
    def names(self) -> Sequence[str]:
        """Keys of the scenes in the index's order, or sorted."""
        return self._names

    @property
    def fingerprint(self) -> str:
        """Names of scenes and files, sizes of all files and end bytes of some."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self._names, self._files)).encode("utf-8", "surrogateescape"))
        files = [self._folder / name for name in dict.fromkeys(self._files)]
        try:
            digest.update(repr([file.stat().st_size for file in files]).encode())
            some = np.linspace(0, len(files) - 1, min(len(files), _STAMPED_FILES)).astype(int)
            digest.update(file_stamp(files[place] for place in some.tolist()).encode())
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self._names)

    def _place(self, position: int) -> str:
        return f"{self._folder / self._files[position]}: scene {self._names[position]}"

    def _scene(self, position: int) -> _StoredScene:
        name = self._files[position]
        table = self._opened.get(name)
        if table is None:
            try:
                table = _read_table(self._folder / name, single=self._single)
            except SampleError:
                raise
            except DataError as error:
                raise SampleError(str(error)) from error
            self._opened[name] = table
            if len(self._opened) > _KEPT_FILES:
                self._opened.popitem(last=False)
        self._opened.move_to_end(name)
        try:
            return table[self._names[position]]
        except KeyError:
            raise SampleError(
                f"{self._place(position)} is not in the file, though {INDEX} says so; make "
                f"{INDEX} again or fetch the file again"
            ) from None

    def num_frames(self, position: int) -> int:
        """Number of images of a scene."""
        return len(self._scene(position).images)

    def cameras(self, position: int) -> Cameras:
        """Cameras of a scene; SampleError if they cannot be used."""
        rows: NDArray[np.float64] = self._read(position, self._scene(position).cameras).astype(
            np.float64
        )
        world_to_camera = np.tile(np.eye(4), (len(rows), 1, 1))
        world_to_camera[:, :3] = rows[:, 6:].reshape(-1, 3, 4)  # (F, 12) -> (F, 3, 4)
        place = self._place(position)
        try:
            poses = np.linalg.inv(world_to_camera)
        except np.linalg.LinAlgError:
            raise SampleError(f"{place}: a camera matrix without inverse; remove it") from None
        count = len(rows)
        cameras = Cameras(
            pose=poses.astype(np.float64),
            intrinsics=rows[:, :4],
            distortion=np.zeros((count, 4)),
            size=np.zeros((count, 2), dtype=np.int64),
            held_out=np.zeros(count, dtype=np.bool_),
        )
        return check_cameras(cameras, place)

    def image(self, position: int, frame: int) -> bytes:
        """Encoded image of a frame; SampleError if it cannot be read."""
        record, start, length = self._scene(position).images[frame].tolist()
        tensor = StoredTensor(record, start, "uint8", (length,))
        return self._read(position, tensor).tobytes()

    def _read(self, position: int, tensor: StoredTensor) -> NDArray[Any]:
        file = self._folder / self._files[position]
        try:
            # Opened for each read: a descriptor kept open would not survive being pickled.
            descriptor = os.open(file, os.O_RDONLY)
            try:
                return read_array(descriptor, tensor)
            finally:
                os.close(descriptor)
        except (OSError, EOFError) as error:
            raise SampleError(f"{self._place(position)}: cannot be read ({error})") from error

    def frame_id(self, position: int, frame: int) -> str:
        """File, scene and frame."""
        return f"{self._place(position)}: frame {frame}"


def _read_table(file: Path, *, single: bool) -> dict[str, _StoredScene]:
    """Scenes of a file by name; DataError if it does not hold scenes."""
    contents = read_contents(file)
    if single:
        if not isinstance(contents, dict):
            raise DataError(f"{file}: holds no single scene; set data.init_args.format to re10k")
        return {file.stem: _stored_scene(contents, f"{file}")}
    if not isinstance(contents, list) or not all(isinstance(scene, dict) for scene in contents):
        raise DataError(
            f"{file}: holds no list of scenes; for one scene in each file set "
            "data.init_args.format to scenes"
        )
    found: dict[str, _StoredScene] = {}
    for scene in contents:
        name = scene.get("key")
        if not isinstance(name, str) or name in found:
            raise DataError(f"{file}: scene key {name!r} is no text or occurs twice")
        found[name] = _stored_scene(scene, f"{file}: scene {name}")
    return found


def _stored_scene(scene: dict[Any, Any], place: str) -> _StoredScene:
    cameras, images = scene.get("cameras"), scene.get("images")
    if not isinstance(cameras, StoredTensor) or cameras.shape[1:] != (18,):
        raise DataError(f"{place}: cameras must be a tensor (F, 18)")
    if not isinstance(images, list) or not all(_is_file(image) for image in images):
        raise DataError(f"{place}: images must be a list of 1-D uint8 tensors")
    if len(images) != cameras.shape[0] or not images:
        raise DataError(f"{place}: {len(images)} images for {cameras.shape[0]} cameras")
    places = [(image.record, image.start, *image.shape) for image in images]
    return _StoredScene(cameras, np.array(places, dtype=np.int64))


def _is_file(image: object) -> bool:
    return isinstance(image, StoredTensor) and (image.dtype, len(image.shape)) == ("uint8", 1)


def torch_files(folder: Path) -> list[str]:
    """Sorted names of the .torch files directly in a folder."""
    return sorted(file.name for file in folder.glob("*.torch"))


def open_single(folder: Path) -> TorchScenes:
    """Open a folder with one .torch file for each scene."""
    files = torch_files(folder)
    return TorchScenes(folder, [Path(file).stem for file in files], files, single=True)


def open_chunks(folder: Path) -> TorchScenes:
    """Open a folder of chunks, by its index.json or else by reading what each chunk holds.

    Raises:
        DataError: if the index is damaged, names missing files or leads out of the folder.
    """
    index = folder / INDEX
    scenes = _read_index(index) if index.exists() else _scan(folder)
    absent = sorted(set(scenes.values()) - set(torch_files(folder)))
    if absent:
        raise DataError(
            f"{index}: names {len(absent)} files that are not in the folder: "
            f"{', '.join(absent[:5])}; fetch them, or take their scenes out of {INDEX}"
        )
    return TorchScenes(folder, list(scenes), list(scenes.values()), single=False)


def _read_index(index: Path) -> dict[str, str]:
    try:
        scenes = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{index}: cannot be read as JSON ({error})") from error
    if not isinstance(scenes, dict) or not all(isinstance(file, str) for file in scenes.values()):
        raise DataError(f"{index}: expected {{scene: chunk file}}")
    for file in set(scenes.values()):
        if Path(file).name != file:
            raise DataError(f"{index}: {file!r} is no plain file name; chunks lie beside {INDEX}")
    return scenes


def _scan(folder: Path) -> dict[str, str]:
    scenes: dict[str, str] = {}
    files = torch_files(folder)
    shown = track(files, "reading chunks") if len(files) >= _LONG_SCAN else files
    for file in shown:
        for name in _read_table(folder / file, single=False):
            if name in scenes:
                raise DataError(f"{folder}: scene {name} is in {scenes[name]} and in {file}")
            scenes[name] = file
    return scenes
