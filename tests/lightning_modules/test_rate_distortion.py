"""The table of budgets: what is shown, what is written, what is drawn."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lightning_modules.rate_distortion import (
    RateRow,
    draw_rate_distortion,
    draw_speed,
    megabytes_of,
    rate_table,
    write_rates,
)

ROWS = [
    RateRow("condensed", 4096, 4096, 28.41, 0.9, 0.1, 12.582912, 70.5, 118.8, 18.4),
    RateRow("condensed", 4096, 512, 23.89, 0.8, 0.2, 12.582912, 45.2, 59.6, 11.1),
    RateRow("condensed", 256, 256, 25.21, 0.85, 0.15, 0.786432, 41.0, 55.0, 9.0),
    RateRow("random tokens", 256, 256, 22.5, 0.7, 0.3, 0.786432),
    RateRow("nearest view", None, None, 15.0, 0.5, 0.6),
]


def shown(rows: list[RateRow], **options: str) -> list[list[str]]:
    """Cells of the printed table, line by line."""
    stream = io.StringIO()
    Console(width=160, file=stream).print(rate_table(rows, **options))
    lines = [line for line in stream.getvalue().splitlines() if "│" in line or "┃" in line]
    return [[c.strip() for c in line.replace("┃", "│").split("│")[1:-1]] for line in lines]


def test_sizes_are_the_published_ones() -> None:
    assert [round(megabytes_of(tokens, 768), 2) for tokens in (256, 1024, 4096)] == [
        0.79, 3.15, 12.58
    ]  # fmt: skip


def test_table_shows_every_number_and_dashes_for_what_was_not_measured() -> None:
    lines = shown(ROWS, distance_name="lpips_vgg")
    assert lines[0] == [
        "method", "N_s", "N_r", "PSNR dB", "SSIM", "lpips_vgg", "MB", "GMACs linear", "GMACs all",
        "ms/view",
    ]  # fmt: skip
    assert lines[1] == [
        "condensed", "4,096", "4,096", "28.41", "0.900", "0.100", "12.583", "70.5", "119", "18.4"
    ]  # fmt: skip
    assert lines[5] == ["nearest view", "–", "–", "15.00", "0.500", "0.600", "–", "–", "–", "–"]


def test_columns_without_numbers_are_left_out() -> None:
    lines = shown([RateRow("random tokens", 16, 16, 20.0, megabytes=0.1)])
    assert lines[0] == ["method", "N_s", "N_r", "PSNR dB", "MB"]
    with pytest.raises(ValueError, match="no rows"):
        rate_table([])


def test_files_hold_every_row_and_name_the_distance(tmp_path: Path) -> None:
    files = write_rates(ROWS, tmp_path / "new", "effnet_distance")
    assert [file.suffix for file in files] == [".csv", ".json", ".png"]
    with files[0].open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == 5
    assert table[1]["psnr"] == "23.89"
    assert table[1]["effnet_distance"] == "0.2"
    assert table[4]["stored_tokens"] == ""
    content = json.loads(files[1].read_text())
    assert content["distance"] == "effnet_distance"
    assert [RateRow(**row) for row in content["rows"]] == ROWS
    with Image.open(files[2]) as picture:
        assert picture.size[0] > 1000
    assert not list((tmp_path / "new").glob(".*"))


def test_without_sizes_no_curve_is_drawn(tmp_path: Path) -> None:
    assert [f.suffix for f in write_rates(ROWS[4:], tmp_path, "effnet_distance")] == [
        ".csv",
        ".json",
    ]
    with pytest.raises(ValueError, match="no row has a size"):
        draw_rate_distortion(ROWS[4:])


def test_curve_takes_the_largest_render_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(
        "lightning_modules.rate_distortion.draw_curves", lambda *arguments: drawn.extend(arguments)
    )
    draw_rate_distortion(ROWS)
    assert drawn[0] == {
        "condensed": [(0.786432, 25.21), (12.582912, 28.41)],
        "random tokens": [(0.786432, 22.5)],
    }
    assert drawn[4] == {"nearest view": 15.0}


def test_speed_is_drawn_against_tokens_used() -> None:
    picture = np.asarray(draw_speed(ROWS))
    assert picture.std() > 1
    with pytest.raises(ValueError, match="no row has both"):
        draw_speed(ROWS[3:])
