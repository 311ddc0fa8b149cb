"""Text files that appear under their name only when whole."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.whole_files import whole_file

if TYPE_CHECKING:
    from rich.table import Table


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; an older file of that name stays until the new one is complete."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def table_text(table: Table, width: int, notes: Sequence[str] = ()) -> str:
    """A table as plain text, with lines below it.

    Args:
        table: Made for a terminal.
        width: Characters in a line.
        notes: Lines below the table.
    """
    from rich.console import Console

    text = io.StringIO()
    # Also where colours are asked of every program, as by FORCE_COLOR.
    console = Console(file=text, width=width, color_system=None, force_terminal=False)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    return text.getvalue()
