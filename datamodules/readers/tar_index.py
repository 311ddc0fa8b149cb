"""Where every sample of a tar shard lies: built once by walking its headers, then cached."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.cache_folder import cache_folder
from datamodules.errors import DataError
from datamodules.readers.tar_members import DamagedTarError, TarMember, walk_tar

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_LABEL = -1
"""Label of a sample without a cls or json member."""

BAD_LABEL = -2
"""Label of a sample whose cls or json member holds no integer."""

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
"""Endings, in lower case, of the members that are images."""

_LABEL_ENDINGS = ("cls", "json")
_MAX_LABEL_BYTES = 2**20
_VERSION = 1


@dataclass(frozen=True)
class ShardIndex:
    """Samples of one shard.

    Attributes:
        keys: (N,) names of the samples, as UTF-8 bytes.
        offsets: (N,) first byte of each image in the shard.
        sizes: (N,) bytes of each image.
        labels: (N,) classes, or ``NO_LABEL`` or ``BAD_LABEL``.
        fault: why the shard could not be read to its end; empty if it could.
    """

    keys: NDArray[np.bytes_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    fault: str


@dataclass
class TarSample:
    """Members of a shard that share a key.

    Attributes:
        image: of one of ``IMAGE_ENDINGS``, if there is one.
        others: by their ending.
    """

    image: TarMember | None = None
    others: dict[str, TarMember] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str]:
    """Key and ending: the name up to, and after, the first dot of its last part."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def collect_samples(
    shard: Path, descriptor: int, endings: Sequence[str], samples: dict[str, TarSample]
) -> None:
    """Fill ``samples`` by key; whatever was found stays there if the shard is damaged.

    Args:
        shard: an uncompressed tar.
        descriptor: of the open file.
        endings: of members beside images that count.
        samples: filled in the order of the shard.

    Raises:
        DataError: if a member is hostile or a key occurs twice.
        DamagedTarError: if the shard cannot be read to its end.
    """
    for member in walk_tar(shard, descriptor):
        key, ending = split_name(member.name)
        if ending not in (*IMAGE_ENDINGS, *endings):
            continue
        sample = samples.setdefault(key, TarSample())
        is_image = ending in IMAGE_ENDINGS
        if (is_image and sample.image) or ending in sample.others:
            what = "image" if is_image else ending
            raise DataError(
                f"{shard}: key {key!r} has a second {what} member ({member.name!r}); keys must be "
                "unique in a shard"
            )
        if is_image:
            sample.image = member
        else:
            sample.others[ending] = member


def parse_label(ending: str, data: bytes) -> int:
    """Class in a cls member (an ASCII integer) or a json member ({"label": n} or {"cls": n}).

    Args:
        ending: "cls" or "json".
        data: contents of the member.

    Returns:
        The class, or ``BAD_LABEL`` if there is no integer >= 0.
    """
    try:
        value = json.loads(data) if ending == "json" else int(data.decode("ascii"))
    except (ValueError, RecursionError):
        return BAD_LABEL
    if isinstance(value, dict):
        value = value.get("label", value.get("cls"))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
        return value
    return BAD_LABEL


def _label(descriptor: int, members: dict[str, TarMember]) -> int:
    for ending in _LABEL_ENDINGS:
        if member := members.get(ending):
            if member.size > _MAX_LABEL_BYTES:
                return BAD_LABEL
            return parse_label(ending, os.pread(descriptor, member.size, member.offset))
    return NO_LABEL


def build_index(shard: Path) -> ShardIndex:
    """Walk a shard's headers and read its labels.

    Args:
        shard: an uncompressed tar.

    Returns:
        The index; of a damaged shard, that of the samples before the damage.

    Raises:
        DataError: if a member is hostile, a key occurs twice or an image is missing.
    """
    samples: dict[str, TarSample] = {}
    fault = ""
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        try:
            collect_samples(shard, descriptor, _LABEL_ENDINGS, samples)
        except DamagedTarError as error:
            fault = str(error)
            # The last sample may lack the members behind the damage.
            if samples:
                samples.popitem()
        labels = [_label(descriptor, sample.others) for sample in samples.values()]
    finally:
        os.close(descriptor)
    images = []
    for key, sample in samples.items():
        if sample.image is None:
            raise DataError(
                f"{shard}: key {key!r} has no image ({', '.join(IMAGE_ENDINGS)}); add it"
            )
        images.append(sample.image)
    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    return ShardIndex(
        keys=np.array(keys, dtype=np.bytes_),
        offsets=np.array([image.offset for image in images], dtype=np.int64),
        sizes=np.array([image.size for image in images], dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        fault=fault,
    )


def cache_file(shard: Path, kind: str = "") -> Path:
    """Where an index of a shard is cached: by its path, size and time of change.

    Args:
        shard: an existing tar.
        kind: of the index; empty for that of labelled images.
    """
    stat = shard.stat()
    key = f"{_VERSION}{kind}:{shard.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return cache_folder("shards") / f"{name}.npz"


def load_arrays(file: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]] | None:
    """Cached arrays by name, or None if the file is missing, damaged or has others."""
    try:
        # Opened here, since np.load leaves a damaged file open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except Exception:
        # A cut-off or foreign file may raise anything; the index is simply built again.
        return None


def store_arrays(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Cache arrays; a read-only cache folder is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
            np.savez(stream, **dict(arrays))  # type: ignore[arg-type]
        os.replace(stream.name, file)
    except OSError:
        return


def load_cached(shard: Path) -> ShardIndex | None:
    """The cached index of a shard, or None if there is none or it is damaged."""
    arrays = load_arrays(cache_file(shard), ("keys", "offsets", "sizes", "labels"))
    return None if arrays is None else ShardIndex(**arrays, fault="")


def store_cached(shard: Path, index: ShardIndex) -> None:
    """Cache an intact shard's index; a read-only cache folder is no error."""
    if index.fault:
        return
    arrays = {"keys": index.keys, "offsets": index.offsets, "sizes": index.sizes}
    store_arrays(cache_file(shard), {**arrays, "labels": index.labels})
