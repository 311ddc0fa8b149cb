"""Quick checks of the files that items name: that they exist, and what their headers say."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from datamodules.errors import DataError

if TYPE_CHECKING:
    from datamodules.paired_2d3d.scene_tree import SceneTree
    from datamodules.paired_2d3d.split_files import PairedItem

_NAMED = 3


class Finding(NamedTuple):
    """Something found in a root.

    Attributes:
        kind: what is wrong, in the words of the report's headings.
        text: which file, and the numbers.
    """

    kind: str
    text: str


class FolderListings:
    """Whether files exist, with one look at each folder instead of one at each file."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}

    def holds(self, path: Path) -> bool:
        """Whether there is a file or folder of this name."""
        folder = path.parent
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries)
            except OSError:
                self._names[folder] = frozenset()
        return path.name in self._names[folder]


def check_headers(tree: SceneTree, folder: str) -> list[Finding]:
    """Compare the shapes that the arrays of a scene state."""
    findings = []
    count: int | None = None
    for name in ("coord", "color", "normal"):
        path = f"{folder}/{name}.npy"
        try:
            if name != "coord" and not tree.file(path).exists():
                continue
            rows = len(tree.array(path, 3))
        except DataError as error:
            kind = "missing files" if "no such file" in str(error) else "damaged arrays"
            findings.append(Finding(kind, str(error)))
            continue
        count = rows if count is None else count
        if rows != count or rows == 0:
            text = f"{tree.root / path}: {rows} rows, expected {count or 'at least 1'}"
            findings.append(Finding("arrays that do not fit", text))
    return findings


def quick_findings(tree: SceneTree, items: Iterable[PairedItem]) -> list[Finding]:
    """What is wrong with the files of items, as far as folders and headers tell.

    Args:
        tree: the root.
        items: to be used.
    """
    listings = FolderListings()
    findings = []
    clouds: set[str] = set()
    for item in items:
        if item.cloud not in clouds:
            clouds.add(item.cloud)
            findings += check_headers(tree, item.cloud)
        for path in (*item.images, *item.correspondences):
            place = tree.root / path
            if not listings.holds(place):
                findings.append(Finding("missing files", f"{place}: no such file"))
    return findings


def check_items(tree: SceneTree, items: Iterable[PairedItem]) -> None:
    """Make sure that the files of items are there, and that clouds have the right shapes.

    Raises:
        DataError: one line with the number of problems and the first ones.
    """
    findings = quick_findings(tree, items)
    if not findings:
        return
    named = "; ".join(finding.text for finding in findings[:_NAMED])
    more = ", ..." if len(findings) > _NAMED else ""
    raise DataError(
        f"{tree.root}: {len(findings)} problems with the files of its items: {named}{more}; for "
        f"all of them run python -m datamodules.paired_2d3d.validation_report {tree.root}"
    )
