"""Reading of one root in Pointcept's layout; no path leads out of it.

```
<root>/<split>/<scene>/{coord,color,normal,segment*,instance}.npy
<root>/images/<split>/<scene>/{color,depth,intrinsic,pose,correspondence}/*
<root>/splits/<split>.json
```
A folder of several such data sets, ``<root>/<data set>/...`` or ``<root>/data/<data set>/...``, is
a root as well. Paths are relative to the root, with "/" between their parts.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.paired_2d3d.views import Cloud

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASS_NAMES = "classes.json"
"""List of the names of the classes in a root, if it states them."""

_MAX_POINTS = 2**28
_MAX_IMAGE_BYTES = 2**28
_NUMBERS = "uif"


class SceneTree:
    """Files of a root.

    Args:
        root: folder of one data set, or of several.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real_root = root.resolve()

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """Folders of the data sets, relative to the root; "" is the root itself.

        Raises:
            DataError: if no folder of split files is found.
        """
        if (self.root / "splits").is_dir():
            return ("",)
        found = sorted(
            path.parent.relative_to(self.root).as_posix()
            for pattern in ("*/splits", "data/*/splits")
            for path in self.root.glob(pattern)
        )
        if not found:
            raise DataError(
                f"{self.root}: no splits folder; expected splits/<split>.json beside the folders "
                "of scenes, or folders of such data sets"
            )
        return tuple(found)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the root's ``classes.json``; () if there is none."""
        path = self.root / CLASS_NAMES
        if not path.is_file():
            return ()
        names = self.json(CLASS_NAMES)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{path}: expected a list of the names of the classes")
        return tuple(names)

    def file(self, path: str) -> Path:
        """Place of a file or folder on disk.

        Args:
            path: relative to the root.

        Raises:
            DataError: if the path leads out of the root, also through links.
        """
        parts = PurePosixPath(path)
        place = self.root / parts
        if parts.is_absolute() or ".." in parts.parts or not {"\\", "\0"}.isdisjoint(path):
            raise DataError(f"{self.root}: the path {path!r} leads out of the root; correct it")
        if not place.resolve().is_relative_to(self._real_root):
            raise DataError(
                f"{place}: a link that leads out of the root; copy the files into the root"
            )
        return place

    def json(self, path: str) -> object:
        """Content of a JSON file; an object must not have a key twice.

        Raises:
            DataError: naming the file, if it cannot be read.
        """
        place = self.file(path)
        try:
            return json.loads(place.read_bytes(), object_pairs_hook=_unique)
        except FileNotFoundError:
            raise DataError(f"{place}: no such file; add it, or name another split") from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{place}: cannot be read as JSON ({error})") from None

    def image_bytes(self, path: str) -> bytes:
        """Content of an image file; DataError if it cannot be read."""
        place = self.file(path)
        try:
            if place.stat().st_size > _MAX_IMAGE_BYTES:
                raise DataError(f"{place}: larger than {_MAX_IMAGE_BYTES >> 20} MB; no photograph")
            return place.read_bytes()
        except OSError as error:
            raise DataError(
                f"{place}: cannot be read ({error.strerror}); add or repair it"
            ) from None

    def array(self, path: str, width: int) -> NDArray[np.generic]:
        """Numbers in a .npy file, mapped into memory; nothing but its header is read yet.

        Args:
            path: relative to the root.
            width: columns, 0 for one number a row.

        Returns:
            (N, width), or (N,) for width 0.

        Raises:
            DataError: naming the file, if it does not hold such numbers.
        """
        place = self.file(path)
        try:
            mapped: NDArray[np.generic] = np.lib.format.open_memmap(place, mode="r")
        except FileNotFoundError:
            raise DataError(f"{place}: no such file; add it, or remove its item") from None
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"{place}: not a readable .npy file ({reason}); repair it") from None
        shape = mapped.shape
        if not width and len(shape) == 2 and shape[1] == 1:
            mapped, shape = mapped[:, 0], shape[:1]
        if shape[1:] != ((width,) if width else ()) or len(shape) == 0:
            expected = f"(N, {width})" if width else "(N,)"
            raise DataError(f"{place}: shape {shape}, expected {expected}; repair it")
        if mapped.dtype.kind not in _NUMBERS:
            raise DataError(f"{place}: type {mapped.dtype}, expected numbers; repair it")
        if shape[0] > _MAX_POINTS:
            raise DataError(f"{place}: {shape[0]} rows, more than the {_MAX_POINTS} allowed")
        return mapped

    def cloud(self, folder: str) -> Cloud:
        """Points of a scene; colours and normals that are not stored are zeros.

        Args:
            folder: of the scene, relative to the root.

        Raises:
            DataError: naming the file, if one is missing, damaged or does not fit the others.
        """
        coord = self._floats(f"{folder}/coord.npy", None)
        if len(coord) == 0:
            raise DataError(f"{self.root / folder}/coord.npy: holds no points; remove its items")
        colour = self._floats(f"{folder}/color.npy", len(coord))
        colour *= np.float32(1 / 255)
        return Cloud(coord, colour, self._floats(f"{folder}/normal.npy", len(coord)))

    def _floats(self, path: str, count: int | None) -> NDArray[np.float32]:
        """Array (N, 3) of a scene; zeros if ``count`` rows are expected and there is no file."""
        if count is not None and not self.file(path).exists():
            return np.zeros((count, 3), dtype=np.float32)
        values = self.array(path, 3).astype(np.float32)
        self._check_rows(path, values, count)
        if not np.isfinite(values).all():
            raise DataError(f"{self.root / path}: holds values that are not finite; repair it")
        return values

    def _check_rows(self, path: str, values: NDArray[np.generic], count: int | None) -> None:
        if count is not None and len(values) != count:
            raise DataError(
                f"{self.root / path}: {len(values)} rows, but coord.npy has {count} points; "
                "write both anew"
            )

    def labels(self, folder: str, name: str, count: int) -> NDArray[np.int64]:
        """Class of every point of a scene, (count,) int64; below 0 where there is none.

        Args:
            folder: of the scene, relative to the root.
            name: of the file without .npy, such as segment, segment20 or instance.
            count: points of the scene.

        Raises:
            DataError: naming the file, if it is missing, damaged or does not fit the points.
        """
        path = f"{folder}/{name}.npy"
        values = self.array(path, 0)
        self._check_rows(path, values, count)
        if values.dtype.kind == "f" and not (np.isfinite(values) & (values % 1 == 0)).all():
            raise DataError(f"{self.root / path}: labels must be whole numbers; repair it")
        labels: NDArray[np.int64] = values.astype(np.int64)
        return labels


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return content
