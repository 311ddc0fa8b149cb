"""Files of stored tensors: what is in them, and how they are checked.

``<folder>/<identity>/index.json`` says what a row is and of which data;
``<folder>/<identity>/<split>/shard-rank<r>-<number>.safetensors`` hold the rows of some samples,
with the samples' indices in the tensor index. The identity is a hash of whatever made the tensors.
Nothing in a store is ever executed, and nothing outside of it is read.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from datamodules.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "index.json"
ROW_INDEX = "index"
REMEDY = "remove it and run the command that made it again, which makes only what is missing"

_FORMAT, _VERSION = "quintet-tensors", 1
_MAX_INDEX_BYTES = 2**20
_MAX_ROW_BYTES = 2**32
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SHARD = re.compile(r"shard-rank(\d{1,6})-(\d{5,9})\.safetensors")
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Types that can be stored, by name."""


@dataclass(frozen=True)
class RowTensor:
    """One tensor of every row.

    Attributes:
        shape: of one sample.
        dtype: name of the type in torch, such as float32.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of one sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize

    def fits(self, tensor: Tensor) -> bool:
        """Whether (n, *shape) rows are of this kind."""
        return tuple(tensor.shape[1:]) == self.shape and tensor.dtype == DTYPES[self.dtype]


@dataclass(frozen=True)
class StoreIndex:
    """What all shards of a store have in common.

    Attributes:
        identity: hash of what made the tensors; name of the store's folder.
        data: fingerprint of the samples.
        tensors: what a row holds, by name.
        splits: number of samples of each split, stored or not.
    """

    identity: str
    data: str
    tensors: Mapping[str, RowTensor]
    splits: Mapping[str, int]


def check_name(name: str, what: str) -> str:
    """The name itself, if it can be that of a file in any folder.

    Raises:
        ValueError: naming it and what it is of.
    """
    if _SAFE_NAME.fullmatch(name) is None:
        raise ValueError(f"{what}={name[:80]!r}: expected up to 128 of A-Z a-z 0-9 _ . -")
    return name


def write_index(folder: Path, index: StoreIndex) -> None:
    """Write ``index.json``; it appears only when whole."""
    content = {"format": _FORMAT, "version": _VERSION, "identity": index.identity}
    content |= {"data": index.data, "splits": dict(index.splits)}
    content["tensors"] = {
        name: {"shape": list(row.shape), "dtype": row.dtype} for name, row in index.tensors.items()
    }
    temporary = folder / f".{INDEX}.{uuid.uuid4().hex}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    os.replace(temporary, folder / INDEX)


def read_index(folder: Path) -> StoreIndex:
    """Read and check ``index.json``.

    Raises:
        DataError: if it is missing, damaged or of another version.
    """
    path = folder / INDEX
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_text("utf-8"))
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"not version {_VERSION} of {_FORMAT}")
        tensors = {name: _row(name, row) for name, row in content["tensors"].items()}
        splits = {name: _count(count) for name, count in content["splits"].items()}
        return StoreIndex(str(content["identity"]), str(content["data"]), tensors, splits)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: no index of stored tensors ({reason}); {REMEDY}") from None


def _count(value: Any) -> int:  # noqa: ANN401 - from JSON
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{value!r} is no count")
    return value


def _row(name: str, value: Any) -> RowTensor:  # noqa: ANN401 - from JSON
    if name == ROW_INDEX or value["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name[:40]!r} of type {value['dtype']!r}")
    row = RowTensor(tuple(_count(size) for size in value["shape"]), value["dtype"])
    if row.num_bytes > _MAX_ROW_BYTES or len(row.shape) > 8:
        raise ValueError(f"tensor {name[:40]!r} of shape {row.shape}")
    return row


def shard_files(folder: Path, split: str) -> list[Path]:
    """Shards of a split, sorted by name.

    Raises:
        DataError: if one is a link that leads out of the store.
    """
    found = [path for path in (folder / split).glob("shard-*") if _SHARD.fullmatch(path.name)]
    for path in found:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{path}: leads out of {folder}; copy the file into the folder")
    return sorted(found)


def shard_file(folder: Path, split: str, rank: int) -> Path:
    """The first file that a rank has not written yet."""
    names = [_SHARD.fullmatch(path.name) for path in shard_files(folder, split)]
    taken = [int(name[2]) for name in names if name and int(name[1]) == rank]
    return folder / split / f"shard-rank{rank}-{max(taken, default=-1) + 1:05d}.safetensors"


def read_shard_rows(path: Path, index: StoreIndex) -> Tensor:
    """Indices (n,) of the samples in a shard, once its tensors are what they must be.

    Raises:
        DataError: if it is damaged, or does not fit the store's index.
    """
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != {ROW_INDEX, *index.tensors}:
                raise DataError(f"{path}: holds {', '.join(sorted(file.keys()))[:120]}; {REMEDY}")
            rows: Tensor = file.get_tensor(ROW_INDEX).clone()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in index.tensors}
            # An empty slice tells the type without reading the rows.
            types = {name: file.get_slice(name)[:0].dtype for name in index.tensors}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: incomplete or damaged ({reason}); {REMEDY}") from None
    if rows.dtype != torch.int64 or rows.ndim != 1:
        raise DataError(f"{path}: its index is {rows.dtype} {tuple(rows.shape)}; {REMEDY}")
    for name, row in index.tensors.items():
        expected = (len(rows), *row.shape)
        if shapes[name] != expected or types[name] != DTYPES[row.dtype]:
            raise DataError(
                f"{path}: {name} is {types[name]} {shapes[name]}, expected {row.dtype} "
                f"{expected}; {REMEDY}"
            )
    return rows


def write_shard(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Write a shard; the file appears under its name only when whole.

    Args:
        path: what ``shard_file`` gave.
        rows: CPU tensors (n, ...) by name, ``ROW_INDEX`` among them.

    Raises:
        DataError: if the file cannot be written.
    """
    # Without a process number: what a killed process leaves is overwritten by the next one.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would let nobody else read the file
        save_file(dict(rows), temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{path}: cannot be written ({reason}); make room and run the same command again, "
            "which goes on where it stopped"
        ) from error
