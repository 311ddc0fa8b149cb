"""Tables of what Bifrost-1 generates: for the terminal, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_modules.text_files import table_text, write_text

if TYPE_CHECKING:
    from rich.table import Table

# Figure -> heading, digits behind the point, and factor.
FIGURES: Mapping[str, tuple[str, int, float]] = {
    "r1_group": ("R@1 % of 100", 1, 100.0),
    "r1": ("R@1 % of all", 1, 100.0),
    "r5": ("R@5 % of all", 1, 100.0),
    "psnr": ("PSNR dB", 2, 1.0),
    "mse": ("MSE", 4, 1.0),
    "cosine": ("cosine", 3, 1.0),
    "spread": ("spread", 2, 1.0),
}
_WIDTH = 160


@dataclass(frozen=True)
class GenerationRow:
    """One way of making latents or pictures, rated on one split.

    Attributes:
        split: "train" or "held out".
        source: What they were made from.
        steps: Decoding steps K; None where nothing was decoded.
        guidance: Weight of the caption in decoding, likewise.
        figures: By the names in `FIGURES`.
        seconds: Seconds for each item, by part.
    """

    split: str
    source: str
    figures: Mapping[str, float]
    seconds: Mapping[str, float]
    steps: int | None = None
    guidance: float | None = None

    @property
    def name(self) -> str:
        """The row in a word, for logged names."""
        words = (self.source, self.split)
        parts = [word.translate(str.maketrans(" ", "_", ",'")) for word in words]
        if self.steps is not None:
            parts.insert(1, f"k{self.steps}_w{self.guidance:g}")
        return "_".join(parts)


def generation_table(rows: Sequence[GenerationRow], title: str, caption: str) -> Table:
    """Table for the terminal; a split's rows stand together."""
    from rich.table import Table

    shown = [name for name in FIGURES if any(name in row.figures for row in rows)]
    parts = list(dict.fromkeys(part for row in rows for part in row.seconds))
    table = Table(title=title, caption=caption)
    for heading in ("split", "from"):
        table.add_column(heading)
    numbers = ["K", "guidance", *(FIGURES[name][0] for name in shown)]
    for heading in numbers + [f"{part} ms" for part in parts]:
        table.add_column(heading, justify="right")
    before = None
    for row in rows:
        if before not in (None, row.split):
            table.add_section()
        before = row.split
        settings = [_cell(row.steps, 0), _cell(row.guidance, 1)]
        figures = [_cell(row.figures.get(n), FIGURES[n][1], FIGURES[n][2]) for n in shown]
        times = [_cell(row.seconds.get(part), 1, 1000.0) for part in parts]
        table.add_row(row.split, row.source, *settings, *figures, *times)
    return table


def _cell(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"


def log_generation(loggers: Sequence[Logger], rows: Sequence[GenerationRow], name: str) -> None:
    """Send the rows to Weights & Biases as a table, if it is among the loggers."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            columns = ["split", "source", "steps", "guidance", *FIGURES]
            table = [
                [r.split, r.source, r.steps, r.guidance, *(r.figures.get(n) for n in FIGURES)]
                for r in rows
            ]
            logger.log_table(name, columns=columns, data=table)


def report_generation(
    rows: Sequence[GenerationRow],
    run: Path,
    name: str,
    notes: Sequence[str],
    extra: Mapping[str, Any],
) -> None:
    """Print the table with its notes, and write ``<run>/bifrost/<name>.json`` and ``.txt``.

    Args:
        rows: In the order of the table.
        run: Directory of the run.
        name: Of the files.
        notes: Lines below the table.
        extra: What else belongs to the results; into the JSON file.
    """
    from rich.console import Console

    title = f"{name} on {extra['source']}"
    caption = "times are wall time for each item; groups of 100 are smaller if fewer were asked"
    table = generation_table(rows, title, caption)
    console = Console(width=max(Console().width, _WIDTH))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    content = {**extra, "notes": list(notes), "rows": [asdict(row) for row in rows]}
    write_text(run / "bifrost" / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text(run / "bifrost" / f"{name}.txt", table_text(table, _WIDTH, notes))
