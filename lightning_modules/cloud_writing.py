"""Clouds as binary PLY and npz files that appear under their name only when whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lightning_modules.whole_files import whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PLY_TYPES = {
    "i1": "char", "u1": "uchar", "i2": "short", "u2": "ushort", "i4": "int", "u4": "uint",
    "f4": "float", "f8": "double",
}  # fmt: skip


def write_ply(
    path: Path,
    coord: NDArray[Any],
    colour: NDArray[np.uint8] | None = None,
    normal: NDArray[np.float32] | None = None,
    scalars: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write N points as binary little-endian PLY; `read_ply` gives back the same numbers.

    Args:
        path: File; its folder is made if need be.
        coord: (N, 3) float32 or float64.
        colour: (N, 3) bytes, RGB.
        normal: (N, 3) float32.
        scalars: (N,) numbers of at most 32 bits or float64, such as labels, by property name.

    Raises:
        ValueError: If an array has another length or a type that PLY does not know.
    """
    columns: dict[str, NDArray[Any]] = {}
    for names, values in (("x y z", coord), ("nx ny nz", normal), ("red green blue", colour)):
        if values is not None:
            columns |= dict(zip(names.split(), np.asarray(values).T, strict=True))
    columns |= {name: np.asarray(values) for name, values in (scalars or {}).items()}
    record = np.dtype([(name, _little_endian(name, v.dtype)) for name, v in columns.items()])
    rows = np.empty(len(coord), dtype=record)
    for name, values in columns.items():
        if values.shape != rows.shape:
            raise ValueError(f"{name}: shape {values.shape}, expected {rows.shape} as the points")
        rows[name] = values
    kinds = [f"property {_PLY_TYPES[record[name].str[1:]]} {name}" for name in columns]
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}", *kinds]
    header = "\n".join([*lines, "end_header", ""]).encode("ascii")

    def write(stream: BinaryIO) -> None:
        stream.write(header)
        stream.write(rows.tobytes())

    _write_whole(path, write)


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name, without compression: features hardly shrink."""

    def write(stream: BinaryIO) -> None:
        np.savez(stream, **dict(arrays))  # type: ignore[arg-type]  # its own flag shares the names

    _write_whole(path, write)


def _little_endian(name: str, kind: np.dtype[Any]) -> str:
    text = kind.newbyteorder("<").str
    if text[1:] not in _PLY_TYPES:
        raise ValueError(f"{name}: {kind} is no type of PLY; expected {', '.join(_PLY_TYPES)}")
    return text


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write under another name, then rename."""
    with whole_file(path) as temporary, temporary.open("wb") as stream:
        write(stream)
