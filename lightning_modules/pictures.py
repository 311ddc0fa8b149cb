"""Pictures for people: labelled grids of images, curves, and the step from floats to bytes.

Pillow and matplotlib are imported where they are used, so that importing a metric that only needs
``to_bytes`` stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_modules.whole_files import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

_MARGIN, _GAP, _FONT_SIZE, _TITLE_SIZE = 16, 3, 17, 21
_INK, _PAPER = (38, 38, 38), (255, 255, 255)
# Okabe and Ito's colours, told apart by readers with any colour vision.
_LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Each round of the colours has its own dashes and markers.
_LINE_STYLES, _LINE_MARKERS = ("-", "--", ":"), ("o", "s", "^")


def to_bytes(images: Tensor) -> Tensor:
    """Rounds images in [-1, 1], any shape, to uint8 levels 0..255, as an image file stores them.

    Values outside are clipped. Rounding to nearest matters: truncation darkens every image by
    half a level, which a Fréchet distance sees.
    """
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(levels: Tensor) -> Tensor:
    """Maps uint8 levels 0..255 back to float32 in [-1, 1], the inverse of ``to_bytes``."""
    return levels.float().div(127.5).sub(1)


def to_pil(image: Tensor) -> Image:
    """Turns one image (1 or 3, H, W) in [-1, 1] into a grey or RGB Pillow image."""
    from PIL import Image as pillow

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image of shape {tuple(image.shape)}: must be (1 or 3, H, W)")
    levels = to_bytes(image).cpu().permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    return pillow.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)


def write_png(picture: Image, path: Path) -> None:
    """Writes a PNG under a temporary name first, so that no reader sees half a file."""
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


def shortened(text: str, most: int = 40) -> str:
    """A name for a row of a grid: at most ``most`` characters, an ellipsis for the rest."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def draw_grid(
    rows: Sequence[tuple[str, Tensor]],
    title: str = "",
    columns: Sequence[str] = (),
    scale: int | None = None,
) -> Image:
    """Draws images in rows, each with its name at the left.

    Args:
        rows: name and images (N, 1 or 3, H, W) in [-1, 1]; all of the same size.
        title: line above the grid; none if empty.
        columns: names above the columns; none if empty.
        scale: whole factor of enlargement, without smoothing; by default as much as brings an
            image to at least 64 pixels.

    Raises:
        ValueError: there are no images.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    if not rows or not max(len(images) for _, images in rows):
        raise ValueError(f"{len(rows)} rows without images: a grid needs at least one image")
    layout = _GridLayout.of(rows, title, columns, scale)
    paper = pillow.new("RGB", layout.size, _PAPER)
    _draw_captions(ImageDraw.Draw(paper), layout, [name for name, _ in rows], title, columns)
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            enlarged = to_pil(image).resize(layout.cell, pillow.Resampling.NEAREST)
            paper.paste(enlarged.convert("RGB"), layout.corner(row, column))
    return paper


class _GridLayout(NamedTuple):
    """Where things stand in a grid, in pixels, (x, y)."""

    size: tuple[int, int]
    origin: tuple[int, int]
    cell: tuple[int, int]

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[str, Tensor]],
        title: str,
        columns: Sequence[str],
        scale: int | None,
    ) -> _GridLayout:
        height, width = rows[0][1].shape[-2:]
        scale = scale or max(1, -(-64 // height))
        names = max(round(_font().getlength(name)) for name, _ in rows)
        left = _MARGIN + (names + _MARGIN if names else 0)
        top = _MARGIN + (_TITLE_SIZE + _MARGIN if title else 0)
        top += _FONT_SIZE + _MARGIN // 2 if columns else 0
        cell = (width * scale, height * scale)
        count = max(len(images) for _, images in rows)
        right = left + count * (cell[0] + _GAP) - _GAP
        right = max(right, _MARGIN + round(_font(_TITLE_SIZE).getlength(title)))
        bottom = top + len(rows) * (cell[1] + _GAP) - _GAP
        return cls((right + _MARGIN, bottom + _MARGIN), (left, top), cell)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Upper left corner of an image."""
        x, y = self.origin
        return x + column * (self.cell[0] + _GAP), y + row * (self.cell[1] + _GAP)


def _draw_captions(
    draw: ImageDraw, layout: _GridLayout, names: Sequence[str], title: str, columns: Sequence[str]
) -> None:
    left, top = layout.origin
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=_font(_TITLE_SIZE), anchor="lt")
    for column, name in enumerate(columns):
        x = layout.corner(0, column)[0] + layout.cell[0] // 2
        draw.text((x, top - _MARGIN // 2), name, fill=_INK, font=_font(), anchor="mb")
    for row, name in enumerate(names):
        y = layout.corner(row, 0)[1] + layout.cell[1] // 2
        draw.text((left - _MARGIN, y), name, fill=_INK, font=_font(), anchor="rm")


def _font(size: int = _FONT_SIZE) -> FreeTypeFont:
    from PIL import ImageFont

    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow has no FreeType: install the wheel, `pip install pillow`")
    return font


def draw_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
) -> Image:
    """Draws curves such as accuracy against guidance scale, 1280 x 800 pixels.

    Args:
        curves: name and (x, y) points of each curve, in order of x; one without points is left
            out but keeps its colour, so that a name has the same colour in every picture.
        x_label: name of the horizontal axis, with its unit.
        y_label: name of the vertical axis, with its unit.
        title: line above the axes; none if empty.
        levels: name and height of dashed horizontal lines to compare with.

    Raises:
        ValueError: no curve has a point.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image as pillow

    if not any(curves.values()):
        raise ValueError("no points: draw_curves needs at least one curve with one point")
    # A Figure of its own, not pyplot: no window system, no global list of figures.
    figure = Figure(figsize=(6.4, 4.0), dpi=200, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(xs, ys, label=name, markersize=4, linewidth=1.8, **_line_style(number))
    for name, height in (levels or {}).items():
        axes.axhline(height, color="#7f7f7f", linestyle=(0, (4, 3)), linewidth=1.1)
        axes.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            horizontalalignment="right",
            textcoords="offset points",
            fontsize=8,
            color="#555555",
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.margins(y=0.1)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > len(_LINE_COLOURS):  # beside the axes, for it would cover the curves
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    elif len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    canvas.draw()
    return pillow.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of the curve of this number; 18 curves differ."""
    rounds, colour = divmod(number, len(_LINE_COLOURS))
    kind = rounds % len(_LINE_STYLES)
    return {
        "color": _LINE_COLOURS[colour],
        "linestyle": _LINE_STYLES[kind],
        "marker": _LINE_MARKERS[kind],
    }
