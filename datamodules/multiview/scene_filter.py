"""Which scenes are trained on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

from datamodules.cache_folder import cache_folder
from datamodules.errors import DataError, SampleError
from datamodules.multiview.image_fit import stored_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.multiview.readers.protocol import SceneReader

_LONG_SCAN = 500


@dataclass(frozen=True)
class SceneFilter:
    """Conditions on training scenes; a condition that is none lets all pass.

    Any condition makes every scene's header be read once; the outcome is kept in the user's cache
    folder until the data changes.

    Attributes:
        min_frames: fewest frames (the released RE10K models: 46).
        native_size: height and width of the first image as stored (RE10K: 360, 640).
        max_view_angle: largest angle of view across or along the image, in degrees (DL3DV: 100).
        max_distance: largest distance of a camera from the world's origin (DL3DV: 1000).
        skip_unusable: leave out scenes whose cameras cannot be used, instead of stopping.
    """

    min_frames: int | None = None
    native_size: tuple[int, int] | None = None
    max_view_angle: float | None = None
    max_distance: float | None = None
    skip_unusable: bool = False

    @property
    def is_open(self) -> bool:
        """Whether every scene passes."""
        return self == SceneFilter()

    def passes(self, reader: SceneReader, position: int) -> bool:
        """Whether a scene meets all conditions.

        Raises:
            SampleError: if it cannot be read and ``skip_unusable`` is not set.
        """
        try:
            if self.min_frames is not None and reader.num_frames(position) < self.min_frames:
                return False
            return self._cameras_pass(reader, position) and self._size_passes(reader, position)
        except SampleError:
            if self.skip_unusable:
                return False
            raise

    def _cameras_pass(self, reader: SceneReader, position: int) -> bool:
        if self.max_view_angle is None and self.max_distance is None and not self.skip_unusable:
            return True
        cameras = reader.cameras(position)
        angle = 2 * np.degrees(np.arctan(0.5 / cameras.intrinsics[:, :2])).max(initial=0)
        distance = np.linalg.norm(cameras.pose[:, :3, 3], axis=1).max(initial=0)
        wide = self.max_view_angle is not None and angle > self.max_view_angle
        far = self.max_distance is not None and distance > self.max_distance
        return bool(not wide and not far)

    def _size_passes(self, reader: SceneReader, position: int) -> bool:
        if self.native_size is None:
            return True
        try:
            size = stored_size(reader.image(position, 0))
        except ValueError as error:
            raise SampleError(f"{reader.frame_id(position, 0)}: {error}") from error
        return size == tuple(self.native_size)

    def positions(self, reader: SceneReader) -> NDArray[np.int64]:
        """Positions of the scenes that pass, from the cache or by reading all headers.

        Raises:
            DataError: if a scene cannot be read, or none passes.
        """
        if self.is_open:
            return np.arange(len(reader), dtype=np.int64)
        cache = self._cache_file(reader)
        found = _load(cache)
        if found is None:
            scenes = range(len(reader))
            shown = track(scenes, "checking scenes", transient=True)
            places = shown if len(scenes) >= _LONG_SCAN else scenes
            found = np.array([p for p in places if self.passes(reader, p)], dtype=np.int64)
            _store(cache, found)
        if not len(found):
            raise DataError(
                f"none of {len(reader)} training scenes meets data.init_args.scenes ({self}); "
                "loosen it"
            )
        return found

    def _cache_file(self, reader: SceneReader) -> Path:
        key = f"1:{reader.fingerprint}:{self}"
        name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        return cache_folder("scenes") / f"{name}.json"


def _load(file: Path) -> NDArray[np.int64] | None:
    try:
        return np.array(json.loads(file.read_bytes()), dtype=np.int64)
    except (OSError, ValueError):
        return None  # missing or cut off: the scenes are simply checked again


def _store(file: Path, positions: NDArray[np.int64]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as stream:
            json.dump(positions.tolist(), stream)
        os.replace(stream.name, file)
    except OSError:
        return  # a read-only cache folder is no error
