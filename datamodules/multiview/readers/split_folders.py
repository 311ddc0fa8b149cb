"""Which split each capture below a root belongs to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datamodules.multiview.readers.photo_folders import PhotoFolders
from datamodules.multiview.readers.protocol import SceneSplit
from datamodules.readers.split_names import SPLIT_WORDS


def open_by_split(
    root: Path,
    scene_folders: Callable[[Path], list[Path]],
    open_scenes: Callable[[list[Path], Path], PhotoFolders],
) -> dict[SceneSplit, PhotoFolders]:
    """Open the scenes in root/train, root/val or root/test, or else all below the root as "all".

    Args:
        root: folder of all.
        scene_folders: finds the scenes below a folder.
        open_scenes: opens scenes, given their folders and the folder they were found below.
    """
    found: dict[SceneSplit, PhotoFolders] = {}
    for name, split in SPLIT_WORDS.items():
        if (root / name).is_dir() and (folders := scene_folders(root / name)):
            found[split] = open_scenes(folders, root / name)
    if not found and (folders := scene_folders(root)):
        found["all"] = open_scenes(folders, root)
    return found
