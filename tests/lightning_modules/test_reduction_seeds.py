"""The tables of several seeds as one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.reduction_results import FIGURES
from lightning_modules.reduction_seeds import main, seed_mean


def write_run(folder: Path, ocr: float, **figures: list[float] | None) -> Path:
    known: dict[str, Any] = dict.fromkeys(FIGURES) | {"ocr": [ocr, 0.0, 1.0]} | figures
    rows = [{"method": name, "share": 0.3, **known} for name in ("selector", "random")]
    (folder / "reduction").mkdir(parents=True)
    (folder / "reduction" / "reduction.json").write_text(json.dumps({"rows": rows}))
    return folder


def test_interval_of_the_mean() -> None:
    found = seed_mean((1.0, 2.0, 3.0))
    assert found.mean == 2
    assert found.half == pytest.approx(4.303 / math.sqrt(3))  # Student's t, two degrees
    assert math.isnan(seed_mean((1.0,)).half)


def test_rows_of_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"run{ocr}", ocr, nmse=[0.1, 0.0, 0.2]) for ocr in (0.9, 0.94)]
    main([str(run) for run in runs])
    shown = capsys.readouterr().out
    assert "2 runs" in shown
    line = next(line for line in shown.splitlines() if "selector" in line)
    # Half of the interval: 12.71 * .02828 / sqrt(2).
    assert "0.3" in line
    assert "92.0 ±25.4" in line
    assert "0.100 ±0.000" in line


def test_figure_that_a_run_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a", 0.9, scene=[0.5, 0.4, 0.6])
    main([str(first), str(write_run(tmp_path / "b", 0.9))])
    assert "50.0" not in capsys.readouterr().out


def test_run_without_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    assert f"test --resume {tmp_path}" in capsys.readouterr().err
