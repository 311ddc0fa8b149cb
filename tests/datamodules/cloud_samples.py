"""Clouds written by other means than the project's own, byte by byte."""

import struct
from pathlib import Path

import numpy as np

POINTS = np.array([[0.5, -1.25, 2.0], [3.0, 0.125, -4.5], [100.0, 200.5, 0.25]])
COLOURS = np.array([[255, 0, 10], [1, 2, 3], [128, 64, 32]])
NORMALS = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])

_COUNTED = {2: 227, 3: 235, 4: 375}
_SIZES = (20, 28, 26, 34, 57, 63, 30, 36, 38, 59, 67)
_COLOUR_AT = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}


def ply_header(kind: str, count: int = 3, extra: str = "") -> bytes:
    lines = ["ply", f"format {kind} 1.0", "comment a cloud", f"element vertex {count}"]
    lines += [f"property float {name}" for name in ("x", "y", "z")]
    lines += [f"property float {name}" for name in ("nx", "ny", "nz")]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    return (
        "\n".join([*lines, *extra.split("|"), "end_header"]).replace("\n\n", "\n") + "\n"
    ).encode()


def write_ply_by_hand(path: Path, kind: str) -> Path:
    """A mesh: its face must not disturb."""
    extra = "element face 1|property list uchar int vertex_indices"
    if kind == "ascii":
        rows = [
            " ".join(map(str, [*p, *n, *c]))
            for p, n, c in zip(POINTS, NORMALS, COLOURS.tolist(), strict=True)
        ]
        body = "\n".join([*rows, "3 0 1 2"]).encode() + b"\n"
    else:
        order = "<" if "little" in kind else ">"
        body = b"".join(
            struct.pack(f"{order}6f3B", *p, *n, *c)
            for p, n, c in zip(POINTS, NORMALS, COLOURS, strict=True)
        )
        body += struct.pack(f"{order}B3i", 3, 0, 1, 2)
    path.write_bytes(ply_header(kind, extra=extra) + body)
    return path


def las_bytes(
    minor: int, point_format: int, extra_bytes: int = 0, count: int | None = None
) -> bytes:
    """A LAS file with a gap ahead of its points, scale 0.125 and an offset."""
    size = _COUNTED[minor]
    record = _SIZES[point_format] + extra_bytes
    header = bytearray(size)
    header[:4] = b"LASF"
    header[24:26] = bytes([1, minor])
    struct.pack_into("<HIIBH", header, 94, size, size + 54, 1, point_format, record)
    number = len(POINTS) if count is None else count
    if minor < 4 or point_format < 6:
        struct.pack_into("<I", header, 107, number)
    if minor == 4:
        struct.pack_into("<Q", header, 247, number)
    struct.pack_into("<6d", header, 131, 0.125, 0.125, 0.125, 1000.0, -500.0, 0.0)
    points = bytearray()
    for place, colour in zip(POINTS, COLOURS, strict=True):
        point = bytearray(record)
        struct.pack_into("<3i", point, 0, *np.rint(place / 0.125).astype(int))
        if point_format in _COLOUR_AT:
            struct.pack_into("<3H", point, _COLOUR_AT[point_format], *(colour * 256))
        points += point
    return bytes(header) + bytes(54) + bytes(points)
