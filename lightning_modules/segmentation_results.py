"""Results of a segmentation test: a table for people and a file for the table of several runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_modules.metrics.segmentation_scores import SegmentationScores
from lightning_modules.text_files import table_text, write_text

if TYPE_CHECKING:
    from rich.table import Table

_MAIN_SPLIT = "test"
_MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class SegmentationResult:
    """Scores of one run on one split, in [0, 1]; None where a class does not occur.

    Attributes:
        label: What the run is called, such as joint.
        seed: Of the run.
        mode: linear, decoder or full.
        source: Name of the data.
        split: Name of the split.
        clouds: Number of clouds.
        class_names: Names of the classes.
        iou: Intersection over union of each class.
        acc: Share of each class's points that were found.
        points: Points of each class.
        miou: Mean of ``iou`` over the classes that occur.
        macc: Mean of ``acc`` over the classes that occur.
        allacc: Share of all points that were found.
    """

    label: str
    seed: int
    mode: str
    source: str
    split: str
    clouds: int
    class_names: tuple[str, ...]
    iou: tuple[float | None, ...]
    acc: tuple[float | None, ...]
    points: tuple[int, ...]
    miou: float
    macc: float
    allacc: float


def plain_scores(scores: SegmentationScores) -> dict[str, Any]:
    """Scores as the fields of `SegmentationResult`."""
    return {
        "iou": _known(scores.iou),
        "acc": _known(scores.acc),
        "points": tuple(scores.points.tolist()),
        "miou": float(scores.miou),
        "macc": float(scores.macc),
        "allacc": float(scores.allacc),
    }


def _known(values: Tensor) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else value for value in values.tolist())


def result_file(run: Path, split: str = _MAIN_SPLIT) -> Path:
    """File of a run's result: segmentation.json, with the split's name in it unless it is test."""
    name = "segmentation" if split == _MAIN_SPLIT else f"segmentation-{split.replace('/', '_')}"
    return run / f"{name}.json"


def write_result(result: SegmentationResult, run: Path) -> Path:
    """Write the JSON file and, beside it, the table as text; returns the former."""
    file = result_file(run, result.split)
    content = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    write_text(file, content + "\n")
    write_text(file.with_suffix(".txt"), table_text(result_table(result), 100))
    return file


def read_result(run: Path, split: str = _MAIN_SPLIT) -> SegmentationResult:
    """Read what `write_result` wrote.

    Raises:
        FileNotFoundError: If the run was not tested on the split.
        ValueError: If the file is damaged.
    """
    file = result_file(run, split)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; run `python train.py test --resume {run}`")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError
        content = json.loads(file.read_text(encoding="utf-8"))
        for name in ("class_names", "iou", "acc", "points"):
            content[name] = tuple(content[name])
        result = SegmentationResult(**content)
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{file}: no result of a segmentation test; test the run again") from None
    if len(result.iou) != len(result.class_names):
        raise ValueError(f"{file}: {len(result.iou)} scores of {len(result.class_names)} classes")
    return result


def result_table(result: SegmentationResult) -> Table:
    """Table of one run: a row for each class, then the means."""
    from rich.table import Table

    title = f"{result.label}: {result.mode} on {result.source}, {result.split}"
    table = Table(title=title, caption=f"{result.clouds} clouds, points of the files")
    table.add_column("class")
    for heading in ("IoU %", "accuracy %", "points"):
        table.add_column(heading, justify="right")
    rows = zip(result.class_names, result.iou, result.acc, result.points, strict=True)
    for name, iou, acc, points in rows:
        table.add_row(name, percent(iou), percent(acc), str(points))
    table.add_section()
    table.add_row("mean", percent(result.miou), percent(result.macc), str(sum(result.points)))
    table.add_row("all points", "", percent(result.allacc), "")
    return table


def percent(value: float | None) -> str:
    """A share as text, a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def mean_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
