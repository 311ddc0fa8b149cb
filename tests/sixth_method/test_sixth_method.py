"""A method is added by new files and one row of tests/recovery/methods.py, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml
from calls import call
from comparison import rows
from methods import SMALLEST, fit_row

REPOSITORY = Path(__file__).resolve().parents[2]
PRODUCT = ("train.py", "pyproject.toml", "models", "lightning_modules", "datamodules", "configs")


def test_product_does_not_know_it() -> None:
    files = [file for name in PRODUCT for file in _files(REPOSITORY / name)]
    assert len(files) > 100
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace").lower()
        assert "sixth" not in text, file
        assert "denoising.denoising" not in text, file


def test_it_is_one_row_of_the_tests() -> None:
    table = (REPOSITORY / "tests/recovery/methods.py").read_text()
    (row,) = (line for line in table.splitlines() if "sixth_method" in line)
    assert row.strip().startswith('MethodRow("sixth", ')


def test_it_learns_and_is_tested_like_any_other(tmp_path: Path) -> None:
    run = fit_row(SMALLEST["sixth"], tmp_path, "--trainer.max_steps=40")
    outcome = call("test", "--resume", str(run))
    assert outcome.code == 0, outcome.err
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "tests.sixth_method.denoising.Denoising"
    losses = [float(row["train/loss"]) for row in rows(run) if row["train/loss"]]
    assert losses[-1] < 0.8 * losses[0]


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return [file for file in place.rglob("*") if file.suffix in (".py", ".yaml", ".md", ".toml")]
