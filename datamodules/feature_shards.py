"""Features of images on disk: what a shard holds, and how shards are written and opened.

``<root>/<split>/features-rank<r>-<number>.safetensors`` holds the tokens of some images of a split
and what is known of the images; the metadata say what made them. Nothing in a shard is ever
executed. Letters: N images of a shard, L tokens of a grid of h x w patches, C channels.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from datamodules.errors import DataError
from datamodules.feature_origin import TOKEN_TYPES, FeatureOrigin
from datamodules.readers.protocol import Split

if TYPE_CHECKING:
    from torch import Tensor

SPLITS: tuple[Split, ...] = get_args(Split)
REMEDY = "remove it and run the command that made it again, which makes only what is missing"

_FORMAT, _VERSION = "quintet-token-features", "1"
_NAME = re.compile(r"features-rank(\d{1,6})-(\d{5,9})\.safetensors")
# Dimensions and type of each tensor; those without L are small and kept in memory.
_TENSORS: dict[str, tuple[tuple[str | int, ...], str]] = {
    "tokens": (("N", "L", "C"), ""),
    "item_token": (("N", "L"), "I64"),
    "cls_attention": (("N", "L"), "F32"),
    "index": (("N",), "I64"),
    "kind": (("N",), "I64"),
    "region": (("N", 4), "I64"),
    "scene": (("N",), "I64"),
    "complexity": (("N",), "F32"),
    "checksum": (("N",), "I64"),
}
COLUMNS = tuple(name for name, (dims, _) in _TENSORS.items() if "L" not in dims)


@dataclass(frozen=True)
class FeatureShard:
    """One checked file.

    Attributes:
        path: the file.
        origin: what made it.
        split: split of its images.
        num_images: size of the whole split, of which it holds a part.
        channels: C.
        size: bytes of the file.
        columns: the small tensors by name, N rows each.
    """

    path: Path
    origin: FeatureOrigin
    split: str
    num_images: int
    channels: int
    size: int
    columns: Mapping[str, Tensor]

    @property
    def index(self) -> Tensor:
        """(N,) int64, position of each image in its split."""
        return self.columns["index"]


def shard_path(root: Path, split: str, rank: int, number: int) -> Path:
    """File of a rank's ``number``-th shard."""
    return root / split / f"features-rank{rank}-{number:05d}.safetensors"


def next_number(root: Path, split: str, rank: int) -> int:
    """Number of the first shard that a rank has not written yet."""
    names = [_NAME.fullmatch(path.name) for path in (root / split).glob("features-rank*")]
    taken = [int(name[2]) for name in names if name and int(name[1]) == rank]
    return max(taken, default=-1) + 1


def row_checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """CRC-32 of what is stored of each image, (N,) int64.

    Args:
        tensors: CPU tensors of N rows by name; one named checksum is passed over.
    """
    names = sorted(tensors.keys() - {"checksum"})
    count = len(tensors[names[0]])
    rows = [tensors[n].reshape(count, -1).contiguous().view(torch.uint8).numpy() for n in names]
    sums = torch.zeros(count, dtype=torch.int64)
    for place in range(count):
        total = 0
        for row in rows:
            total = zlib.crc32(row[place], total)
        sums[place] = total
    return sums


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], origin: FeatureOrigin, split: str, num_images: int
) -> None:
    """Write a shard; the file appears under its name only when whole.

    Args:
        path: what ``shard_path`` gave.
        tensors: CPU tensors as in a shard, without the checksums.
        origin: what made them.
        split: split of the images.
        num_images: size of the whole split.

    Raises:
        DataError: if the file cannot be written.
    """
    metadata = origin.to_metadata() | {"format": _FORMAT, "version": _VERSION, "split": split}
    metadata["num_images"] = str(num_images)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stored["checksum"] = row_checksums(stored)
    # Without a process number: what a killed process leaves is overwritten by the next one.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would let nobody else read the file
        save_file(stored, temporary, metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot be written ({_short(error)}); make room and run the same command "
            "again, which goes on where it stopped"
        ) from error


def open_cache(root: Path) -> dict[Split, list[FeatureShard]]:
    """Open and check all shards of all splits at a root; splits without any are left out.

    Raises:
        DataError: if a shard is damaged, foreign, misplaced, or does not fit the others.
    """
    found = {split: open_split(root, split) for split in SPLITS}
    splits = {split: shards for split, shards in found.items() if shards}
    _check_agreement([shards[0] for shards in splits.values()])
    return splits


def open_split(root: Path, split: Split) -> list[FeatureShard]:
    """Open and check all shards of a split, in the order of their names.

    Raises:
        DataError: if a shard is damaged, foreign, misplaced, or does not fit the others.
    """
    files = [path for path in (root / split).glob("features-rank*") if _NAME.fullmatch(path.name)]
    shards = []
    for path in sorted(files):
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{path}: leads out of {root}; copy the file into the folder")
        shard = open_shard(path)
        if shard.split != split:
            raise DataError(f"{path}: holds images of split {shard.split}; move it to its folder")
        shards.append(shard)
    _check_agreement(shards)
    _check_indices(shards)
    return shards


def open_shard(path: Path) -> FeatureShard:
    """Open and check one file; of its features only the shape is looked at.

    Raises:
        DataError: if it is damaged or no shard of features.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (_FORMAT, _VERSION):
                raise DataError(f"{path}: holds no features of version {_VERSION}; remove it")
            origin = _read_origin(path, metadata)
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            kinds = {n: (tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()}
            sizes = _check_tensors(path, kinds, origin)
            columns = {name: file.get_tensor(name).clone() for name in COLUMNS}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: incomplete or damaged ({_short(error)}); {REMEDY}") from None
    num_images = metadata.get("num_images", "")
    if not num_images.isdecimal() or len(num_images) > 12:
        raise DataError(f"{path}: its num_images cannot be read; {REMEDY}")
    return FeatureShard(
        path=path,
        origin=origin,
        split=metadata.get("split", ""),
        num_images=int(num_images),
        channels=sizes["C"],
        size=path.stat().st_size,
        columns=columns,
    )


def _read_origin(path: Path, metadata: Mapping[str, str]) -> FeatureOrigin:
    try:
        return FeatureOrigin.from_metadata(metadata)
    except ValueError as error:
        raise DataError(f"{path}: {error}; {REMEDY}") from None


def _check_tensors(
    path: Path, kinds: Mapping[str, tuple[tuple[int, ...], str]], origin: FeatureOrigin
) -> dict[str, int]:
    """Compare shapes and types with what they must be; returns N, L and C."""
    wanted = _TENSORS.keys() if origin.attention_layer else _TENSORS.keys() - {"cls_attention"}
    if kinds.keys() != wanted:
        names = ", ".join(sorted(kinds.keys() ^ wanted))[:80]
        raise DataError(f"{path}: tensors missing or unknown: {names}; {REMEDY}")
    sizes = {"L": origin.grid[0] * origin.grid[1]}
    for name, (shape, dtype) in kinds.items():
        dims, expected = _TENSORS[name]
        fits = len(shape) == len(dims) and dtype == (expected or TOKEN_TYPES[origin.dtype])
        for dim, size in zip(dims, shape, strict=False):
            fits &= size > 0 and size == (sizes.setdefault(dim, size) if type(dim) is str else dim)
        if not fits:
            described = ", ".join(str(sizes.get(str(dim), dim)) for dim in dims)
            raise DataError(
                f"{path}: {name} is {dtype} of shape {shape}, not ({described}) as the others say; "
                f"{REMEDY}"
            )
    return sizes


def _check_agreement(shards: list[FeatureShard]) -> None:
    """Make sure that all shards were made alike."""
    for shard in shards[1:]:
        first = shards[0]
        difference = first.origin.difference(shard.origin)
        if difference is None and shard.channels != first.channels:
            difference = ("channels", str(first.channels), str(shard.channels))
        resized = shard.split == first.split and shard.num_images != first.num_images
        if difference is None and resized:
            difference = ("num_images", str(first.num_images), str(shard.num_images))
        if difference is not None:
            name, expected, found = difference
            raise DataError(
                f"{shard.path}: made with {name}={found}, but {first.path} with {expected}; "
                "remove the shards of one of the two"
            )


def _check_indices(shards: list[FeatureShard]) -> None:
    """Make sure that no image is stored twice, and all are within the split."""
    owner: dict[int, FeatureShard] = {}
    for shard in shards:
        for index in shard.index.tolist():
            if not 0 <= index < shard.num_images:
                raise DataError(f"{shard.path}: image {index} of {shard.num_images}; {REMEDY}")
            if index in owner:
                other = owner[index].path
                raise DataError(f"{shard.path}: image {index} is in {other} too; {REMEDY}")
            owner[index] = shard


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
