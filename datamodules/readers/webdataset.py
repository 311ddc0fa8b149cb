"""WebDataset tar shards (jpg or png + cls or json), read at random through an index.

Random access, unlike streaming, makes the shuffle, the split over ranks and workers and the resume
exact. Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import os
import re
import statistics
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from datamodules.errors import DataError, FaultPolicy, SampleError
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import group_by_split
from datamodules.readers.stamps import file_stamp
from datamodules.readers.tar_index import (
    NO_LABEL,
    ShardIndex,
    build_index,
    load_cached,
    store_cached,
)

_OPEN_FILES = 64
_STAMPED_FILES = 64
_PROGRESS_FROM = 8

_Index = TypeVar("_Index")


class ShardFiles:
    """The shards of one split, of which the last ones used stay open.

    Args:
        shards: tar files in order.
    """

    def __init__(self, shards: list[Path]) -> None:
        self._shards = shards
        self._open: OrderedDict[int, int] = OrderedDict()

    @property
    def stamp(self) -> str:
        """Names, sizes and end bytes of some shards, and their number."""
        some = np.linspace(0, len(self._shards) - 1, min(len(self._shards), _STAMPED_FILES))
        stamp = file_stamp(self._shards[part] for part in some.astype(int).tolist())
        return f"{stamp}:{len(self._shards)}"

    def __getstate__(self) -> dict[str, Any]:
        """State without open files, which another process cannot take over."""
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        """Close the shards."""
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def _descriptor(self, part: int) -> int:
        """Open shard, kept open while it is among the last ones used."""
        if part not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[part] = os.open(self._shards[part], os.O_RDONLY)
        self._open.move_to_end(part)
        return self._open[part]

    def read_member(self, part: int, offset: int, size: int, sample: str) -> bytes:
        """Bytes of a shard; SampleError naming ``sample`` if they are no longer there."""
        try:
            # Reading at an offset leaves no file position that a forked worker would share.
            data = os.pread(self._descriptor(part), size, offset)
        except OSError as error:
            raise SampleError(f"{sample}: cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise SampleError(f"{sample}: the shard was cut off after its start")
        return data


class ShardReader(ShardFiles):
    """Samples of the shards of one split.

    Args:
        shards: tar files in order.
        indices: their indices.
        class_names: names of all classes; None numbers them 0 .. largest label.
    """

    def __init__(
        self, shards: list[Path], indices: list[ShardIndex], class_names: tuple[str, ...] | None
    ) -> None:
        super().__init__(shards)
        self._ends = np.cumsum([len(index.offsets) for index in indices])
        self._keys = np.concatenate([index.keys for index in indices])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._labels = np.concatenate([index.labels for index in indices])
        if class_names is None:
            count = max(int(self._labels.max(initial=-1)) + 1, 0)
            class_names = tuple(str(label) for label in range(count))
        self._class_names = class_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Lines of classes.txt, else numbers."""
        return self._class_names

    @property
    def fingerprint(self) -> str:
        """Names, sizes and end bytes of some shards, and the number of samples in all."""
        return f"{self.stamp}:{len(self)}"

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._labels)

    def label(self, position: int) -> int:
        """Class of a sample; SampleError if it has none, no integer or one out of range."""
        label = int(self._labels[position])
        if 0 <= label < len(self._class_names):
            return label
        if label >= 0:
            reason = f"label {label}, expected 0 .. {len(self._class_names) - 1}"
        elif label == NO_LABEL:
            reason = "no label; add a member with the ending cls or json"
        else:
            reason = 'no integer label >= 0; expected cls with one number or json {"label": n}'
        raise SampleError(f"{self.sample_id(position)}: {reason}")

    def read(self, position: int) -> bytes:
        """Encoded image; SampleError if the shard can no longer be read there."""
        part = int(np.searchsorted(self._ends, position, side="right"))
        offset, size = int(self._offsets[position]), int(self._sizes[position])
        return self.read_member(part, offset, size, self.sample_id(position))

    def sample_id(self, position: int) -> str:
        """``shard:key``."""
        part = int(np.searchsorted(self._ends, position, side="right"))
        key = bytes(self._keys[position]).decode("utf-8", "replace")
        return f"{self._shards[part]}:{key}"


def expand_braces(pattern: str) -> list[str]:
    """Names that a pattern with {0000..1023} or {a,b} stands for, in order.

    Args:
        pattern: text with any number of brace groups, not nested.

    Returns:
        The names; leading zeros are kept.

    Raises:
        ValueError: if a range runs backwards or braces are nested.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in text for text in parts[::2] for brace in "{}"):
        raise ValueError(f"data.init_args.root={pattern}: unbalanced or nested braces")
    choices: list[list[str]] = [[part] for part in parts]
    for place in range(1, len(parts), 2):
        if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", parts[place]):
            first, last = int(bounds[1]), int(bounds[2])
            if last < first:
                raise ValueError(f"data.init_args.root={pattern}: {parts[place]} runs backwards")
            width = len(bounds[1])
            choices[place] = [str(number).zfill(width) for number in range(first, last + 1)]
        else:
            choices[place] = parts[place].split(",")
    return ["".join(names) for names in product(*choices)]


def find_shards(root: Path) -> tuple[list[Path], Path]:
    """Shards at a root, and the folder from which names tell the split.

    Args:
        root: folder, tar file or pattern such as train-{0000..1023}.tar.

    Raises:
        DataError: naming the first shard of a pattern that is missing.
    """
    if "{" in str(root):
        shards = [Path(name) for name in expand_braces(str(root))]
        base = Path(os.path.commonpath([shard.parent for shard in shards]))
        missing = [shard for shard in shards if not shard.is_file()]
        if missing:
            raise DataError(
                f"{missing[0]}: no such shard ({len(missing)} of {len(shards)} named by "
                f"data.init_args.root={root} are missing); fetch them or correct the range"
            )
        return shards, base
    if root.is_file():
        return [root], root.parent
    return sorted([*root.glob("*.tar"), *root.glob("*/*.tar")]), root


def index_shards(
    shards: list[Path],
    load: Callable[[Path], _Index | None],
    build: Callable[[Path], _Index],
    store: Callable[[Path, _Index], None],
) -> list[_Index]:
    """Indices of shards, built and cached where there is none yet.

    Args:
        shards: tar files.
        load: gives the cached index of a shard, if there is one.
        build: makes it.
        store: caches it.
    """
    from lightning.pytorch.utilities import rank_zero_only
    from rich.progress import track

    indices = {shard: load(shard) for shard in shards}
    missing = [shard for shard, index in indices.items() if index is None]
    hidden = len(missing) < _PROGRESS_FROM or bool(getattr(rank_zero_only, "rank", 0))
    for shard in track(missing, "Indexing shards", disable=hidden, transient=True):
        indices[shard] = index = build(shard)
        store(shard, index)
    return [index for index in indices.values() if index is not None]


def check_shards(counts: Sequence[int], found: Sequence[str], faults: FaultPolicy) -> None:
    """Stop at a damaged shard, or warn and estimate the loss under on_error="skip".

    Args:
        counts: samples in each shard.
        found: fault of each shard, empty if it has none.
        faults: what happens.

    Raises:
        DataError: at a fault under on_error="raise", or if too many samples are lost.
    """
    damaged = {fault: count for count, fault in zip(counts, found, strict=True) if fault}
    if not damaged:
        return
    first = next(iter(damaged))
    if faults.on_error == "raise":
        raise DataError(first)
    intact = [count for count, fault in zip(counts, found, strict=True) if not fault]
    usual = statistics.median(intact or counts)
    lost = sum(max(usual - count, 1) for count in damaged.values())
    if lost > faults.max_skipped_share * (sum(counts) + lost):
        raise DataError(
            f"about {lost:.0f} of {sum(counts) + lost:.0f} samples are lost in {len(damaged)} "
            f"damaged of {len(counts)} shards, more than max_skipped_share="
            f"{faults.max_skipped_share}; first: {first}"
        )
    for fault in damaged:
        warnings.warn(f"skipped the rest of {fault}", stacklevel=2)


def _named_classes(base: Path) -> tuple[str, ...] | None:
    file = base / "classes.txt"
    if not file.is_file():
        return None
    names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
    if len(set(names)) != len(names):
        raise DataError(f"{file}: a class name occurs twice; expected one name per line")
    return names


def open_webdataset(root: Path, faults: FaultPolicy) -> dict[Split, ShardReader]:
    """Open every split of a folder of shards, of one shard or of a brace pattern.

    The split is told by the words train, val(idation) or test in the file's or its folder's name;
    without any of them all shards are training data. Class names are the lines of classes.txt
    beside the shards, if there is one.

    Args:
        root: folder, tar file or pattern such as train-{0000..1023}.tar.
        faults: what happens at damaged shards.

    Returns:
        A reader for each split.

    Raises:
        DataError: if a shard is missing, damaged or hostile.
    """
    shards, base = find_shards(root)
    grouped = group_by_split(shards, base)
    names = _named_classes(base)
    readers: dict[Split, ShardReader] = {}
    for split in sorted(grouped, key=lambda split: split != "train"):
        indices = index_shards(grouped[split], load_cached, build_index, store_cached)
        counts = [len(index.offsets) for index in indices]
        check_shards(counts, [index.fault for index in indices], faults)
        readers[split] = ShardReader(grouped[split], indices, names)
        names = names or readers["train"].class_names if "train" in readers else names
    return readers
