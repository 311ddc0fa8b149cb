"""LAS clouds 1.2 to 1.4 without compression (ASPRS LAS 1.4 R15, tables 3 and 7 to 19)."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.cloud_points import CloudPoints, check_count, checked_cloud
from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of a point of formats 0 to 10, and where its red, green and blue begin.
_POINT_BYTES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)
_COLOUR_AT = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}
_HEADER_BYTES = {2: 227, 3: 235, 4: 375}
# Both highest bits of the format mark points that LASzip has packed.
_COMPRESSED = 0xC0


class _Header(NamedTuple):
    """What reading the points takes.

    Attributes:
        points_at: Byte at which points begin.
        point_format: 0 to 10.
        record: Bytes from one point to the next.
        number: Number of points.
        scale: Factor of the integer coordinates x, y, z.
        shift: What is added to them.
    """

    points_at: int
    point_format: int
    record: int
    number: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]


def read_las(path: Path) -> CloudPoints:
    """Read coordinates and, where the format has them, colours.

    Raises:
        DataError: If it is compressed (LAZ), of another version or format, or damaged.
    """
    header = _read_header(path)
    available = path.stat().st_size - header.points_at
    check_count(path, header.number, header.record, available)
    at = _COLOUR_AT.get(header.point_format)
    names = ["place"] if at is None else ["place", "colour"]
    layout = np.dtype(
        {
            "names": names,
            "formats": ["(3,)<i4", "(3,)<u2"][: len(names)],
            "offsets": [0, at or 0][: len(names)],
            "itemsize": header.record,
        }
    )
    rows = np.fromfile(path, dtype=layout, count=header.number, offset=header.points_at)
    coord = rows["place"] * np.array(header.scale) + np.array(header.shift)
    return checked_cloud(path, coord, None if at is None else _used_colours(rows["colour"]), None)


def _used_colours(colour: NDArray[np.uint16]) -> NDArray[np.uint16] | None:
    """Colours, None where every point is black: the writer had none to give."""
    return colour if colour.any() else None


def _read_header(path: Path) -> _Header:
    with path.open("rb") as stream:
        raw = stream.read(_HEADER_BYTES[4])
    if raw[:4] != b"LASF":
        raise DataError(f"{path}: does not begin with 'LASF'; it is no LAS file")
    minor = raw[25] if len(raw) > 25 else 0
    if len(raw) < _HEADER_BYTES.get(minor, 1 << 30) or raw[24] != 1:
        raise DataError(f"{path}: no whole header of LAS 1.2, 1.3 or 1.4; convert it to LAS 1.4")
    points_at, _, point_format, record = struct.unpack_from("<IIBH", raw, 96)
    if point_format & _COMPRESSED:
        raise DataError(
            f"{path}: compressed (LAZ); unpack it first: laszip -i {path.name} -o "
            f"{path.with_suffix('.las').name}"
        )
    count = struct.unpack_from("<I", raw, 107)[0]
    if minor == 4:
        count = struct.unpack_from("<Q", raw, 247)[0] or count
    numbers = struct.unpack_from("<6d", raw, 131)
    _check_header(path, point_format, record, numbers)
    return _Header(points_at, point_format, record, count, numbers[:3], numbers[3:])


def _check_header(path: Path, point_format: int, record: int, numbers: tuple[float, ...]) -> None:
    if point_format >= len(_POINT_BYTES) or record < _POINT_BYTES[point_format]:
        raise DataError(
            f"{path}: point format {point_format} with {record} bytes a point; expected formats "
            "0 .. 10 with at least their own bytes; write it again"
        )
    if not np.isfinite(numbers).all() or 0 in numbers[:3]:
        raise DataError(f"{path}: scale and offset {numbers} must be finite, scales not 0")
