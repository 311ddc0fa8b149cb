"""Find out how the scenes at a root are stored, and open them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from datamodules.errors import DataError
from datamodules.multiview.readers.colmap import open_colmap
from datamodules.multiview.readers.colmap import scene_folders as colmap_folders
from datamodules.multiview.readers.protocol import SceneReader, SceneSplit
from datamodules.multiview.readers.torch_contents import read_contents
from datamodules.multiview.readers.torch_scenes import (
    INDEX,
    TorchScenes,
    open_chunks,
    open_single,
    torch_files,
)
from datamodules.multiview.readers.transforms import open_transforms
from datamodules.multiview.readers.transforms import scene_folders as transforms_folders
from datamodules.readers.layouts import only_layout
from datamodules.readers.split_names import SPLIT_WORDS

Format = Literal["auto", "re10k", "scenes", "transforms", "colmap"]
"""Layouts on disk; "auto" finds out."""

Layout = Literal["re10k", "scenes", "transforms", "colmap"]

LOOKED_FOR = (
    "train/index.json with *.torch chunks (re10k), train/<scene>.torch (scenes), "
    "<scene>/transforms.json (transforms), <scene>/sparse/0/images.bin (colmap)"
)
"""What may lie at a root, for messages."""


def open_splits(root: Path, layout: Layout) -> Mapping[SceneSplit, SceneReader]:
    """Open every split at a root.

    Args:
        root: folder, with folders train, val, test or without.
        layout: how the scenes are stored.

    Returns:
        A reader for each split found; "all" where the root does not tell.

    Raises:
        DataError: if there is no data of the layout, or it cannot be used.
    """
    readers: Mapping[SceneSplit, SceneReader]
    if layout == "transforms":
        readers = open_transforms(root)
    elif layout == "colmap":
        readers = open_colmap(root)
    else:
        readers = _open_torch(root, layout)
    if not readers:
        raise DataError(f"{root}: no {layout} data; looked for {LOOKED_FOR}")
    for split, reader in readers.items():
        if len(reader) == 0:
            raise DataError(f"{root}: split {split} has no scenes; add some or remove its folder")
    return readers


def _open_torch(root: Path, layout: Layout) -> dict[SceneSplit, TorchScenes]:
    opened: dict[SceneSplit, TorchScenes] = {}
    for folder, split in _torch_folders(root).items():
        if split in opened:
            raise DataError(f"{folder}: second folder for split {split}; keep only one")
        opened[split] = open_chunks(folder) if layout == "re10k" else open_single(folder)
    return opened


def _torch_folders(root: Path) -> dict[Path, SceneSplit]:
    """Folders with .torch files: those of the splits, or else the root itself."""
    splits: dict[Path, SceneSplit] = {
        root / name: split for name, split in SPLIT_WORDS.items() if _has_torch(root / name)
    }
    return splits or ({root: "all"} if _has_torch(root) else {})


def _has_torch(folder: Path) -> bool:
    return any(folder.glob("*.torch")) or (folder / INDEX).is_file()


def detect(root: Path) -> Layout:
    """Layout of what lies at a root.

    Raises:
        DataError: if none or several fit.
    """
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; looked for {LOOKED_FOR}")
    found: list[Layout] = []
    if folders := _torch_folders(root):
        found.append(_torch_layout(next(iter(folders))))
    if transforms_folders(root):
        found.append("transforms")
    elif colmap_folders(root):
        found.append("colmap")
    if (layout := only_layout(root, found)) is not None:
        return layout
    raise DataError(f"{root}: nothing found; looked for {LOOKED_FOR}")


def _torch_layout(folder: Path) -> Layout:
    """Chunks have an index or hold lists; a scene's own file holds a dictionary."""
    if (folder / INDEX).is_file():
        return "re10k"
    return "scenes" if isinstance(read_contents(folder / torch_files(folder)[0]), dict) else "re10k"
