"""Where the written items lie, which colour they have, and which patches their ink covers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.documents.glyphs import DIGIT_SIZES, WORD_SIZES, WORDS
from datamodules.documents.paper import RULED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.documents.glyphs import GlyphBank
    from datamodules.documents.keyed_draws import KeyedDraws
    from datamodules.documents.paper import Sheets

REGIONS = 4
COVERED = 0.05  # share of a patch that ink must cover for the patch to belong to the item

_EDGE = 1  # pixels between a bitmap and the border of its region
_PENS = ((28, 30, 36), (24, 40, 100), (60, 34, 30), (40, 60, 50))  # black, blue, brown, green
_DARK, _LIGHT = (24, 24, 30), (246, 243, 235)  # ink on photographs; the halo has the other one


class Items(NamedTuple):
    """What is written on B pictures, in the four quarters of each.

    Attributes:
        region: (B, 4) int64, class of the item, 0 for none.
        glyph: (B, 4) int64, position in the bank.
        top: (B, 4) int64, row of the bitmap in the picture.
        left: (B, 4) int64, column of the bitmap in the picture.
        ink: (B, 4, 3) float32, colour of the ink, 0 .. 255.
        halo: (B, 4, 3) float32, colour of the halo, which only photographs have.
    """

    region: NDArray[np.int64]
    glyph: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    ink: NDArray[np.float32]
    halo: NDArray[np.float32]


def draw_items(
    draws: KeyedDraws, bank: GlyphBank, sheets: Sheets, on_paper: NDArray[np.bool_], side: int
) -> Items:
    """Choose 0 to 4 items for every picture; on ruled paper they stand on the lines.

    Args:
        draws: source of the choices.
        bank: bitmaps to choose from.
        sheets: the paper, for its lines.
        on_paper: (B,) whether the picture is a page.
        side: pixels along a side of the picture.
    """
    count = draws.integers(np.full(len(on_paper), REGIONS + 1))
    rank = draws.uniform(shape=(REGIONS,)).argsort(axis=1).argsort(axis=1)
    digits = bank.digits // len(DIGIT_SIZES)
    digit = draws.integers(digits, shape=(REGIONS,)) * len(DIGIT_SIZES)
    digit += draws.integers(len(DIGIT_SIZES), shape=(REGIONS,))
    word = draws.integers(len(WORDS), shape=(REGIONS,)) * len(WORD_SIZES)
    word += draws.integers(len(WORD_SIZES), shape=(REGIONS,))
    is_digit = draws.uniform(shape=(REGIONS,)) < 0.5
    glyph = np.where(is_digit, digit, bank.digits + word)
    top, left = _place(draws, bank, glyph, sheets, on_paper, side)
    ink, halo = _colours(draws, on_paper)
    region = np.where(rank < count[:, None], bank.region[glyph], 0)
    return Items(region=region, glyph=glyph, top=top, left=left, ink=ink, halo=halo)


def _place(
    draws: KeyedDraws,
    bank: GlyphBank,
    glyph: NDArray[np.int64],
    sheets: Sheets,
    on_paper: NDArray[np.bool_],
    side: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns (B, 4) of the bitmaps, each at random within its quarter."""
    quarter = side // 2
    height, width = bank.size[glyph, 0], bank.size[glyph, 1]
    first_row = quarter * (np.arange(REGIONS) // 2) + _EDGE
    first_column = quarter * (np.arange(REGIONS) % 2) + _EDGE
    room = quarter - 2 * _EDGE + 1
    top = first_row + draws.integers(room - height, shape=(REGIONS,))
    left = first_column + draws.integers(room - width, shape=(REGIONS,))
    # Lines on which the item can stand without leaving its quarter; there is always one.
    base, spacing, offset = bank.baseline[glyph], sheets.spacing[:, None], sheets.offset[:, :1]
    lowest = -(-(first_row + base - offset) // spacing)
    highest = (first_row + room - 1 - height + base - offset) // spacing
    line = lowest + draws.integers(highest - lowest + 1, shape=(REGIONS,))
    on_line = offset + line * spacing - base
    ruled = on_paper & (sheets.paper == RULED)
    return np.where(ruled[:, None], on_line, top), left


def _colours(
    draws: KeyedDraws, on_paper: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Colours (B, 4, 3) of ink and halo: one pen for a page, dark or light on photographs."""
    pens = np.array(_PENS)[draws.integers(np.full(len(on_paper), len(_PENS)))]  # (B, 3)
    is_dark = draws.uniform(shape=(REGIONS, 1)) < 0.5  # (B, 4, 1)
    ink = np.where(is_dark, _DARK, _LIGHT)
    halo = np.where(is_dark, _LIGHT, _DARK)
    ink = np.where(on_paper[:, None, None], pens[:, None], ink)
    return ink.astype(np.float32), halo.astype(np.float32)


def write_items(
    image: NDArray[np.float32], items: Items, bank: GlyphBank, on_paper: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Write the items onto pictures, in place.

    Args:
        image: (B, 3, S, S) grey levels 0 .. 255.
        items: what to write.
        bank: the bitmaps.
        on_paper: (B,) whether a picture is a page; items on photographs get their halo.

    Returns:
        (B, S, S) cover of the ink, 0 .. 255.
    """
    cover = np.zeros((len(image), *image.shape[2:]), dtype=np.uint8)
    rows, regions = np.nonzero(items.region)
    chosen = (rows, regions)
    glyphs, tops, lefts = items.glyph[chosen], items.top[chosen], items.left[chosen]
    inks, halos = items.ink[chosen][:, :, None, None], items.halo[chosen][:, :, None, None]
    places = zip(rows.tolist(), glyphs.tolist(), tops.tolist(), lefts.tolist(), strict=True)
    for number, (row, glyph, top, left) in enumerate(places):
        ink = bank.ink[glyph]
        height, width = ink.shape
        window = (slice(top, top + height), slice(left, left + width))
        cover[row][window] = ink
        patch = image[row][(slice(None), *window)]
        if not on_paper[row]:
            patch += (halos[number] - patch) * (bank.halo[glyph] * np.float32(1 / 255))
        patch += (inks[number] - patch) * (ink * np.float32(0.95 / 255))
    return cover


def covered_tokens(
    cover: NDArray[np.uint8], region: NDArray[np.int64], patch_size: int
) -> NDArray[np.int64]:
    """Class of the item whose ink covers a patch, 0 where none does.

    Args:
        cover: (B, S, S) cover of the ink, 0 .. 255.
        region: (B, 4) class of the item in each quarter.
        patch_size: pixels along a side of a patch; divides S / 2.

    Returns:
        (B, L) int64 in raster order.
    """
    count, side, _ = cover.shape
    grid = side // patch_size
    strips = np.add.reduceat(cover, np.arange(0, side, patch_size), axis=2, dtype=np.int32)
    total = strips.reshape(count, grid, patch_size, grid).sum(axis=2)  # (B, G, G)
    covered = total >= COVERED * 255 * patch_size**2
    classes = region.reshape(count, 2, 2).repeat(grid // 2, axis=1).repeat(grid // 2, axis=2)
    return np.where(covered, classes, 0).reshape(count, grid * grid)
