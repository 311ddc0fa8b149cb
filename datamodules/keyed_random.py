"""Randomness as a pure function of integer keys, independent of any generator's history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(word: int) -> int:
    """Finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _fold(key: tuple[int, ...]) -> int:
    state = _mix(len(key) + _GOLDEN)
    for word in key:
        state = _mix(((state + _GOLDEN) & _MASK) ^ (word & _MASK))
    return state


def keyed_generator(*key: int) -> torch.Generator:
    """CPU generator seeded by a 64-bit hash of integers.

    Args:
        key: the integers, each taken modulo 2**64; their order and number matter.

    Returns:
        A fresh generator. Torch's CPU generator uses the low 32 bits of its seed, so among
        millions of keys a few pairs share a stream; neighbouring keys do not.
    """
    return torch.Generator().manual_seed(_fold(key))


def keyed_bits(key: tuple[int, ...], words: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Independent 64-bit hashes of ``(*key, word)`` for every word, without any generator.

    Args:
        key: integers shared by all hashes, such as (seed, epoch).
        words: (N,) integers, such as sample indices.

    Returns:
        (N,) hashes whose every bit is fair.
    """
    prefix = np.uint64((_fold(key) + _GOLDEN) & _MASK)
    bits = words.astype(np.uint64) ^ prefix
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
