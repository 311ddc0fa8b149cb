"""PLY clouds: ascii and binary of both byte orders; the vertices of a mesh are a cloud too."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from datamodules.cloud_points import CloudPoints, check_count, checked_cloud
from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADER_BYTES = 1 << 16
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2",
    "ushort": "u2", "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_BYTE_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_COLOURS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_HARMONICS = ("f_dc_0", "f_dc_1", "f_dc_2")
# Value of the constant spherical harmonic, in whose units Gaussian splats store their colour.
_CONSTANT_HARMONIC = 0.28209479177387814


@dataclass
class _Element:
    """One kind of record of a PLY file.

    Attributes:
        name: Such as vertex or face.
        count: Number of records.
        types: numpy type of each scalar property, by name, in order.
        has_lists: Whether records have no fixed size.
    """

    name: str
    count: int
    types: dict[str, str] = field(default_factory=dict)
    has_lists: bool = False


def read_ply(path: Path) -> CloudPoints:
    """Read the vertices of a PLY file.

    Colours are red, green, blue, or f_dc_0..2 of Gaussian splats; normals are nx, ny, nz.

    Raises:
        DataError: If it is no PLY file, holds no vertices, or is damaged.
    """
    with path.open("rb") as stream:
        order, elements = _read_header(path, stream)
        vertex = _vertex_element(path, elements)
        before = elements[: elements.index(vertex)]
        read = _read_binary if order else _read_ascii
        columns = read(path, stream, order, before, vertex)
    coord = _stack(columns, ("x", "y", "z"))
    colour = next(
        (found for names in _COLOURS if (found := _stack(columns, names)) is not None), None
    )
    harmonics = _stack(columns, _HARMONICS)
    if colour is None and harmonics is not None:
        colour = np.clip(0.5 + _CONSTANT_HARMONIC * harmonics.astype(np.float64), 0.0, 1.0)
    if coord is None:
        raise DataError(f"{path}: its vertices have no x, y, z; write them")
    return checked_cloud(path, coord, colour, _stack(columns, ("nx", "ny", "nz")))


def _read_header(path: Path, stream: BinaryIO) -> tuple[str, list[_Element]]:
    """Byte order (empty for ascii) and elements; leaves the stream at the data."""
    elements: list[_Element] = []
    order: str | None = None
    if stream.readline(16).strip() != b"ply":
        raise DataError(f"{path}: does not begin with 'ply'; it is no PLY file")
    while stream.tell() < _HEADER_BYTES:
        words = stream.readline(_HEADER_BYTES).decode("latin-1").split()
        if not words:
            if stream.tell() >= path.stat().st_size:
                break
        elif words[0] == "end_header":
            if order is None:
                break
            return order, elements
        elif words[0] == "format" and len(words) == 3:
            order = _BYTE_ORDERS.get(words[1])
        elif words[0] in ("element", "property"):
            _read_declaration(path, words, elements)
    raise DataError(f"{path}: its PLY header has no format or no end; write the file again")


def _read_declaration(path: Path, words: list[str], elements: list[_Element]) -> None:
    """Add an element, or a property to the last one."""
    if words[0] == "element" and len(words) == 3 and words[2].isascii() and words[2].isdigit():
        elements.append(_Element(words[1], int(words[2]) if len(words[2]) < 19 else 10**18))
    elif words[0] == "property" and elements and len(words) == 5 and words[1] == "list":
        elements[-1].has_lists = True
    elif _declares_number(words, elements):
        elements[-1].types[words[2]] = _TYPES[words[1]]
    else:
        raise DataError(f"{path}: '{' '.join(words)[:60]}' in its header is no PLY; write it again")


def _declares_number(words: list[str], elements: list[_Element]) -> bool:
    """Whether a line gives the last element a new property of a known type."""
    is_property = words[0] == "property" and len(words) == 3 and words[1] in _TYPES
    return is_property and bool(elements) and words[2] not in elements[-1].types


def _vertex_element(path: Path, elements: list[_Element]) -> _Element:
    found = [element for element in elements if element.name == "vertex"]
    if len(found) != 1 or found[0].has_lists or not found[0].types:
        raise DataError(
            f"{path}: expected one element vertex of plain numbers, found "
            f"{[element.name for element in elements]}; write it again without lists"
        )
    return found[0]


def _read_binary(
    path: Path, stream: BinaryIO, order: str, before: list[_Element], vertex: _Element
) -> dict[str, NDArray[Any]]:
    """Columns of the vertices by name."""
    for element in before:
        if element.has_lists:
            raise DataError(
                f"{path}: element {element.name} with lists stands ahead of the vertices; "
                "write the vertices first"
            )
        size = _record(element, order).itemsize
        check_count(path, element.count, size, path.stat().st_size - stream.tell())
        stream.seek(element.count * size, 1)
    record = _record(vertex, order)
    check_count(path, vertex.count, record.itemsize, path.stat().st_size - stream.tell())
    rows = np.frombuffer(stream.read(vertex.count * record.itemsize), dtype=record)
    return {name: rows[name] for name in vertex.types}


def _record(element: _Element, order: str) -> np.dtype[Any]:
    return np.dtype([(name, order + kind) for name, kind in element.types.items()])


def _read_ascii(
    path: Path, stream: BinaryIO, order: str, before: list[_Element], vertex: _Element
) -> dict[str, NDArray[Any]]:
    """Columns of the vertices by name; every record is one line."""
    available = path.stat().st_size - stream.tell() + 1  # the last line may lack its end
    lines = sum(element.count for element in before)
    check_count(path, lines, 2, available)
    for _ in range(lines):
        stream.readline()
    check_count(path, vertex.count, 2 * len(vertex.types), available)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of no data, which is found below
            rows = np.loadtxt(stream, dtype=np.float64, max_rows=vertex.count, ndmin=2)
    except ValueError as error:
        raise DataError(f"{path}: its vertices are no rows of numbers ({error})") from None
    if vertex.count and rows.shape != (vertex.count, len(vertex.types)):
        raise DataError(
            f"{path}: announces {vertex.count} vertices of {len(vertex.types)} numbers, holds "
            f"{rows.shape[0]} of {rows.shape[1]}; copy it again"
        )
    rows = rows.reshape(vertex.count, len(vertex.types))
    kinds = vertex.types.items()
    return {name: _typed(rows[:, place], kind) for place, (name, kind) in enumerate(kinds)}


def _typed(column: NDArray[np.float64], kind: str) -> NDArray[Any]:
    """Numbers of an ascii column in their declared type; those outside of it are clipped."""
    if kind[0] == "f":
        return column
    limits = np.iinfo(kind)
    return np.clip(np.nan_to_num(column), limits.min, limits.max).astype(kind)


def _stack(columns: dict[str, NDArray[Any]], names: tuple[str, ...]) -> NDArray[Any] | None:
    """The named columns side by side (N, 3), None if one is missing."""
    if not all(name in columns for name in names):
        return None
    return np.stack([columns[name] for name in names], axis=1)
