"""Single files of posed RGB-D frames: depth maps, and matrices of poses and intrinsics."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_MAX_PIXELS = 1 << 26
_MAX_MATRIX_BYTES = 1 << 16
_DEPTH_MODES = ("I;16", "I;16B", "I;16L", "I", "L", "F")


def read_depth(path: Path, unit: float) -> NDArray[np.float32]:
    """Read a depth map.

    Args:
        path: PNG of one channel, or .npy of two dimensions.
        unit: metres of one level.

    Returns:
        (h, w) metres; 0 where it is unknown.

    Raises:
        DataError: naming the file, if it cannot be read.
    """
    try:
        levels = _read_npy(path) if path.suffix == ".npy" else _read_png(path)
    except DataError:
        raise
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: cannot be read as a depth map ({reason}); repair it") from None
    if levels.ndim != 2 or levels.dtype.kind not in "uif" or 0 in levels.shape:
        raise DataError(
            f"{path}: shape {levels.shape} of {levels.dtype} is no depth map; expected one number "
            "a pixel"
        )
    depth = levels.astype(np.float32) * np.float32(unit)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _read_png(path: Path) -> NDArray[np.generic]:
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as picture:
        if picture.mode not in _DEPTH_MODES:
            raise DataError(
                f"{path}: an image of mode {picture.mode}; expected a depth map of one channel, "
                "uint16"
            )
        _check_size(path, picture.width * picture.height)
        return np.asarray(picture)


def _read_npy(path: Path) -> NDArray[np.generic]:
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    _check_size(path, mapped.size)
    return np.array(mapped)


def _check_size(path: Path, pixels: int) -> None:
    if pixels > _MAX_PIXELS:
        raise DataError(f"{path}: {pixels} pixels, more than the {_MAX_PIXELS} allowed; resize it")


def read_matrix(path: Path, sides: tuple[int, ...]) -> NDArray[np.float64]:
    """Read a square matrix; its values need not be finite.

    Args:
        path: text with a row in every line, or .npy.
        sides: that are allowed.

    Raises:
        DataError: naming the file, if it does not hold such a matrix.
    """
    try:
        data = path.read_bytes()
        if len(data) > _MAX_MATRIX_BYTES:
            raise ValueError(f"{len(data)} bytes")
        if path.suffix == ".npy":
            matrix: NDArray[np.float64] = np.load(io.BytesIO(data), allow_pickle=False).astype(
                np.float64
            )
        else:
            rows = [line.split() for line in data.decode().splitlines() if line.strip()]
            matrix = np.array(rows, dtype=np.float64)
    except (OSError, ValueError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: cannot be read as a matrix ({reason}); repair it") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) not in sides:
        allowed = " or ".join(f"{side} x {side}" for side in sides)
        raise DataError(f"{path}: shape {matrix.shape}, expected {allowed}; repair it")
    return matrix
