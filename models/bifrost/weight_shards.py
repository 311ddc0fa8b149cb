"""Sharded safetensors folders: reading that trusts nothing, writing that shows whole files only.

A folder holds ``model.safetensors.index.json``, whose ``weight_map`` tells each key's file, and the
files. Names in the index are plain file names beside it: nothing else is ever opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_INDEX_BYTES = 64 * 2**20


class WeightShards:
    """Keys and shapes of a folder or file; tensors are read one by one.

    Args:
        path: The folder, its index, or one ``.safetensors`` file.

    Raises:
        FileNotFoundError: There is no such file, or a file of the index is missing.
        ValueError: The index or a file is damaged, or they contradict each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = _files_by_key(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            with _opened(file) as tensors:
                present = set(tensors.keys())
                for key in (key for key, home in self._files.items() if home == file):
                    if key not in present:
                        raise ValueError(f"{path}: {key} is not in {file.name}; fetch it again")
                    self.shapes[key] = tuple(tensors.get_slice(key).get_shape())

    def read(self, keys: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors on the CPU, file by file.

        Args:
            keys: Keys of the files -> names to yield them under.

        Yields:
            Name and tensor.
        """
        for file in sorted({self._files[key] for key in keys}):
            with _opened(file) as tensors:
                for key, name in keys.items():
                    if self._files[key] == file:
                        yield name, tensors.get_tensor(key)


def write_shards(folder: Path, state: Mapping[str, Tensor], shard_bytes: int = 5 * 10**9) -> None:
    """Write tensors as files of at most ``shard_bytes`` each, and their index, which comes last.

    Args:
        folder: Made if it does not exist.
        state: Tensors by key; may share memory.
        shard_bytes: One tensor larger than this gets a file of its own.

    Raises:
        ValueError: ``shard_bytes`` is not positive, or there are no tensors.
    """
    if shard_bytes < 1 or not state:
        raise ValueError(
            f"shard_bytes={shard_bytes}, {len(state)} tensors: both must be at least 1"
        )
    own = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    split = split_torch_state_dict_into_shards(own, max_shard_size=shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, keys in split.filename_to_tensors.items():
        part = folder / f".{name}.part"
        save_file({key: own[key] for key in keys}, part, {"format": "pt"})
        os.replace(part, folder / name)
    index = {
        "metadata": {"total_size": split.metadata["total_size"]},
        "weight_map": dict(sorted(split.tensor_to_filename.items())),
    }
    part = folder / f".{INDEX_FILE}.part"
    part.write_text(json.dumps(index, indent=2) + "\n")
    os.replace(part, folder / INDEX_FILE)


def _files_by_key(path: Path) -> dict[str, Path]:
    """Key -> file that holds it."""
    if path.is_dir():
        index = path / INDEX_FILE
        path = index if index.is_file() else path / SINGLE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a folder with {INDEX_FILE} or {SINGLE_FILE}"
        )
    if path.suffix == ".json":
        return {key: path.parent / name for key, name in _read_index(path).items()}
    with _opened(path) as tensors:
        return dict.fromkeys(tensors.keys(), path)


def _read_index(path: Path) -> dict[str, str]:
    """Key -> plain file name, all checked."""
    if path.stat().st_size > _INDEX_BYTES:
        raise ValueError(f"{path}: larger than {_INDEX_BYTES} bytes; no index of weights")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: incomplete, damaged or no index of weights") from None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path}: has no weight_map; expected an index of weights")
    for name in set(map(repr, names.values())) - {repr(n) for n in names.values() if _plain(n)}:
        raise ValueError(f"{path}: file {name[:80]}; expected the name of a .safetensors beside it")
    for name in sorted(set(names.values())):
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path.parent / name}: missing; fetch all files of the index")
    return names


def _plain(name: object) -> bool:
    """Whether a value is the name of a safetensors file, without any folder."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or "\0" in name:
        return False
    return name == PurePosixPath(name).name == PureWindowsPath(name).name and name.isprintable()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; whatever it throws becomes one line."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path}: incomplete or damaged ({reason})") from None
