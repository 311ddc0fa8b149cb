"""Ways in which a checkpoint comes to harm on a disk."""

from __future__ import annotations

import os
from pathlib import Path


def truncate(file: Path) -> None:
    """Lose the second half."""
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """Change one byte of the weights, which the zip format alone would not notice."""
    content = bytearray(file.read_bytes())
    position = content.find(b"data/0") + 200
    content[position] ^= 0xFF
    file.write_bytes(bytes(content))


def empty(file: Path) -> None:
    """Lose everything."""
    file.write_bytes(b"")


def text(file: Path) -> None:
    """Be something else."""
    file.write_text("these are not weights\n")


DAMAGES = (truncate, flip, empty, text)
