"""Points of one cloud as a file holds them, and the rules that every file must keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_POINTS = 100_000_000
"""Largest cloud that is read at all; a count in a header beyond it is taken for damage."""


@dataclass(frozen=True)
class CloudPoints:
    """N points of one cloud.

    Attributes:
        coord: (N, 3) float64 in the file's own unit, metres where the file says nothing.
        colour: (N, 3) uint8 RGB; None if the file has none.
        normal: (N, 3) float32; None if the file has none.
    """

    coord: NDArray[np.float64]
    colour: NDArray[np.uint8] | None = None
    normal: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Number of points."""
        return len(self.coord)


def checked_cloud(
    path: Path,
    coord: NDArray[Any],
    colour: NDArray[Any] | None,
    normal: NDArray[Any] | None,
) -> CloudPoints:
    """Bring what a file holds to one form.

    Args:
        path: The file, for messages.
        coord: (N, 3) numbers.
        colour: (N, 3) bytes, 16-bit levels or numbers in [0, 1] or [0, 255].
        normal: (N, 3) numbers; those that are not finite become zero.

    Raises:
        DataError: If there are no points, a shape is wrong or a coordinate is not finite.
    """
    for name, values in (("coord", coord), ("color", colour), ("normal", normal)):
        if values is None:
            continue
        is_number = values.dtype.kind in "iuf"
        if values.ndim != 2 or values.shape[1] != 3 or not is_number or len(values) != len(coord):
            raise DataError(
                f"{path}: {name} is {values.dtype} {values.shape}, expected numbers of shape "
                f"({len(coord)}, 3); write it again"
            )
    if not len(coord):
        raise DataError(f"{path}: holds no points; remove it or write it again")
    points = np.ascontiguousarray(coord, dtype=np.float64)
    bad = len(points) - int(np.isfinite(points).all(axis=1).sum())
    if bad:
        raise DataError(f"{path}: {bad} points have NaN or infinite coordinates; remove them")
    return CloudPoints(points, to_levels(colour), _finite_normals(normal))


def check_count(path: Path, count: int, size: int, available: int) -> None:
    """Compare a number of points with the bytes that are there, before any is read.

    Args:
        path: The file, for messages.
        count: Points that the header announces.
        size: Least bytes of one point.
        available: Bytes that follow the header.

    Raises:
        DataError: If the file cannot hold that many, or they are more than `MAX_POINTS`.
    """
    if count > MAX_POINTS:
        raise DataError(
            f"{path}: announces {count} points, at most {MAX_POINTS} are read; split it"
        )
    if count * size > available:
        raise DataError(
            f"{path}: announces {count} points of {size} bytes, but only {available} bytes follow; "
            "the file is cut off or damaged, copy it again"
        )


def to_levels(colour: NDArray[Any] | None) -> NDArray[np.uint8] | None:
    """Colours (N, 3) of any usual scale as bytes: [0, 1], 8-bit or 16-bit levels."""
    if colour is None or colour.dtype == np.uint8:
        return colour
    values = np.nan_to_num(colour.astype(np.float64), posinf=0.0, neginf=0.0)
    most = float(values.max(initial=0.0))
    if colour.dtype.kind == "f" and most <= 1.0:
        values = values * 255.0
    elif most > 255.0:
        values = np.floor(values / 256.0)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _finite_normals(normal: NDArray[Any] | None) -> NDArray[np.float32] | None:
    """Normals (N, 3) with zero where a component is not finite."""
    if normal is None:
        return None
    values = np.ascontiguousarray(normal, dtype=np.float32)
    return np.where(np.isfinite(values).all(axis=1, keepdims=True), values, np.float32(0))
