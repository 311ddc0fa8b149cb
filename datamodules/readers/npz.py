"""Downsampled ImageNet in npz files, in both usual conventions.

Chrabaszcz et al. 2017: data (N, 3 * S * S) uint8, planar, and labels 1 .. n, in
train_data_batch_1.npz ... and val_data.npz. Plain: images (N, H, W, C), (N, C, H, W) or (N, H, W)
uint8 and, if known, labels 0 .. n - 1, in train*.npz, val*.npz and test*.npz.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.readers.folder import UNLABELLED
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import group_by_split
from datamodules.readers.stamps import file_stamp

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOCAL_HEADER = 30
_PICKLED = (
    "holds pickled Python objects, which could run code, and is not opened; load it where you "
    "trust it and save it again with numpy.savez(file, data=uint8 array, labels=integer array)"
)


class NpzReader:
    """Rows of the npz files of one split; uncompressed files are memory-mapped.

    Args:
        files: npz files in row order.

    Raises:
        DataError: if a file is damaged, holds objects or has unexpected arrays.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._pixels: list[NDArray[np.uint8]] | None = None
        opened = [_labels(file) for file in files]
        self._first_label = opened[0][1]
        if any(first != self._first_label for _, first in opened):
            raise DataError(f"{files[0].parent}: files of both npz conventions; keep one of them")
        counts = [len(pixels) for pixels in self._arrays()]
        for file, (labels, _), count in zip(files, opened, counts, strict=True):
            if labels is not None and len(labels) != count:
                raise DataError(f"{file}: {len(labels)} labels for {count} images")
        self._unlabelled = any(labels is None for labels, _ in opened)
        parts = [labels for labels, _ in opened if labels is not None]
        empty = np.zeros(sum(counts), dtype=np.int64)
        self._labels = empty if self._unlabelled else np.concatenate(parts) - self._first_label
        self._ends = np.cumsum(counts)
        self._num_classes = int(self._labels.max(initial=-1)) + 1

    def share_classes(self, other: NpzReader) -> None:
        """Take over the number of classes of the training split."""
        self._num_classes = other._num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Labels as they are in the files: 1 .. n or 0 .. n - 1; or "unlabelled"."""
        if self._unlabelled:
            return (UNLABELLED,)
        return tuple(str(label + self._first_label) for label in range(self._num_classes))

    @property
    def fingerprint(self) -> str:
        """Names, sizes and end bytes of the files."""
        return file_stamp(self._files)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._labels)

    def __getstate__(self) -> dict[str, Any]:
        """State without the arrays: a process that unpickles the reader maps the files itself."""
        return {**self.__dict__, "_pixels": None}

    def _arrays(self) -> list[NDArray[np.uint8]]:
        if self._pixels is None:
            self._pixels = [_open_pixels(file) for file in self._files]
        return self._pixels

    def _place(self, position: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, position, side="right"))
        return part, position - (int(self._ends[part - 1]) if part else 0)

    def label(self, position: int) -> int:
        """Class of a row; SampleError if it is out of range."""
        label = int(self._labels[position])
        if not 0 <= label < self._num_classes:
            first = self._first_label
            raise SampleError(
                f"{self.sample_id(position)}: label {label + first}, expected {first} .. "
                f"{self._num_classes - 1 + first}"
            )
        return label

    def read(self, position: int) -> NDArray[np.uint8]:
        """Pixels (H, W, C) of a row."""
        part, row = self._place(position)
        return _height_width_channel(self._arrays()[part][row])

    def sample_id(self, position: int) -> str:
        """``file:row``, rows counted from 0 within the file."""
        part, row = self._place(position)
        return f"{self._files[part]}:row {row}"


def _height_width_channel(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One image of any stored shape as (H, W, C)."""
    if pixels.ndim == 1:
        side = math.isqrt(pixels.size // 3)
        pixels = pixels.reshape(3, side, side)  # (C, H, W)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]  # (H, W, 1)
    if pixels.shape[2] not in (1, 3):
        pixels = pixels.transpose(1, 2, 0)  # (H, W, C)
    return np.ascontiguousarray(pixels)


def _archive(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError) as error:
        with file.open("rb") as stream:
            pickled = stream.read(1) == b"\x80"
        reason = _PICKLED if pickled else "not a readable npz file, incomplete or damaged"
        raise DataError(f"{file}: {reason} ({file.stat().st_size} bytes)") from error


def _array(file: Path, archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an npz file, memory-mapped if it is stored uncompressed."""
    member = archive.getinfo(f"{name}.npy")
    try:
        if member.compress_type == zipfile.ZIP_STORED:
            return _map(file, member.header_offset)
        with archive.open(member) as stream:
            return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        pickled = "pickle" in str(error).lower() or "object" in str(error).lower()
        reason = _PICKLED if pickled else f"array {name} is damaged ({error})"
        raise DataError(f"{file}: {reason}") from error


def _map(file: Path, header_offset: int) -> NDArray[Any]:
    with file.open("rb") as stream:
        stream.seek(header_offset)
        header = stream.read(_LOCAL_HEADER)
        # The local header ends with the lengths of the name and of the extra field.
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        stream.seek(name_length + extra_length, 1)
        shape, fortran, dtype = _npy_header(stream)
        offset = stream.tell()
    if dtype.hasobject:
        raise ValueError("object array")
    return np.memmap(
        file, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C"
    )


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _names(file: Path, archive: zipfile.ZipFile) -> tuple[str, int]:
    """Name of the pixel array, and the smallest label of its convention."""
    names = {Path(name).stem for name in archive.namelist()}
    if "data" in names:
        return "data", 1
    if "images" in names:
        return "images", 0
    raise DataError(
        f"{file}: no array data (N, 3 * S * S) or images (N, H, W, C); found: "
        f"{', '.join(sorted(names)) or 'nothing'}"
    )


def _open_pixels(file: Path) -> NDArray[np.uint8]:
    with _archive(file) as archive:
        name, _ = _names(file, archive)
        pixels = _array(file, archive, name)
    flat, shape = name == "data", pixels.shape
    side = math.isqrt(pixels.shape[-1] // 3) if pixels.ndim == 2 else 0
    square = pixels.ndim == 2 and 3 * side * side == pixels.shape[1]
    coloured = len(shape) == 3 or (len(shape) == 4 and not {1, 3}.isdisjoint(shape[1::2]))
    if pixels.dtype != np.uint8 or not (square if flat else coloured):
        expected = "(N, 3 * S * S)" if flat else "(N, H, W, C), (N, C, H, W) or (N, H, W)"
        raise DataError(
            f"{file}: array {name} is {pixels.dtype} {pixels.shape}, expected uint8 {expected}"
        )
    return pixels


def _labels(file: Path) -> tuple[NDArray[np.int64] | None, int]:
    """Labels as stored, if there are any, and the smallest one of the convention."""
    with _archive(file) as archive:
        _, first = _names(file, archive)
        if "labels.npy" not in archive.namelist():
            return None, first
        labels = _array(file, archive, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{file}: labels are {labels.dtype} {labels.shape}, expected integers (N,) from {first}"
        )
    return labels.astype(np.int64), first


def open_npz(root: Path) -> dict[Split, NpzReader]:
    """Open every split of a folder of npz files, or of one file.

    Args:
        root: folder or file.

    Returns:
        A reader for each split.

    Raises:
        DataError: if a file is damaged, pickled or has unexpected arrays.
    """
    files = [root] if root.is_file() else sorted(root.glob("*.npz"), key=_natural)
    base = root.parent if root.is_file() else root
    readers = {split: NpzReader(part) for split, part in group_by_split(files, base).items()}
    for reader in readers.values():
        if "train" in readers and len(reader.class_names) <= len(readers["train"].class_names):
            reader.share_classes(readers["train"])
    return readers


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sorting key that puts batch_2 before batch_10."""
    return [
        (int(part or 0), "") if part.isdigit() else (0, part)
        for part in re.split(r"(\d+)", file.name)
    ]
