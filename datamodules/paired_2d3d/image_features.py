"""Stored patch tokens of all photographs of a root, so that none is decoded or encoded again.

A folder holds ``features.npy``, float16 (images, P, C), and ``features.json``: {"encoder":
identity, "grid": [rows, columns], "channels": C, "images": [paths relative to the root, in order]}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FEATURES = "features.npy"
DESCRIPTION = "features.json"

_REMEDY = "encode the images anew, or leave data.init_args.image_features out"
_NAMED = 3


class ImageFeatures:
    """Tokens of photographs, mapped into memory.

    Args:
        folder: holds both files.

    Raises:
        DataError: naming the file, if one is missing, damaged or does not fit the other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        description = _read_description(folder / DESCRIPTION)
        self.encoder = str(description["encoder"])
        self.grid = (int(description["grid"][0]), int(description["grid"][1]))
        self.channels = int(description["channels"])
        self.images: tuple[str, ...] = tuple(description["images"])
        self._rows: NDArray[np.int64] | None = None
        self._tokens: NDArray[np.float16] | None = None
        expected = (len(self.images), self.grid[0] * self.grid[1], self.channels)
        found = self._mapped
        if found.shape != expected or found.dtype != np.float16:
            raise DataError(
                f"{folder / FEATURES}: {found.dtype} {found.shape}, but {DESCRIPTION} says float16 "
                f"{expected}; {_REMEDY}"
            )

    def check(self, paths: Sequence[str], grid: tuple[int, int]) -> None:
        """Make sure that these photographs can be looked up, and fix their numbers.

        Args:
            paths: photographs by their numbers, relative to the root.
            grid: rows and columns of patches that are wanted.

        Raises:
            DataError: if another grid is stored, or photographs are missing.
        """
        if self.grid != grid:
            raise DataError(
                f"{self.folder / DESCRIPTION}: grid {self.grid}, but data.init_args.patch_grid is "
                f"{grid}; set it to {self.grid}, or {_REMEDY}"
            )
        place = {path: row for row, path in enumerate(self.images)}
        missing = [path for path in paths if path not in place]
        if missing:
            named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            raise DataError(
                f"{self.folder / DESCRIPTION}: {len(missing)} of {len(paths)} images are missing: "
                f"{named}; {_REMEDY}"
            )
        self._rows = np.array([place[path] for path in paths], dtype=np.int64)

    def tokens(self, numbers: NDArray[np.int64]) -> NDArray[np.float16]:
        """Tokens (I, P, C) of photographs by their numbers in the list that ``check`` was given."""
        rows = numbers if self._rows is None else self._rows[numbers]
        return np.array(self._mapped[rows], dtype=np.float16)

    @property
    def _mapped(self) -> NDArray[np.float16]:
        if self._tokens is None:
            self._tokens = _map_tokens(self.folder / FEATURES)
        return self._tokens

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped file behind: another process maps it for itself."""
        return {**self.__dict__, "_tokens": None}


def write_description(
    folder: Path, *, encoder: str, grid: tuple[int, int], channels: int, images: Sequence[str]
) -> None:
    """Write ``features.json`` of a folder; the file appears under its name only when whole.

    Args:
        folder: exists.
        encoder: identity of the encoder, its layer and normalisation included.
        grid: rows and columns of patches.
        channels: of each token.
        images: paths relative to the root, in the order of the rows of ``features.npy``.
    """
    content = {
        "encoder": encoder,
        "grid": list(grid),
        "channels": channels,
        "images": list(images),
    }
    partial = folder / f"{DESCRIPTION}.partial"
    partial.write_text(json.dumps(content))
    partial.replace(folder / DESCRIPTION)


def _map_tokens(path: Path) -> NDArray[np.float16]:
    try:
        mapped: NDArray[np.float16] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_REMEDY}") from None
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: not a readable .npy file ({reason}); {_REMEDY}") from None
    return mapped


def _read_description(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {_REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); {_REMEDY}") from None
    grid = content.get("grid") if isinstance(content, dict) else None
    if (
        not isinstance(grid, list)
        or [type(side) for side in grid] != [int, int]
        or type(content.get("channels")) is not int
        or not isinstance(content.get("encoder"), str)
        or not isinstance(content.get("images"), list)
        or not all(isinstance(name, str) for name in content["images"])
    ):
        raise DataError(f"{path}: expected encoder, grid, channels and images; {_REMEDY}")
    return dict(content)
