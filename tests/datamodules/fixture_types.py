"""Types of the fixtures that write small data sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

MakeImage = Callable[..., bytes]
WriteTar = Callable[[Path, dict[str, bytes]], Path]
WriteParquet = Callable[..., Path]
Fill = Callable[[Path, dict[str, bytes]], Path]
FolderData = Callable[[Path], Path]
