"""Where the embedded rooms lie, for every data module that reads them."""

from __future__ import annotations

from pathlib import Path

from datamodules.cache_folder import cache_folder

ROOMS = (160, 24, 40, 40)
"""Embedded rooms of train, val, test and test_unseen."""

# A constant and not the run's seed: runs of any seed learn from and are tested on the same rooms.
_SEED = 0


def embedded_root(cache_dir: Path | None, rooms: tuple[int, int, int, int] = ROOMS) -> Path:
    """Root of the procedural rooms; they are made if they are not there.

    Args:
        cache_dir: folder to keep them in; None takes the user's cache folder.
        rooms: number of rooms of train, val, test and test_unseen.

    Returns:
        Folder in Pointcept's layout.

    Raises:
        DataError: if the folder cannot be written.
    """
    from datamodules.paired_2d3d.rooms import SPLITS, room_tree

    counts = dict(zip(SPLITS, rooms, strict=True))
    return room_tree(cache_dir or cache_folder("procedural"), counts, _SEED)
