"""Clouds of points from the files that people have: PLY, LAS, npz and Pointcept scene folders."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.cloud_las import read_las
from datamodules.cloud_ply import read_ply
from datamodules.cloud_points import MAX_POINTS, CloudPoints, checked_cloud
from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".ply", ".las", ".laz", ".npz")
# No three columns of a cloud of the largest size take more than this.
_MOST_BYTES = MAX_POINTS * 3 * 8 + (1 << 16)


def read_cloud(path: Path) -> CloudPoints:
    """Read a cloud: PLY, LAS, npz (coord, color, normal), or a folder with coord.npy.

    Raises:
        FileNotFoundError: If there is nothing at the path.
        DataError: One line, if it is of another kind, damaged or without finite points.
    """
    if path.is_dir():
        return _read_scene(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a cloud: {', '.join(SUFFIXES)}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".ply":
            return read_ply(path)
        if suffix in (".las", ".laz"):
            return read_las(path)
        if suffix == ".npz":
            return _read_npz(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise DataError(f"{path}: unknown kind of cloud; expected {', '.join(SUFFIXES)}")


def find_clouds(path: Path) -> list[Path]:
    """Clouds at a path: the file or scene itself, or those directly in the folder, by name.

    Raises:
        FileNotFoundError: If there is none.
    """
    if path.is_file() or (path / "coord.npy").is_file():
        return [path]
    found = []
    if path.is_dir():
        found = [
            entry
            for entry in sorted(path.iterdir())
            if (entry.is_file() and entry.suffix.lower() in SUFFIXES)
            or (entry / "coord.npy").is_file()
        ]
    if not found:
        raise FileNotFoundError(
            f"data.init_args.path={path}: no cloud; expected {', '.join(SUFFIXES)}, a folder with "
            "coord.npy, or a folder of these; correct the path"
        )
    return found


def read_array(file: Path) -> NDArray[Any]:
    """Read a .npy file of numbers; its size is compared with its header ahead of reading it.

    Raises:
        DataError: If there is none or it is damaged or holds anything but plain values.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; add it")
    try:
        # Mapped first, as the size in the header may be a lie.
        return np.array(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError, EOFError, OverflowError):
        raise DataError(f"{file}: no whole array of numbers; copy it again") from None


def _read_scene(folder: Path) -> CloudPoints:
    """Scene folder of Pointcept: coord.npy, and color.npy and normal.npy if there are any."""
    coord = read_array(folder / "coord.npy")
    colour, normal = (
        read_array(folder / name) if (folder / name).is_file() else None
        for name in ("color.npy", "normal.npy")
    )
    return checked_cloud(folder, coord, colour, normal)


def _read_npz(path: Path) -> CloudPoints:
    try:
        with zipfile.ZipFile(path) as archive:
            coord = _read_member(path, archive, ("coord", "coords"))
            colour = _read_member(path, archive, ("color", "colour", "colors"))
            normal = _read_member(path, archive, ("normal", "normals"))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        raise DataError(f"{path}: no whole npz file; copy it again") from None
    if coord is None:
        raise DataError(f"{path}: no array coord; expected coord, color and normal, each (N, 3)")
    return checked_cloud(path, coord, colour, normal)


def _read_member(
    path: Path, archive: zipfile.ZipFile, names: tuple[str, ...]
) -> NDArray[Any] | None:
    """The first of the named arrays; its header is compared with its size ahead of reading it."""
    member = next((f"{n}.npy" for n in names if f"{n}.npy" in archive.namelist()), None)
    if member is None:
        return None
    announced = archive.getinfo(member).file_size
    with archive.open(member) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, kind = header(stream)
        except ValueError:
            raise DataError(f"{path}: {member} is no array; write it again") from None
    needed = kind.itemsize
    for side in shape:
        needed *= side
    if kind.hasobject or len(shape) != 2 or not needed <= announced <= _MOST_BYTES:
        raise DataError(
            f"{path}: {member} is {kind} {shape} in {announced} bytes; expected plain numbers of "
            f"shape (N, 3), N <= {MAX_POINTS}"
        )
    try:
        with archive.open(member) as stream:
            values: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError:
        raise DataError(f"{path}: {member} is cut off; copy the file again") from None
    return values
