"""Sheets of paper: plain, ruled or squared, slightly tinted and uneven."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from datamodules.keyed_random import keyed_generator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.documents.keyed_draws import KeyedDraws

PAPERS = ("plain", "ruled", "squared")
RULED = PAPERS.index("ruled")
SQUARED = PAPERS.index("squared")

_GRAIN_KEY = 0x67726E  # keeps the grain apart from everything else that is keyed
_GRAIN_SIDE = 256
_RULED_SPACING = (13, 17)  # pixels from line to line, from ... to below
_SQUARED_SPACING = (8, 13)
_LINE_COLOURS = ((128, 150, 200), (150, 160, 168), (120, 175, 170))  # blue, grey, green


class Sheets(NamedTuple):
    """B sheets; lengths in pixels, colours in 0 .. 255.

    Attributes:
        paper: (B,) int64, position in ``PAPERS``.
        tone: (B, 3) float32, colour of the paper.
        line: (B, 3) float32, colour of the lines.
        strength: (B,) float32, cover of the lines, 0 .. 1.
        spacing: (B,) int64, from line to line.
        offset: (B, 2) int64, row and column of the first line, below ``spacing``.
        grain: (B, 2) int64, place in the grain from which the sheet is cut.
    """

    paper: NDArray[np.int64]
    tone: NDArray[np.float32]
    line: NDArray[np.float32]
    strength: NDArray[np.float32]
    spacing: NDArray[np.int64]
    offset: NDArray[np.int64]
    grain: NDArray[np.int64]


def draw_sheets(draws: KeyedDraws, paper: NDArray[np.int64], side: int) -> Sheets:
    """Choose how the sheets look.

    Args:
        draws: source of the choices.
        paper: (B,) positions in ``PAPERS``; others are drawn as plain.
        side: pixels along a side of the picture.
    """
    bright = draws.uniform(226, 250)
    tint = draws.uniform(-1, 1)  # from bluish to yellowish
    tone = bright[:, None] + tint[:, None] * np.array([2.0, 0.0, -7.0])
    colours = np.array(_LINE_COLOURS, dtype=np.float32)
    spread = np.where(paper == SQUARED, *(np.diff(s) for s in (_SQUARED_SPACING, _RULED_SPACING)))
    least = np.where(paper == SQUARED, _SQUARED_SPACING[0], _RULED_SPACING[0])
    spacing = least + draws.integers(spread)
    return Sheets(
        paper=paper,
        tone=np.minimum(tone, 255).astype(np.float32),
        line=colours[draws.integers(len(colours))],
        strength=draws.uniform(0.45, 0.85).astype(np.float32),
        spacing=spacing,
        offset=draws.integers(np.stack((spacing, spacing), axis=1), shape=(2,)),
        grain=draws.integers(_GRAIN_SIDE - side, shape=(2,)),
    )


@cache
def _grain() -> NDArray[np.float32]:
    """(256, 256) unevenness of paper in grey levels: fine grain on broad, faint stains."""
    generator = keyed_generator(_GRAIN_KEY)
    fine = torch.randn(1, 1, _GRAIN_SIDE, _GRAIN_SIDE, generator=generator)
    broad = torch.randn(1, 1, _GRAIN_SIDE // 16, _GRAIN_SIDE // 16, generator=generator)
    broad = torch.nn.functional.interpolate(broad, scale_factor=16, mode="bicubic")
    grain: NDArray[np.float32] = (0.4 * fine + 2 * broad)[0, 0].numpy()
    return grain


def render_sheets(sheets: Sheets, side: int) -> NDArray[np.float32]:
    """Picture the empty sheets.

    Returns:
        (B, 3, side, side) float32, about 0 .. 255.
    """
    place = np.arange(side)
    steps = (place - sheets.offset[:, :, None]) % sheets.spacing[:, None, None]  # (B, 2, S)
    lines = (steps == 0) * sheets.strength[:, None, None]  # (B, 2, S)
    rows = lines[:, 0] * (sheets.paper >= RULED)[:, None]
    columns = lines[:, 1] * (sheets.paper == SQUARED)[:, None]
    cover = np.maximum(rows[:, :, None], columns[:, None, :])  # (B, S, S)
    image: NDArray[np.float32] = cover[:, None] * (sheets.line - sheets.tone)[:, :, None, None]
    image += sheets.tone[:, :, None, None]
    grain = _grain()
    for sheet, (top, left) in zip(image, sheets.grain.tolist(), strict=True):
        sheet += grain[top : top + side, left : left + side]
    return image
