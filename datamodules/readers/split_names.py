"""Which split a file belongs to, from its name or its folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from datamodules.errors import DataError
from datamodules.readers.protocol import Split

SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}
"""Words that name a split in a file or folder name."""

_WORD = re.compile(rf"(?:^|[^a-z])({'|'.join(SPLIT_WORDS)})(?:[^a-z]|$)")


def split_of(file: Path, root: Path) -> Split | None:
    """Split named by a file, else by the nearest folder below the root that names one."""
    parts = file.relative_to(root).parts
    for part in (file.stem, *reversed(parts[:-1])):
        if match := _WORD.search(part.lower()):
            return SPLIT_WORDS[match[1]]
    return None


def group_by_split(files: Iterable[Path], root: Path) -> dict[Split, list[Path]]:
    """Share files out over splits; if no name tells a split, all are training files.

    Args:
        files: files below the root.
        root: names are looked at from here on.

    Returns:
        The files of each split found, in the given order.

    Raises:
        DataError: if only some of the names tell their split.
    """
    splits = {file: split_of(file, root) for file in files}
    unclear = [file for file, split in splits.items() if split is None]
    if unclear and len(unclear) < len(splits):
        raise DataError(
            f"{unclear[0]}: no split in the name, but other files have one; call it train*, val* "
            f"or test*{unclear[0].suffix}"
        )
    found: dict[Split, list[Path]] = {}
    for file, split in splits.items():
        found.setdefault(split or "train", []).append(file)
    return found
