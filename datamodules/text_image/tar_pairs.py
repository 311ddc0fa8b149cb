"""WebDataset tar shards of images and captions, read at random through an index.

A pair is ``KEY.jpg`` (or jpeg, png, webp) and ``KEY.txt`` or ``KEY.json`` with the caption under
caption, text, txt or prompt; the key is the name up to the first dot, and endings may be mixed. If
there are both, the txt counts. Nothing is ever unpacked to disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import FaultPolicy, SampleError
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import group_by_split
from datamodules.readers.tar_index import (
    IMAGE_ENDINGS,
    TarSample,
    cache_file,
    collect_samples,
    load_arrays,
    store_arrays,
)
from datamodules.readers.tar_members import DamagedTarError
from datamodules.readers.webdataset import ShardFiles, check_shards, find_shards, index_shards
from datamodules.text_image.pair_reader import (
    MAX_CAPTION_BYTES,
    caption_in,
    check_size,
    decode_text,
    parse_json,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CAPTION_ENDINGS = ("txt", "json")  # the first one found counts
_NONE = -1  # offset of a member that is missing
_KIND = "pairs"


@dataclass(frozen=True)
class PairIndex:
    """Pairs of one shard.

    Attributes:
        keys: (N,) names of the pairs, as UTF-8 bytes.
        places: (N, 4) first byte and size of the image, first byte and size of the caption; a
            member that is missing has the first byte -1.
        is_json: (N,) whether the caption is in a json member.
        fault: why the shard could not be read to its end; empty if it could.
    """

    keys: NDArray[np.bytes_]
    places: NDArray[np.int64]
    is_json: NDArray[np.bool_]
    fault: str


def build_pair_index(shard: Path) -> PairIndex:
    """Walk a shard's headers.

    Args:
        shard: an uncompressed tar.

    Returns:
        The index; of a damaged shard, that of the pairs before the damage.

    Raises:
        DataError: if a member is hostile or a key occurs twice.
    """
    pairs: dict[str, TarSample] = {}
    fault = ""
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        collect_samples(shard, descriptor, _CAPTION_ENDINGS, pairs)
    except DamagedTarError as error:
        fault = str(error)
        # The last pair may lack the members behind the damage.
        if pairs:
            pairs.popitem()
    finally:
        os.close(descriptor)
    places = np.zeros((len(pairs), 4), dtype=np.int64)
    is_json = np.zeros(len(pairs), dtype=np.bool_)
    for row, pair in enumerate(pairs.values()):
        ending = next((ending for ending in _CAPTION_ENDINGS if ending in pair.others), "")
        is_json[row] = ending == "json"
        for column, member in ((0, pair.image), (2, pair.others.get(ending))):
            place = (_NONE, 0) if member is None else (member.offset, member.size)
            places[row, column : column + 2] = place
    keys = [key.encode("utf-8", "surrogateescape") for key in pairs]
    return PairIndex(np.array(keys, dtype=np.bytes_), places, is_json, fault)


def _load(shard: Path) -> PairIndex | None:
    arrays = load_arrays(cache_file(shard, _KIND), ("keys", "places", "is_json"))
    return None if arrays is None else PairIndex(**arrays, fault="")


def _store(shard: Path, index: PairIndex) -> None:
    if not index.fault:
        arrays = {"keys": index.keys, "places": index.places, "is_json": index.is_json}
        store_arrays(cache_file(shard, _KIND), arrays)


class TarPairs(ShardFiles):
    """Pairs of the shards of one split.

    Args:
        shards: tar files in order.
        indices: their indices.
    """

    def __init__(self, shards: list[Path], indices: list[PairIndex]) -> None:
        super().__init__(shards)
        self._ends = np.cumsum([len(index.keys) for index in indices])
        self._keys = np.concatenate([index.keys for index in indices])
        self._places = np.concatenate([index.places for index in indices])  # (N, 4)
        self._is_json = np.concatenate([index.is_json for index in indices])

    @property
    def category_names(self) -> tuple[str, ...]:
        """None: shards do not say."""
        return ()

    @property
    def fingerprint(self) -> str:
        """Names, sizes and end bytes of some shards, and the number of pairs in all."""
        return f"{self.stamp}:{len(self)}"

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._places)

    def _member(self, position: int, column: int) -> bytes:
        part = int(np.searchsorted(self._ends, position, side="right"))
        offset, size = self._places[position, column : column + 2].tolist()
        return self.read_member(part, offset, size, self.sample_id(position))

    def read(self, position: int) -> bytes:
        """Encoded image; SampleError if the pair has none or the shard has changed."""
        offset, size = self._places[position, :2].tolist()
        if offset == _NONE:
            raise SampleError(
                f"{self.sample_id(position)}: no image; add a member with the ending "
                f"{', '.join(IMAGE_ENDINGS)}"
            )
        check_size(size, self.sample_id(position))
        return self._member(position, 0)

    def caption(self, position: int) -> str:
        """Caption; SampleError if the pair has none, or it is not UTF-8."""
        sample = self.sample_id(position)
        offset, size = self._places[position, 2:].tolist()
        if offset == _NONE:
            raise SampleError(
                f"{sample}: no caption; add a member with the ending {', '.join(_CAPTION_ENDINGS)}"
            )
        if size > MAX_CAPTION_BYTES:
            raise SampleError(f"{sample}: caption of {size} bytes, at most {MAX_CAPTION_BYTES}")
        data = self._member(position, 2)
        if self._is_json[position]:
            return caption_in(parse_json(data, sample), sample)
        return decode_text(data, sample)

    def category(self, position: int) -> int:
        """-1."""
        return -1

    def key(self, position: int) -> str:
        """The key in the shard."""
        return bytes(self._keys[position]).decode("utf-8", "replace")

    def sample_id(self, position: int) -> str:
        """``shard:key``."""
        part = int(np.searchsorted(self._ends, position, side="right"))
        return f"{self._shards[part]}:{self.key(position)}"


def open_tar_pairs(root: Path, faults: FaultPolicy) -> dict[Split, TarPairs]:
    """Open every split of a folder of shards, of one shard or of a brace pattern.

    The split is told by the words train, val(idation) or test in the file's or its folder's name;
    without any of them all shards are training data.

    Args:
        root: folder, tar file or pattern such as train-{0000..1023}.tar.
        faults: what happens at damaged shards.

    Raises:
        DataError: if a shard is missing, damaged or hostile.
    """
    shards, base = find_shards(root)
    readers: dict[Split, TarPairs] = {}
    for split, part in group_by_split(shards, base).items():
        indices = index_shards(part, _load, build_pair_index, _store)
        counts = [len(index.keys) for index in indices]
        check_shards(counts, [index.fault for index in indices], faults)
        readers[split] = TarPairs(part, indices)
    return readers
