"""Split files: which clouds and photographs form an item.

``splits/<split>.json`` holds {key: {"pointclouds": folder, "images": [files], "correspondences":
[files]}}. Its paths start with ``data/<data set>/`` or are relative to the data set. Items of all
split files are kept: unlike in the released loader, the same key in two of them (a room that
occurs in two areas, say) does not make the later item replace the earlier one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from datamodules.errors import DataError
from datamodules.paired_2d3d.scene_tree import SceneTree


class PairedItem(NamedTuple):
    """One cloud with some of its photographs; all paths are relative to the root.

    Attributes:
        split: split file that names it.
        key: its key there.
        cloud: folder of the scene.
        images: V image files, V >= 0.
        correspondences: V files of links between pixels and points.
    """

    split: str
    key: str
    cloud: str
    images: tuple[str, ...]
    correspondences: tuple[str, ...]


def read_splits(tree: SceneTree, splits: Sequence[str]) -> tuple[PairedItem, ...]:
    """Items of some splits, in the order of the splits and of their files.

    Args:
        tree: the root.
        splits: names, such as train or Area_1.

    Raises:
        DataError: if a split file is missing in all data sets, or cannot be read.
    """
    items: list[PairedItem] = []
    for split in splits:
        paths = [f"{dataset}/splits/{split}.json".lstrip("/") for dataset in tree.datasets]
        found = [path for path in paths if tree.file(path).is_file()] or paths[:1]
        for path in found:
            dataset = PurePosixPath(path).parent.parent.as_posix()
            items.extend(_read_items(tree, path, "" if dataset == "." else dataset))
    return tuple(items)


def split_names(tree: SceneTree) -> tuple[str, ...]:
    """Names of all split files of a root, sorted."""
    return tuple(
        sorted(
            {
                path.stem
                for dataset in tree.datasets
                for path in tree.file(f"{dataset}/splits".lstrip("/")).glob("*.json")
            }
        )
    )


def image_paths(items: Iterable[PairedItem]) -> tuple[str, ...]:
    """All different image files of items, sorted."""
    return tuple(sorted({path for item in items for path in item.images}))


def _read_items(tree: SceneTree, path: str, dataset: str) -> Iterable[PairedItem]:
    content = tree.json(path)
    place = tree.root / path
    if not isinstance(content, dict):
        raise DataError(f"{place}: expected an object of items by their keys")
    for key, entry in content.items():
        try:
            yield _parse(tree, PurePosixPath(path).stem, key, entry, dataset)
        except ValueError as error:
            raise DataError(f"{place}: item {key!r}: {error}") from None


def _parse(tree: SceneTree, split: str, key: str, entry: object, dataset: str) -> PairedItem:
    if not isinstance(entry, dict):
        raise ValueError("expected an object with pointclouds, images and correspondences")
    cloud = entry.get("pointclouds")
    cloud = cloud[0] if isinstance(cloud, list) and len(cloud) == 1 else cloud
    images, links = entry.get("images", []), entry.get("correspondences", [])
    for name, paths in (("images", images), ("correspondences", links)):
        if not isinstance(paths, list) or not all(isinstance(text, str) for text in paths):
            raise ValueError(f"{name} must be a list of paths")
    if not isinstance(cloud, str):
        raise ValueError("pointclouds must be the path of a folder")
    if len(images) != len(links):
        raise ValueError(
            f"{len(images)} images, but {len(links)} correspondences; name one for each image"
        )
    keeps_data = tree.file(f"{dataset}/data".lstrip("/")).is_dir()

    def place(path: str) -> str:
        return _relative(path, dataset, keeps_data)

    return PairedItem(split, key, place(cloud), tuple(map(place, images)), tuple(map(place, links)))


def _relative(path: str, dataset: str, keeps_data: bool) -> str:
    """Path relative to the root, of one that starts with data/<data set>/ or lies in the set."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or not {"\\", "\0"}.isdisjoint(path):
        raise ValueError(f"the path {path!r} leads out of the root; correct it")
    if parts[0] == "data" and len(parts) > 2 and not keeps_data:
        parts = parts[2:]
    return PurePosixPath(dataset, *parts).as_posix()
