"""What the directory of a finished run holds: settings, curves, tables and pictures, read back.

Everything is found by its place in the directory, so any method's runs can be read.
"""

from __future__ import annotations

import ast
import csv
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_STAMP = re.compile(r"-(\d{8}-\d{6}(-\d+)?|job\w+)$")
_STEP = re.compile(r"-step(\d+)$")
# Folders of a run whose files are no results to read.
_NO_TABLES = {"checkpoints", "wandb", "pictures", "predictions", "clouds", "foundations", "reducer"}
_PICTURE_SUFFIXES = (".png", ".gif", ".jpg")
_MOST_PREDICTIONS = 6


class Curve(NamedTuple):
    """A logged value over training.

    Attributes:
        name: Such as ``train/loss``.
        points: (step, value), in the order of steps.
    """

    name: str
    points: list[tuple[float, float]]


class RunContents(NamedTuple):
    """A run as a reader wants to see it.

    Attributes:
        path: Its directory.
        name: Without the time of its start.
        method: Folder of the configurations that name its model.
        purpose: The sentence at the head of its model's module; may be empty.
        config: The settings.
        seconds: From the first file to the last checkpoint, about the time of training; None if
            there is no checkpoint.
        metrics: Of the test, by name; None where a value is not finite.
        curves: Losses over training.
        tables: Paths of text tables, and of csv tables that have no text beside them.
        pictures: Paths, each kind once, as of its last step.
    """

    path: Path
    name: str
    method: str
    purpose: str
    config: dict[str, Any]
    seconds: float | None
    metrics: dict[str, float | None]
    curves: list[Curve]
    tables: list[Path]
    pictures: list[Path]


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Directories of runs, given themselves or by a folder above them.

    Of runs below a folder the newest of each name is taken.

    Raises:
        FileNotFoundError: If there is no run at a place.
    """
    found: list[Path] = []
    for place in places:
        if (place / "config.yaml").is_file():
            found.append(place.resolve())
            continue
        newest: dict[tuple[Path, str], Path] = {}
        files = [*place.glob("*/config.yaml"), *place.glob("*/*/config.yaml")]
        for run in sorted({file.parent.resolve() for file in files}, key=lambda run: run.name):
            newest[run.parent, run_name(run)] = run
        if not newest:
            raise FileNotFoundError(f"{place}: no run in it; expected folders with a config.yaml")
        found += newest.values()
    return list(dict.fromkeys(found))


def run_name(run: Path) -> str:
    """Name of a run without the time of its start."""
    return _STAMP.sub("", run.name)


def read_run(run: Path) -> RunContents:
    """Read what a run directory holds.

    Raises:
        ValueError: If its config.yaml is no configuration.
    """
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        model = str(config["model"]["class_path"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{run / 'config.yaml'}: not the configuration of a run") from None
    return RunContents(
        path=run,
        name=run_name(run),
        method=_methods().get(model, run.parent.name),
        purpose=_purpose(model.rpartition(".")[0]),
        config=config,
        seconds=_seconds(run),
        metrics=_read_metrics(run / "test_metrics.json"),
        curves=_read_curves(run / "metrics.csv"),
        tables=_find_tables(run),
        pictures=_find_pictures(run),
    )


@cache
def _methods() -> dict[str, str]:
    """The folder of configurations that names each model class."""
    found: dict[str, str] = {}
    for file in sorted(_CONFIGS.glob("*/*.yaml")):
        model = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("model")
        if isinstance(model, dict) and "class_path" in model:
            found.setdefault(model["class_path"], file.parent.name)
    return found


def _purpose(module: str) -> str:
    """First line of a module's docstring, read without importing it."""
    try:
        spec = importlib.util.find_spec(module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        text = ast.get_docstring(ast.parse(source)) or ""
    except (ImportError, ValueError, SyntaxError, OSError):
        return ""
    return text.partition("\n")[0]


def _seconds(run: Path) -> float | None:
    ends = [file.stat().st_mtime for file in run.glob("checkpoints/*.ckpt")]
    return max(ends) - (run / "config.yaml").stat().st_mtime if ends else None


def _read_metrics(file: Path) -> dict[str, float | None]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        str(name): float(value) if isinstance(value, (int, float)) else None
        for name, value in sorted(content.items())
    }


def _read_curves(file: Path) -> list[Curve]:
    """The losses of training and validation, if they were logged at two steps or more."""
    if not file.is_file():
        return []
    points: dict[str, list[tuple[float, float]]] = {}
    with file.open(encoding="utf-8", errors="replace", newline="") as stream:
        for row in csv.DictReader(stream):
            for name in ("train/loss", "val/loss"):
                try:
                    point = float(row.get("step") or ""), float(row.get(name) or "")
                except ValueError:
                    continue
                if abs(point[1]) < float("inf"):  # neither infinite nor NaN
                    points.setdefault(name, []).append(point)
    return [Curve(name, sorted(found)) for name, found in points.items() if len(found) > 1]


def _find_tables(run: Path) -> list[Path]:
    texts = [*run.glob("*.txt"), *run.glob("*/*.txt")]
    written = [*run.glob("*/*.csv")]
    tables = texts + [file for file in written if file.with_suffix(".txt") not in texts]
    return sorted(file for file in tables if file.parent.name not in _NO_TABLES)


def _find_pictures(run: Path) -> list[Path]:
    newest: dict[str, Path] = {}
    for file in sorted(_images(run / "pictures")):
        newest[_STEP.sub("", file.stem)] = file
    predictions = sorted(_images(run / "predictions"))
    return [*newest.values(), *predictions[:_MOST_PREDICTIONS]]


def _images(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix in _PICTURE_SUFFIXES and not file.name.startswith("."):
            yield file
