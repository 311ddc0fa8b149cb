"""Random choices for many images at once, each a pure function of the image's own key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodules.keyed_random import keyed_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FRACTION = 2.0**-53  # of the 53 leading bits of a hash, the precision of float64


class KeyedDraws:
    """Draws that depend on the key, the image's index and the number of the draw alone.

    Args:
        key: integers shared by all images, such as (seed, epoch).
        indices: (B,) int64 of the images.
    """

    def __init__(self, key: tuple[int, ...], indices: NDArray[np.int64]) -> None:
        self._key = key
        self._indices = indices
        self._draws = 0

    def uniform(
        self, low: float = 0.0, high: float = 1.0, shape: tuple[int, ...] = ()
    ) -> NDArray[np.float64]:
        """Numbers (B, *shape) in [low, high)."""
        width = int(np.prod(shape, dtype=np.int64))
        words = self._indices[:, None] * width + np.arange(width)  # (B, width)
        bits = keyed_bits((*self._key, self._draws), words.reshape(-1))
        self._draws += 1
        share = (bits >> np.uint64(11)).astype(np.float64) * _FRACTION
        return (low + (high - low) * share).reshape(len(self._indices), *shape)

    def integers(
        self, count: int | NDArray[np.int64], shape: tuple[int, ...] = ()
    ) -> NDArray[np.int64]:
        """Numbers (B, *shape) in 0 .. count - 1; the count may differ from place to place."""
        drawn: NDArray[np.int64] = (self.uniform(shape=shape) * count).astype(np.int64)
        return drawn
