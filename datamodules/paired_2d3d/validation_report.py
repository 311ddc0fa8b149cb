"""Complete check of a root before training, in one readable report.

Example:
    ``python -m datamodules.paired_2d3d.validation_report data/scannet`` reads every file that the
    split files name, prints what is wrong with them, and exits with 1 if anything is.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from datamodules.errors import DataError
from datamodules.paired_2d3d.file_checks import FileChecks
from datamodules.paired_2d3d.patch_grid import PatchGrid
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.split_files import PairedItem, read_splits, split_names
from datamodules.paired_2d3d.tree_checks import Finding

_SHOWN = 10


@dataclass(frozen=True)
class RootReport:
    """What was read, and what is wrong with it.

    Attributes:
        root: folder that was checked.
        counts: number of what was read, by its name.
        findings: what is wrong, in the order of reading.
        notes: what is unusual, but may be meant so.
    """

    root: Path
    counts: dict[str, int]
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def text(self, shown: int = _SHOWN) -> str:
        """The report.

        Args:
            shown: lines of each kind; the others are counted.
        """
        read = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        lines = [f"{self.root}: {read}", *_listed(self.findings, shown)]
        if self.notes:
            lines += ["May be meant so:", *_listed(self.notes, shown)]
        verdict = f"{len(self.findings)} problems found" if self.findings else "no problem found"
        return "\n".join([*lines, verdict])


def _listed(findings: Sequence[Finding], shown: int) -> list[str]:
    by_kind: dict[str, list[str]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding.text)
    lines = []
    for kind, texts in by_kind.items():
        lines.append(f"{kind}: {len(texts)}")
        lines += [f"  {text}" for text in texts[:shown]]
        if len(texts) > shown:
            lines.append(f"  ... and {len(texts) - shown} more")
    return lines


def check_root(
    root: Path,
    splits: Sequence[str] | None = None,
    *,
    patch_grid: tuple[int, int] = (1, 1),
    progress: Progress | None = None,
) -> RootReport:
    """Read every file that the items of a root name, and list what is wrong.

    Args:
        root: folder of one data set, or of several.
        splits: names of the splits to check; None takes all split files.
        patch_grid: rows and columns of patches that every image must be large enough for.
        progress: shows a bar, if given.

    Returns:
        The report; it also tells of split files that cannot be read.
    """
    tree = SceneTree(root)
    checks = FileChecks(tree, PatchGrid(*patch_grid, pixels=1))
    items: list[PairedItem] = []
    try:
        names = split_names(tree) if splits is None else splits
    except DataError as error:
        return RootReport(root, {}, (Finding("split files", str(error)),))
    for name in names:
        try:
            items += read_splits(tree, [name])
        except DataError as error:
            checks.findings.append(Finding("split files", str(error)))
    if not names:
        checks.findings.append(Finding("split files", f"{root}: no splits/<split>.json"))
    task = None if progress is None else progress.add_task("checking", total=len(items))
    for item in items:
        checks.check(item)
        if progress is not None and task is not None:
            progress.advance(task)
    shared, repeated = compare_keys(items)
    counts = {"splits": len(names), "items": len(items), **checks.counts}
    return RootReport(root, counts, (*checks.findings, *shared), tuple(repeated))


def compare_keys(items: Iterable[PairedItem]) -> tuple[list[Finding], list[Finding]]:
    """Keys that occur in several places.

    Returns:
        Keys that stand for the same cloud in several splits, so that these are not apart; and
        keys that stand for different clouds, where the released loader would keep one alone.
    """
    by_key: dict[str, list[PairedItem]] = defaultdict(list)
    for item in items:
        by_key[item.key].append(item)
    shared, repeated = [], []
    for key, group in by_key.items():
        if len(group) == 1:
            continue
        splits = ", ".join(item.split for item in group)
        clouds = Counter(item.cloud for item in group)
        if len(clouds) < len(group):
            text = f"{key}: in {splits}, with the same cloud"
            shared.append(Finding("items in several splits", text))
        else:
            text = f"{key}: in {splits}, with clouds of their own; all are used"
            repeated.append(Finding("keys in several splits", text))
    return shared, repeated


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the root that the command line names.

    Returns:
        0, or 1 if something is wrong.
    """
    parser = argparse.ArgumentParser(description="Check a root of paired clouds and images.")
    parser.add_argument("root", type=Path, help="folder with splits/<split>.json")
    parser.add_argument("--splits", nargs="+", help="names of the splits; all if left out")
    parser.add_argument(
        "--patch-grid", nargs=2, type=int, default=(1, 1), metavar=("ROWS", "COLUMNS")
    )
    parser.add_argument("--shown", type=int, default=_SHOWN, help="lines of each kind")
    given = parser.parse_args(arguments)
    rows, columns = given.patch_grid
    with Progress(transient=True) as progress:
        report = check_root(given.root, given.splits, patch_grid=(rows, columns), progress=progress)
    print(report.text(given.shown))
    return 0 if report.is_sound else 1


if __name__ == "__main__":
    raise SystemExit(main())
