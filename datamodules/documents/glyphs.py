"""Bitmaps of everything that may be written: handwritten digits and printed words.

The digits are those of the UCI set (8 x 8, 17 levels), each in several sizes; no digit is in two
splits. The words are set in Pillow's built-in font, and are the same in all splits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules.errors import FaultPolicy
from datamodules.image_split import PixelSource
from datamodules.image_transforms import PixelFormat
from datamodules.readers.detection import open_splits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.readers.protocol import Split

WORDS = (
    "cat", "sun", "map", "key", "book", "fish", "milk", "road",
    "tree", "wind", "bread", "chair", "green", "house", "light", "water",
)  # fmt: skip
REGION_NAMES = ("nothing", *(f"digit {digit}" for digit in range(10)), *WORDS)
FIRST_WORD = 11

DIGIT_FOLDER = Path(__file__).parents[1] / "assets" / "digits"
DIGIT_SIZES = (16, 17, 18, 19, 20)  # pixels
WORD_SIZES = (10.5, 11.0, 11.5, 12.0)  # pixels per em
WIDEST = 42  # pixels, of a word's ink
MARGIN = 2  # pixels around the ink, for the halo

# Grey values, 0 .. 1, of an enlarged digit between which ink begins and is full.
_INK_FROM, _INK_FULL = 0.42, 0.62
_FINENESS = 4  # sub-pixels along a pixel's side when an edge is drawn


class GlyphBank(NamedTuple):
    """N bitmaps with ``MARGIN`` empty pixels around the ink.

    Attributes:
        ink: N arrays (h, w) uint8, cover of the ink, 0 .. 255.
        halo: N arrays (h, w) uint8, cover of the halo, which contains the ink.
        region: (N,) int64, class as in ``REGION_NAMES``.
        size: (N, 2) int64, h and w.
        baseline: (N,) int64, rows above the line on which the item stands.
        digits: how many of the bitmaps, the first ones, are digits.
    """

    ink: list[NDArray[np.uint8]]
    halo: list[NDArray[np.uint8]]
    region: NDArray[np.int64]
    size: NDArray[np.int64]
    baseline: NDArray[np.int64]
    digits: int


@cache
def glyph_bank(split: Split) -> GlyphBank:
    """Bitmaps of a split: its digits in ``DIGIT_SIZES``, then all words in ``WORD_SIZES``.

    Bitmap of digit d in size s is d * 5 + s; the words follow, word w in size s at w * 4 + s.
    """
    pixels, labels = embedded_digits(split)
    ink = [_enlarge(digit, size) for digit in pixels for size in DIGIT_SIZES]
    region = [1 + label for label in labels.tolist() for _ in DIGIT_SIZES]
    baseline = [len(bitmap) - MARGIN for bitmap in ink]
    digits = len(ink)
    for number, word in enumerate(WORDS):
        for size in WORD_SIZES:
            bitmap, base = _set_word(word, size)
            ink.append(bitmap)
            baseline.append(base)
            region.append(FIRST_WORD + number)
    return GlyphBank(
        ink=ink,
        halo=_halos(ink),
        region=np.array(region),
        size=np.array([bitmap.shape for bitmap in ink]),
        baseline=np.array(baseline),
        digits=digits,
    )


@cache
def embedded_digits(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (N, 8, 8) in 0 .. 16 and labels (N,) of the digits of one split."""
    reader = open_splits(DIGIT_FOLDER, "parquet", FaultPolicy())[split]
    source = PixelSource(reader, PixelFormat(8, 1, 17, "resize"), cache_bytes=2**30)
    samples = [source.sample(position) for position in range(len(reader))]
    pixels = np.stack([pixels[:, :, 0] for pixels, _ in samples])
    return pixels, np.array([label for _, label in samples], dtype=np.int64)


def _enlarge(digit: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Cover (size + 4, size + 4) of a digit (8, 8), as a pen with clear edges would leave it."""
    fine = (size * _FINENESS, size * _FINENESS)
    smooth = Image.fromarray(digit * 15).resize(fine, Image.Resampling.BICUBIC)
    edge = Image.fromarray(_covers()[np.asarray(smooth)])
    return np.pad(np.asarray(edge.reduce(_FINENESS)), MARGIN)


@cache
def _covers() -> NDArray[np.uint8]:
    """Cover of the ink, 0 .. 255, at each of the 256 grey values of an enlarged digit."""
    share = (np.arange(256) / (16 * 15) - _INK_FROM) / (_INK_FULL - _INK_FROM)
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


def _set_word(word: str, size: float) -> tuple[NDArray[np.uint8], int]:
    """Cover of a word, cut to its ink and padded, and the rows above its baseline."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(word, anchor="ls"))
    canvas = Image.new("L", (right - left + 4, bottom - top + 4))
    ImageDraw.Draw(canvas).text((2 - left, 2 - top), word, fill=255, font=font, anchor="ls")
    cover = np.asarray(canvas)
    rows, columns = (np.flatnonzero(cover.max(axis)) for axis in (1, 0))
    inked = cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # The font's strokes are about a pixel wide; a fuller ink stands up to textures behind it.
    inked = np.minimum(inked.astype(np.uint16) * 4 // 3, 255).astype(np.uint8)
    return np.pad(inked, MARGIN), 2 - top - int(rows[0]) + MARGIN


def _halos(inks: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Cover of a band of one to two pixels around the ink, with the ink itself."""
    halos = inks.copy()
    by_size: dict[tuple[int, ...], list[int]] = {}
    for number, ink in enumerate(inks):
        by_size.setdefault(ink.shape, []).append(number)
    for numbers in by_size.values():
        spread = _spread(np.stack([inks[number] for number in numbers]))
        for number, halo in zip(numbers, spread, strict=True):
            halos[number] = halo
    return halos


def _spread(ink: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bitmaps (N, h, w) grown by one pixel, and by half of a second one."""
    _, height, width = ink.shape
    wide = np.pad(ink, ((0, 0), (2, 2), (2, 2)))
    near = ink
    for down in range(5):
        for right in range(5):
            distance = (down - 2) ** 2 + (right - 2) ** 2
            if distance > 5:  # the corners
                continue
            shifted = wide[:, down : down + height, right : right + width]
            near = np.maximum(near, shifted if distance <= 2 else shifted // 2)
    return near
