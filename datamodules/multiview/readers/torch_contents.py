"""Table of contents of a .torch file: where its tensors lie, without loading any of them.

torch.save writes an uncompressed zip archive: data.pkl, a pickle that describes the object, and
one record of raw bytes for each tensor's storage. Only data.pkl is read here, by an unpickler that
knows tensors and plain containers and refuses everything else; a tensor becomes the place of its
bytes. A 100 MB chunk of RE10K takes about 20 ms, and reading an image one further call.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from datamodules.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DTYPES = {
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BoolStorage": "bool",
}
_SIZES = {dtype: np.dtype(dtype).itemsize for dtype in _DTYPES.values()}
_MOST_PICKLE_BYTES = 2**27
_LOCAL_HEADER = 30


class StoredTensor(NamedTuple):
    """Place of a contiguous tensor in a file.

    Attributes:
        record: offset of its storage's record in the file, which starts with a header.
        start: offset of its first byte in the storage.
        dtype: name of its numpy type.
        shape: its shape.
    """

    record: int
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def read_array(descriptor: int, tensor: StoredTensor) -> NDArray[Any]:
    """Values of a tensor in an open file.

    Raises:
        EOFError: if the file ends before the tensor does, or has changed.
    """
    # Only the header itself tells how long it is: torch pads it, to align the bytes behind it.
    header = os.pread(descriptor, _LOCAL_HEADER, tensor.record)
    if len(header) != _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise EOFError("no record where the file's index says")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    start = tensor.record + _LOCAL_HEADER + name_bytes + extra_bytes + tensor.start
    data = os.pread(descriptor, tensor.num_bytes, start)
    if len(data) != tensor.num_bytes:
        raise EOFError(f"{len(data)} of {tensor.num_bytes} bytes")
    return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)


class _ForbiddenError(Exception):
    """The pickle names something that is neither a tensor nor a plain container."""


class _Rebuild:
    """Stands for torch's function that makes a tensor of a storage."""

    __slots__ = ()

    def __call__(
        self,
        storage: tuple[int, str, int],
        start: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *_: object,
    ) -> StoredTensor:
        record, dtype, count = storage
        dense = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size < 0 or (size > 1 and step != dense):
                raise _ForbiddenError("a tensor that is not contiguous")
            dense *= size
        if not 0 <= start <= count - dense:
            raise _ForbiddenError("a tensor that is larger than its storage")
        return StoredTensor(record, start * _SIZES[dtype], dtype, tuple(shape))


class _ContentsUnpickler(pickle.Unpickler):
    """Unpickler that reads tensors as places and refuses all but plain containers."""

    def __init__(self, data: bytes, records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(data))
        self._records = records

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - as in pickle
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise _ForbiddenError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[int, str, int]:  # noqa: ANN401 - as in pickle
        _, dtype, key, _, count = pid
        info = self._records[f"data/{key}"]
        if count < 0 or count * _SIZES[dtype] > info.file_size:
            raise _ForbiddenError(f"a storage of {count} values in {info.file_size} bytes")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _ForbiddenError("compressed records")
        return info.header_offset, dtype, count


def _refuse(file: Path, problem: str) -> NoReturn:
    raise DataError(f"{file}: {problem}")


def read_contents(file: Path) -> Any:  # noqa: ANN401 - whatever was saved
    """What was saved in a .torch file, with the places of the tensors instead of tensors.

    Args:
        file: written by torch.save in its zip format (torch 1.6 or later).

    Returns:
        The saved lists and dictionaries, with a ``StoredTensor`` for each tensor.

    Raises:
        DataError: if the file cannot be read, is damaged or cut off, or holds anything but
            tensors, numbers, text and plain containers. Nothing in it is ever run.
    """
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            # Names start with the archive's own top folder.
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if records["data.pkl"].file_size > _MOST_PICKLE_BYTES:
                raise _ForbiddenError("an index that is too large")
            order = records.get("byteorder")
            if order is not None and archive.read(order) != b"little":
                raise _ForbiddenError("numbers of a big-endian machine")
            data = archive.read(records["data.pkl"])
        return _ContentsUnpickler(data, records).load()
    except OSError as error:
        _refuse(file, f"cannot be read ({error.strerror or error})")
    except _ForbiddenError as error:
        _refuse(
            file,
            f"holds {error}, and is not opened: only tensors, numbers, text, lists and "
            "dictionaries are read, since anything else could run code",
        )
    except Exception as error:
        # Damaged archives and pickles raise almost anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        _refuse(
            file,
            f"damaged, cut off or not written by torch.save in its zip format "
            f"({file.stat().st_size} bytes; {reason}); fetch it again",
        )
