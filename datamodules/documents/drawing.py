"""Whole pictures: a background, what is written on it, and the light that falls on both."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.documents.glyphs import glyph_bank
from datamodules.documents.items import Items, covered_tokens, draw_items, write_items
from datamodules.documents.keyed_draws import KeyedDraws
from datamodules.documents.light import SIDES, Light, draw_light, light_field
from datamodules.documents.paper import PAPERS, Sheets, draw_sheets, render_sheets
from datamodules.documents.photographs import Crops, draw_crops, render_crops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.readers.protocol import Split

SIDE = 96
"""Pixels along a side of every embedded image."""

KINDS = ("page", "photograph")
BACKGROUNDS = (*(f"{paper} paper" for paper in PAPERS), "photograph")
SCENE_NAMES = tuple(f"{ground}, light from the {side}" for ground in BACKGROUNDS for side in SIDES)

_PHOTOGRAPH = len(PAPERS)
# Pictures drawn at a time: few enough for the processor's cache, enough to share the calls.
_CHUNK = 8


class Layout(NamedTuple):
    """Everything that is chosen about B pictures; ``render`` adds nothing by chance.

    Attributes:
        background: (B,) int64, position in ``BACKGROUNDS``.
        sheets: paper of the pages.
        crops: background of the photographs.
        items: what is written.
        light: the light on it.
    """

    background: NDArray[np.int64]
    sheets: Sheets
    crops: Crops
    items: Items
    light: Light

    @property
    def is_page(self) -> NDArray[np.bool_]:
        """(B,) whether the picture is a page and not a photograph."""
        return self.background < _PHOTOGRAPH

    @property
    def scene(self) -> NDArray[np.int64]:
        """(B,) class of background and light, position in ``SCENE_NAMES``."""
        return self.background * len(SIDES) + self.light.side

    def take(self, rows: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Layout:
        """The layout of some of the pictures."""
        return Layout(
            self.background[rows],
            Sheets._make(field[rows] for field in self.sheets),
            Crops._make(field[rows] for field in self.crops),
            Items._make(field[rows] for field in self.items),
            Light._make(field[rows] for field in self.light),
        )


def draw_layout(key: tuple[int, ...], indices: NDArray[np.int64], split: Split) -> Layout:
    """Choose pictures, each as a pure function of the key, its index and the split.

    Args:
        key: integers shared by all pictures, such as (seed, epoch).
        indices: (B,) numbers of the pictures.
        split: whose photographs and digits are used.
    """
    draws = KeyedDraws(key, indices)
    is_page = draws.uniform() < 0.5
    paper = draws.integers(np.full(len(indices), len(PAPERS)))
    sheets = draw_sheets(draws, paper, SIDE)
    return Layout(
        background=np.where(is_page, paper, _PHOTOGRAPH),
        sheets=sheets,
        crops=draw_crops(draws, split),
        items=draw_items(draws, glyph_bank(split), sheets, is_page, SIDE),
        light=draw_light(draws, len(indices)),
    )


def render(
    layout: Layout, split: Split, patch_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Picture a layout.

    Args:
        layout: of B pictures.
        split: for which it was drawn.
        patch_size: pixels along a side of a patch.

    Returns:
        RGB planes (B, 3, 96, 96) uint8, and the item of every patch (B, L) int64.
    """
    count = len(layout.background)
    pixels = np.empty((count, 3, SIDE, SIDE), dtype=np.uint8)
    cover = np.empty((count, SIDE, SIDE), dtype=np.uint8)
    for first in range(0, count, _CHUNK):
        part = slice(first, first + _CHUNK)
        pixels[part], cover[part] = _render_chunk(layout.take(part), split)
    return pixels, covered_tokens(cover, layout.items.region, patch_size)


def _render_chunk(layout: Layout, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels (B, 3, S, S) and the cover of the ink (B, S, S)."""
    is_page = layout.is_page
    image = np.empty((len(is_page), 3, SIDE, SIDE), dtype=np.float32)
    image[is_page] = render_sheets(layout.take(is_page).sheets, SIDE)
    image[~is_page] = render_crops(layout.take(~is_page).crops, split, SIDE)
    cover = write_items(image, layout.items, glyph_bank(split), is_page)
    image *= light_field(layout.light, SIDE)[:, None]
    image += 0.5
    return np.clip(image, 0, 255, out=image).astype(np.uint8), cover
