"""metrics.csv directly in the run directory, one continuous table across resumed runs."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger, writing each row at once and going on with an existing file.

    Rows are on disk as soon as they are logged, so a killed process loses none. A resumed run
    first drops the rows that it is going to compute again (:meth:`rewind`).

    Args:
        save_dir: The run directory.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(save_dir, name=None, version="")
        self.file = Path(save_dir) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def experiment(self) -> Any:  # noqa: ANN401 - Lightning's own signature
        """This logger itself; Lightning's writer would delete what an earlier call has written."""
        return self

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Tensor | float], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: Scalars by name.
            step: Optimiser steps before the one that these metrics belong to.
        """
        row: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        if "epoch" in row:
            row["epoch"] = int(row["epoch"])
        row["step"] = step
        columns = self._read_columns()
        unknown = sorted(row.keys() - set(columns))
        if unknown:
            self._columns = columns = columns + unknown
            self._rewrite(self._read_rows())
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, columns).writerow(row)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows that training on from ``step`` optimiser steps will write again."""
        if not self.file.is_file():
            return
        self._read_columns()
        rows = self._read_rows()
        kept = [row for row in rows if _is_kept(row, step)]
        if len(kept) < len(rows):
            self._rewrite(kept)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Write nothing: config.yaml beside the table holds every setting."""

    @rank_zero_only
    def save(self) -> None:
        """Write nothing: every row is written when it is logged."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write nothing: every row is written when it is logged."""

    def _read_columns(self) -> list[str]:
        if self._columns is None:
            self._columns = ["epoch", "step"]
            if self.file.is_file() and self.file.stat().st_size > 0:
                with self.file.open(newline="", encoding="utf-8") as stream:
                    self._columns = next(csv.reader(stream))
            else:
                self._rewrite([])
        return self._columns

    def _read_rows(self) -> list[dict[str, str]]:
        with self.file.open(newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.partial")
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns or [], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.file)


def _is_kept(row: Mapping[str, str | None], step: int) -> bool:
    """Say whether a row stays: logged before ``step``, or the result of a test.

    A row cut short by a kill in the middle of writing it has no valid step and goes.
    """
    if any(value and name and name.startswith("test") for name, value in row.items()):
        return True
    try:
        return int(row["step"] or "") < step
    except ValueError:
        return False
