"""What a token budget costs and gives: a table, its files and a rate-distortion plot.

Example:
    >>> rows = [RateRow("condensed", 256, 256, 24.1, megabytes=megabytes_of(256, 768))]
    >>> rich.print(rate_table(rows))
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.pictures import draw_curves, write_png
from lightning_modules.text_files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table


@dataclass(frozen=True)
class RateRow:
    """One method at one budget; ``None`` where a number does not apply or was not measured.

    Attributes:
        method: name, one curve of the plot each.
        stored_tokens: tokens stored for a scene, N_s.
        rendered_tokens: tokens used for a view, N_r.
        psnr: dB, mean over scenes.
        ssim: mean over scenes.
        distance: perceptual distance, mean over scenes; the table's caption names which one.
        megabytes: size of the stored tokens, see ``megabytes_of``.
        gmacs_linear: 10^9 multiply-adds per view of the linear layers, as the paper counts.
        gmacs: the same with the attention products.
        milliseconds: time per rendered view.
    """

    method: str
    stored_tokens: int | None
    rendered_tokens: int | None
    psnr: float
    ssim: float | None = None
    distance: float | None = None
    megabytes: float | None = None
    gmacs_linear: float | None = None
    gmacs: float | None = None
    milliseconds: float | None = None


# Field -> heading and number format of its column.
_COLUMNS = {
    "method": ("method", ""),
    "stored_tokens": ("N_s", ","),
    "rendered_tokens": ("N_r", ","),
    "psnr": ("PSNR dB", ".2f"),
    "ssim": ("SSIM", ".3f"),
    "distance": ("", ".3f"),  # its name depends on the network behind it
    "megabytes": ("MB", ".3f"),
    "gmacs_linear": ("GMACs linear", ".3g"),
    "gmacs": ("GMACs all", ".3g"),
    "milliseconds": ("ms/view", ".1f"),
}


def megabytes_of(tokens: int, width: int) -> float:
    """Size of ``tokens`` tokens as the paper counts it: 4 bytes a number, 10^6 bytes a MB."""
    return tokens * width * 4 / 1e6


def rate_table(
    rows: Sequence[RateRow], distance_name: str = "effnet_distance", title: str = ""
) -> Table:
    """Table for the terminal; columns without any number are left out.

    Args:
        rows: in the order in which they are shown.
        distance_name: heading of the perceptual distance.
        title: line above the table.

    Raises:
        ValueError: there are no rows.
    """
    from rich.table import Table

    if not rows:
        raise ValueError("no rows: a rate-distortion table needs at least one")
    shown = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    table = Table(title=title or None)
    for name in shown:
        heading = distance_name if name == "distance" else _COLUMNS[name][0]
        table.add_column(heading, justify="left" if name == "method" else "right")
    for row in rows:
        table.add_row(*(_cell(getattr(row, name), _COLUMNS[name][1]) for name in shown))
    return table


def write_rates(rows: Sequence[RateRow], folder: Path, distance_name: str) -> list[Path]:
    """Writes ``rate_distortion.csv``, ``.json`` and ``.png`` into a folder, each at once.

    Args:
        rows: as in the table.
        folder: made if it is not there.
        distance_name: which perceptual distance it is; kept in the JSON and as the CSV's column.

    Returns:
        The files: csv, json and, if a row has a size, png.
    """
    records = [asdict(row) for row in rows]
    names = [field.name for field in fields(RateRow)]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([distance_name if name == "distance" else name for name in names])
    writer.writerows([["" if r[name] is None else r[name] for name in names] for r in records])
    files = [folder / f"rate_distortion.{kind}" for kind in ("csv", "json", "png")]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(files[0], table.getvalue())
    content = {"distance": distance_name, "rows": records}
    write_text(files[1], json.dumps(content, indent=2, allow_nan=True) + "\n")
    if all(row.megabytes is None for row in rows):
        return files[:2]
    write_png(draw_rate_distortion(rows), files[2])
    return files


def draw_rate_distortion(rows: Sequence[RateRow], title: str = "") -> Image:
    """Draws PSNR against size in MB, a curve for each method.

    A method with several N_r at one N_s is drawn at its largest N_r. Methods without a size, such
    as copying a view, are dashed lines.

    Raises:
        ValueError: no row has a size.
    """
    best: dict[tuple[str, float], RateRow] = {}
    for row in rows:
        if row.megabytes is not None:
            key = row.method, row.megabytes
            if key not in best or (row.rendered_tokens or 0) > (best[key].rendered_tokens or 0):
                best[key] = row
    if not best:
        raise ValueError("no row has a size in MB: there is no rate-distortion curve")
    curves: dict[str, list[tuple[float, float]]] = {}
    for (method, megabytes), row in sorted(best.items(), key=lambda item: item[0][1]):
        curves.setdefault(method, []).append((megabytes, row.psnr))
    levels = {row.method: row.psnr for row in rows if row.megabytes is None}
    ordered = {row.method: curves[row.method] for row in rows if row.method in curves}
    return draw_curves(ordered, "size of a scene in MB", "PSNR in dB", title, levels)


def draw_speed(rows: Sequence[RateRow], title: str = "") -> Image:
    """Draws milliseconds per view against the tokens used for it, a curve for each method.

    Raises:
        ValueError: no row has both.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row.rendered_tokens or 0):
        if row.rendered_tokens is not None and row.milliseconds is not None:
            curves.setdefault(row.method, []).append((row.rendered_tokens, row.milliseconds))
    if not curves:
        raise ValueError("no row has both N_r and milliseconds: there is no curve of speed")
    return draw_curves(curves, "tokens used for a view", "milliseconds per view", title)


def _cell(value: str | float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
