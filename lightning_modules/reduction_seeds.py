"""Several tests of token reduction as one table, with intervals over their seeds.

python -m lightning_modules.reduction_seeds runs/token_reduction/a runs/token_reduction/b ...
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lightning_modules.reduction_results import FIGURES

# 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom; more are taken as the last.
_QUANTILES = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class SeedMean(NamedTuple):
    """A figure over seeds.

    Attributes:
        mean: Over the runs.
        half: Half of the 95 % interval of the mean; NaN for a single run.
    """

    mean: float
    half: float


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Mean of one figure over runs, with Student's interval."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return SeedMean(mean, math.nan)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _QUANTILES[min(count - 1, len(_QUANTILES)) - 1]
    return SeedMean(mean, quantile * deviation / math.sqrt(count))


def read_rows(run: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """Rows of a tested run by method and share.

    Raises:
        FileNotFoundError: If the run was not tested.
    """
    file = run / "reduction" / "reduction.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; run `python train.py test --resume {run}`")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {(row["method"], row["share"]): row for row in rows}


def seeds_table(runs: Sequence[dict[tuple[str, float], dict[str, Any]]]) -> Table:
    """Means over runs, by share and method, of the rows that all runs have."""
    table = Table(title=f"{len(runs)} runs", caption="± is half of the 95 % interval over runs")
    table.add_column("method")
    table.add_column("share", justify="right")
    for heading, _, _ in FIGURES.values():
        table.add_column(heading, justify="right")
    keys = [key for key in runs[0] if all(key in run for run in runs)]
    shown = None
    for key in sorted(keys, key=lambda key: key[1]):
        if shown is not None and key[1] != shown:
            table.add_section()
        shown = key[1]
        cells = [_cell([run[key][name] for run in runs], percent) for name, (_, percent, _) in
                 FIGURES.items()]  # fmt: skip
        table.add_row(key[0], f"{key[1]:g}", *cells)
    return table


def _cell(estimates: Sequence[Sequence[float] | None], percent: bool) -> str:
    known = [estimate[0] for estimate in estimates if estimate is not None]
    if len(known) < len(estimates):
        return "–"
    mean, half = seed_mean(known)
    return f"{100 * mean:.1f} ±{100 * half:.1f}" if percent else f"{mean:.3f} ±{half:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Token reduction over seeds.")
    parser.add_argument("runs", type=Path, nargs="+", help="directories of tested runs")
    chosen = parser.parse_args(arguments)
    try:
        runs = [read_rows(run) for run in chosen.runs]
    except FileNotFoundError as error:
        parser.error(str(error))
    Console(width=max(Console().width, 150)).print(seeds_table(runs))


if __name__ == "__main__":
    main()
