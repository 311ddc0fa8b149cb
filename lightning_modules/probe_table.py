"""Several segmentation tests as one table: arms of an experiment, seeds, and their differences.

python -m lightning_modules.probe_table runs/point_segmentation/joint-0 runs/... [--output probe]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lightning_modules.segmentation_results import (
    SegmentationResult,
    mean_known,
    percent,
    read_result,
)
from lightning_modules.text_files import table_text, write_text


class ArmMean(NamedTuple):
    """An arm over its seeds.

    Attributes:
        label: Name of the arm.
        seeds: Seeds, in the order of runs.
        miou: Mean over seeds, in [0, 1].
        iou: Mean over seeds of each class; None where it never occurs.
    """

    label: str
    seeds: tuple[int, ...]
    miou: float
    iou: tuple[float | None, ...]


def arm_means(results: Sequence[SegmentationResult]) -> list[ArmMean]:
    """Means over the seeds of each arm, arms in the order in which they first come.

    Raises:
        ValueError: If runs were tested on other data, or an arm has a seed twice.
    """
    first = results[0]
    for result in results[1:]:
        for name in ("source", "split", "class_names", "mode", "clouds"):
            one, other = getattr(first, name), getattr(result, name)
            if one != other:
                raise ValueError(
                    f"{name}={other} of {result.label}, but {one} of {first.label}: only runs "
                    "tested alike can be compared"
                )
    arms = []
    for label in dict.fromkeys(result.label for result in results):
        own = [result for result in results if result.label == label]
        seeds = tuple(result.seed for result in own)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{label}: seeds {seeds}, one of them twice; name each run once")
        iou = tuple(mean_known(values) for values in zip(*(r.iou for r in own), strict=True))
        arms.append(ArmMean(label, seeds, sum(r.miou for r in own) / len(own), iou))
    return arms


def probe_table(results: Sequence[SegmentationResult]) -> Table:
    """A row for each run, for the mean of each arm, and for the difference to the arm before.

    Differences are in points and, where both arms have the same seeds, their range over seeds is
    given too.
    """
    arms = arm_means(results)
    first = results[0]
    table = Table(
        title=f"{first.mode} segmentation on {first.source}, {first.split}",
        caption=f"IoU in %, {first.clouds} clouds; differences in points, range over seeds",
    )
    table.add_column("arm")
    for heading in ("seed", "mIoU", *first.class_names):
        table.add_column(heading, justify="right")
    for arm in arms:
        for result in results:
            if result.label == arm.label:
                cells = [percent(value) for value in (result.miou, *result.iou)]
                table.add_row(arm.label, str(result.seed), *cells)
        if len(arm.seeds) > 1:
            cells = [percent(value) for value in (arm.miou, *arm.iou)]
            table.add_row(
                f"[bold]{arm.label}[/bold]", "mean", *(f"[bold]{c}[/bold]" for c in cells)
            )
        table.add_section()
    for later in range(1, len(arms)):
        for earlier in range(later):
            table.add_row(*_difference_row(arms[later], arms[earlier], results))
    return table


def _difference_row(
    arm: ArmMean, other: ArmMean, results: Sequence[SegmentationResult]
) -> list[str]:
    pairs = zip(arm.iou, other.iou, strict=True)
    classes = [None if a is None or b is None else a - b for a, b in pairs]
    differences = seed_differences(arm, other, results)
    cell = _points(arm.miou - other.miou)
    if len(differences) > 1:
        cell += f" ({_points(min(differences))} .. {_points(max(differences))})"
    return [
        f"{arm.label} - {other.label}",
        "",
        cell,
        *("–" if c is None else _points(c) for c in classes),
    ]


def seed_differences(
    arm: ArmMean, other: ArmMean, results: Sequence[SegmentationResult]
) -> list[float]:
    """Difference in mIoU for each seed that both arms have, in [-1, 1]."""
    miou = {(result.label, result.seed): result.miou for result in results}
    shared = [seed for seed in arm.seeds if seed in other.seeds]
    return [miou[arm.label, seed] - miou[other.label, seed] for seed in shared]


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def write_table(results: Sequence[SegmentationResult], table: Table, output: Path) -> None:
    """Write <output>.txt, .csv (a row for each run) and .json (runs and means)."""
    write_text(output.with_suffix(".txt"), table_text(table, 160))
    means = [arm._asdict() for arm in arm_means(results)]
    content = {"runs": [asdict(result) for result in results], "means": means}
    write_text(
        output.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "seed", "miou", "macc", "allacc", *results[0].class_names])
    for result in results:
        scores = (result.miou, result.macc, result.allacc)
        writer.writerow([result.label, result.seed, *scores, *result.iou])
    write_text(output.with_suffix(".csv"), text.getvalue())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the runs named on the command line, and write it."""
    parser = argparse.ArgumentParser(description="Segmentation tests of several runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of tested runs")
    parser.add_argument("--split", default="test", help="test split (default: test)")
    parser.add_argument("--output", type=Path, help="files to write, without suffix")
    chosen = parser.parse_args(arguments)
    try:
        results = [read_result(run, chosen.split) for run in chosen.runs]
        table = probe_table(results)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    Console(width=max(Console().width, 150)).print(table)
    output = chosen.output or chosen.runs[0].parent / f"probe-{chosen.split}"
    write_table(results, table, output)
    print(f"table            {output.with_suffix('.txt')}")


if __name__ == "__main__":
    main()
