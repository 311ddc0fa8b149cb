"""Bytes, grids, curves and PNG files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules.pictures import (
    _line_style,
    draw_curves,
    draw_grid,
    from_bytes,
    to_bytes,
    to_pil,
    write_png,
)


def test_bytes_survive_a_round_trip_and_rounding_is_to_nearest() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)
    between = torch.tensor([99.4, 99.6, -7.0, 400.0]) / 127.5 - 1
    assert to_bytes(between).tolist() == [99, 100, 0, 255]
    assert to_bytes(torch.tensor([0.5], dtype=torch.bfloat16)).tolist() == [191]


def test_png_holds_the_pixels_and_leaves_no_other_file(tmp_path: Path) -> None:
    grey = torch.linspace(-1, 1, 256).view(1, 16, 16)
    write_png(to_pil(grey), tmp_path / "new" / "grey.png")
    with Image.open(tmp_path / "new" / "grey.png") as picture:
        stored = np.asarray(picture)
    assert stored.shape == (16, 16)
    assert stored.flatten().tolist() == list(range(256))
    assert to_pil(grey.expand(3, -1, -1)).mode == "RGB"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grey.png"]
    with pytest.raises(ValueError, match=r"\(2, 4, 4\): must be"):
        to_pil(torch.zeros(2, 4, 4))


def find(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Bounds (left, top, right, bottom) of a colour, and that it fills them."""
    hits = (np.asarray(picture) == np.array(colour)).all(-1)
    ys, xs = np.nonzero(hits)
    bounds = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    assert hits[bounds[1] : bounds[3], bounds[0] : bounds[2]].all()
    return bounds


def test_grid_places_every_image_enlarged_beside_its_name() -> None:
    red, blue = torch.full((2, 3, 8, 8), -1.0), torch.full((2, 3, 8, 8), -1.0)
    red[0, 0], blue[1, 2] = 1.0, 1.0
    picture = draw_grid([("first", red), ("second name", blue)], title="A title")
    left, top, right, bottom = find(picture, (255, 0, 0))
    assert (right - left, bottom - top) == (64, 64)
    blue_left, blue_top, *_ = find(picture, (0, 0, 255))
    assert blue_left == right + 3
    assert blue_top == bottom + 3
    names = np.asarray(picture.convert("L"))[:, : left - 8]
    assert (names[top:bottom] < 100).any()
    assert (names[bottom + 3 : bottom + 67] < 100).any()
    assert (names[:, :8] == 255).all()


def test_grid_with_columns_long_title_and_uneven_rows() -> None:
    images = torch.zeros(3, 1, 8, 8)
    plain = draw_grid([("", images), ("", images[:1])], scale=2)
    assert plain.size == (16 + 3 * 19 - 3 + 16, 16 + 2 * 19 - 3 + 16)
    titled = draw_grid([("", images)], title="w" * 60, columns=["a", "b", "c"], scale=2)
    assert titled.width > 500
    assert (np.asarray(titled)[:, -8:] == 255).all()
    with pytest.raises(ValueError, match="at least one image"):
        draw_grid([("empty", images[:0])])


def test_curves_show_each_series_in_its_colour_and_the_level() -> None:
    points = [(0.0, 0.6), (1.0, 0.8)]
    picture = draw_curves(
        {"one": points, "two": [(x, y / 2) for x, y in points]}, "x", "y", "title", {"level": 0.9}
    )
    pixels = np.asarray(picture).reshape(-1, 3)
    assert picture.size == (1280, 800)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x7F, 0x7F, 0x7F)):
        assert (pixels == np.array(colour)).all(-1).sum() > 100
    with pytest.raises(ValueError, match="no points"):
        draw_curves({"empty": []}, "x", "y")


def test_more_curves_than_colours_stay_apart() -> None:
    styles = [_line_style(number) for number in range(18)]
    assert len({tuple(style.values()) for style in styles}) == 18
    points = [(0.0, 0.6), (1.0, 0.8)]
    shown = draw_curves({"one": [], "two": points}, "x", "y")
    pixels = np.asarray(shown).reshape(-1, 3)
    assert (pixels == np.array((0xD5, 0x5E, 0x00))).all(-1).any(), "a colour belongs to a name"
    assert not (pixels == np.array((0x00, 0x72, 0xB2))).all(-1).any()


def test_importing_the_evaluation_loads_nothing_heavy() -> None:
    code = """
import sys
import lightning.pytorch, torchmetrics
before = set(sys.modules)  # torchmetrics itself takes matplotlib along if it is there
import lightning_modules.metrics.frechet, lightning_modules.metrics.sample_accuracy
import lightning_modules.callbacks.sample_grid, lightning_modules.callbacks.prediction_writer
import models.layers.efficientnet_lite0, models.layers.inception
heavy = ("timm", "wandb", "matplotlib", "datasets", "torch_fidelity")
print([name for name in heavy if name in set(sys.modules) - before])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
