"""Results of comparing ways to reduce tokens: tables, files, curves, and what may be claimed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.metrics.bootstrap import Estimate
from lightning_modules.metrics.reduction_row import ReductionRow
from lightning_modules.pictures import draw_curves, write_png
from lightning_modules.text_files import write_text

if TYPE_CHECKING:
    from rich.table import Table

# Field -> heading, whether it is a percentage, and whether more is better.
FIGURES: Mapping[str, tuple[str, bool, bool]] = {
    "nmse": ("all-token NMSE", False, False),
    "ocr": ("OCR %", True, True),
    "ocr_retrained": ("OCR % retrained", True, True),
    "scene": ("scene %", True, True),
    "scene_retrained": ("scene % retrained", True, True),
    "scene_area": ("scene % retrained, by area", True, True),
    "text_recall": ("text kept %", True, True),
}


def reduction_table(rows: Sequence[ReductionRow], title: str = "") -> Table:
    """Table for the terminal: every method at every share, with 95 % intervals over images.

    The best figure of each share is bold.
    """
    from rich.table import Table

    table = Table(title=title or None, caption="± is half of the 95 % interval over images")
    table.add_column("method")
    for heading in ("share", "tokens", *(heading for heading, _, _ in FIGURES.values())):
        table.add_column(heading, justify="right")
    shown = None
    for row in sorted(rows, key=lambda row: row.share):
        if shown is not None and row.share != shown:
            table.add_section()
        shown = row.share
        cells = [_cell(row, name, _best(rows, row.share, name)) for name in FIGURES]
        table.add_row(row.method, f"{row.share:g}", str(row.tokens), *cells)
    return table


def _best(rows: Sequence[ReductionRow], share: float, name: str) -> float | None:
    """Best value of a figure at a share; None if there is nothing to compare."""
    values = [getattr(row, name) for row in rows if row.share == share]
    known = [float(value.value) for value in values if value is not None]
    if len(known) < 2:
        return None
    return max(known) if FIGURES[name][2] else min(known)


def _cell(row: ReductionRow, name: str, best: float | None) -> str:
    estimate: Estimate | None = getattr(row, name)
    if estimate is None:
        return "–"
    half = (estimate.high - estimate.low) / 2
    percent = FIGURES[name][1]
    text = (
        f"{100 * estimate.value:.1f} ±{100 * half:.1f}"
        if percent
        else f"{estimate.value:.3f} ±{half:.3f}"
    )
    return f"[bold]{text}[/bold]" if estimate.value == best else text


def rivals(rows: Sequence[ReductionRow], selector: str, most: float = 0.3) -> list[str]:
    """Sentences naming the methods that tie or beat the selector at reading, at few tokens.

    Args:
        rows: Of all methods.
        selector: Name of the learned selector's rows.
        most: Largest share that is looked at.

    Returns:
        One line for each share; a tie is a rival inside the selector's interval.
    """
    lines = []
    for own in sorted((row for row in rows if row.method == selector), key=lambda row: row.share):
        if own.share > most:
            continue
        others = [
            row for row in rows if row.share == own.share and not row.method.startswith(selector)
        ]
        ahead = [row.method for row in others if row.ocr.value > own.ocr.high]
        level = [row.method for row in others if own.ocr.low <= row.ocr.value <= own.ocr.high]
        verdict = f"beaten by {', '.join(ahead)}" if ahead else "beaten by none"
        tied = f"; level with {', '.join(level)}" if level else ""
        lines.append(f"OCR at {own.share:g}: the selector is {verdict}{tied}")
    return lines


def write_reduction(
    rows: Sequence[ReductionRow], run: Path, extra: Mapping[str, Any], title: str = ""
) -> list[Path]:
    """Write ``reduction/reduction.json`` and ``.csv``, and a curve for each figure.

    Args:
        rows: Of all methods.
        run: Directory of the run; curves go to its pictures.
        extra: What else belongs to the results; into the JSON file.
        title: Line above the curves.

    Returns:
        The pictures.
    """
    content = {**extra, "rows": [asdict(row) for row in rows]}
    write_text(run / "reduction" / "reduction.json", json.dumps(content, indent=1) + "\n")
    write_text(run / "reduction" / "reduction.csv", _csv(rows))
    pictures = []
    for name, (heading, percent, _) in FIGURES.items():
        curves = _curves(rows, name, 100.0 if percent else 1.0)
        if any(curves.values()):
            picture = draw_curves(curves, "retained share of the tokens", heading, title)
            pictures.append(run / "pictures" / f"reduction-{name}.png")
            write_png(picture, pictures[-1])
    return pictures


def _curves(
    rows: Sequence[ReductionRow], name: str, factor: float
) -> dict[str, list[tuple[float, float]]]:
    """Points of every method, none where a method has no such figure."""
    curves: dict[str, list[tuple[float, float]]] = {row.method: [] for row in rows}
    for row in sorted(rows, key=lambda row: row.share):
        estimate = getattr(row, name)
        if estimate is not None:
            curves[row.method].append((row.share, factor * estimate.value))
    return curves


def _csv(rows: Sequence[ReductionRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    plain = [field.name for field in fields(ReductionRow) if field.name not in FIGURES]
    ends = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    writer.writerow(plain + ends)
    for row in rows:
        figures: list[Any] = []
        for name in FIGURES:
            figures += getattr(row, name) or ("", "", "")
        writer.writerow([getattr(row, name) for name in plain] + figures)
    return text.getvalue()
