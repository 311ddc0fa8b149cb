"""The embedded pairs: 1,910 emoji of Google's Noto font with their Unicode names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datamodules.keyed_random import keyed_generator
from datamodules.readers.protocol import Split
from datamodules.text_image.pair_reader import PairReader
from datamodules.text_image.parquet_pairs import open_parquet_pairs

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FOLDER = Path(__file__).parents[1] / "assets" / "noto_emoji"
# Its picture is not what its name says, but the flag of Saudi Arabia.
_WRONG = frozenset({"1f1e8-1f1f6.png"})
# A constant and not the seed: the same emoji stand first in every run.
_ORDER_KEY = 0xE1103


class ChosenPairs:
    """Some pairs of another reader, in an order of their own.

    Args:
        reader: where the pairs are.
        positions: (N,) of the pairs in that reader.
    """

    def __init__(self, reader: PairReader, positions: NDArray[np.int64]) -> None:
        self._reader = reader
        self._positions = positions

    @property
    def category_names(self) -> tuple[str, ...]:
        """Those of the other reader."""
        return self._reader.category_names

    @property
    def fingerprint(self) -> str:
        """That of the other reader, and the number of pairs chosen."""
        return f"{self._reader.fingerprint}:{len(self)}"

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._positions)

    def read(self, position: int) -> bytes:
        """Encoded image; SampleError if it cannot be read."""
        return self._reader.read(int(self._positions[position]))

    def caption(self, position: int) -> str:
        """Caption; SampleError if there is none."""
        return self._reader.caption(int(self._positions[position]))

    def category(self, position: int) -> int:
        """Position in ``category_names``, -1 if unknown."""
        return self._reader.category(int(self._positions[position]))

    def key(self, position: int) -> str:
        """Name of the pair."""
        return self._reader.key(int(self._positions[position]))

    def sample_id(self, position: int) -> str:
        """File and row."""
        return self._reader.sample_id(int(self._positions[position]))


def open_emoji() -> Mapping[Split, PairReader]:
    """The embedded emoji, shuffled once for all: the file has them in the order of code points.

    Returns:
        train, 1,724 pairs, of which one with a wrong picture is left out; test, 186 pairs.
    """
    readers: dict[Split, PairReader] = {}
    for split, reader in open_parquet_pairs(_FOLDER).items():
        order = torch.randperm(len(reader), generator=keyed_generator(_ORDER_KEY)).tolist()
        kept = [position for position in order if reader.key(position) not in _WRONG]
        readers[split] = ChosenPairs(reader, np.array(kept, dtype=np.int64))
    return readers
