"""Find out what lies at a root, and open it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Literal

from datamodules.errors import DataError, FaultPolicy
from datamodules.readers.layouts import only_layout
from datamodules.readers.protocol import ImageReader, Split

Format = Literal["auto", "parquet", "folder", "webdataset", "npz"]
"""Layouts on disk; "auto" finds out."""

_Layout = Literal["parquet", "folder", "webdataset", "npz"]
_BY_SUFFIX: dict[str, _Layout] = {".parquet": "parquet", ".tar": "webdataset", ".npz": "npz"}
_LOOKED_FOR = (
    "train*.parquet (parquet), train/<class>/*.jpg or <class>/*.jpg or train_64x64/*.png (folder), "
    "train*.tar (webdataset), train*.npz (npz)"
)
_MANY = 1000


def open_splits(root: Path, layout: Format, faults: FaultPolicy) -> Mapping[Split, ImageReader]:
    """Open every split at a root.

    Args:
        root: file, folder, shard pattern, or the name of a hub data set where nothing lies.
        layout: how the data is stored.
        faults: what happens at damaged shards.

    Returns:
        A reader for each split found.

    Raises:
        DataError: if there is no data of the layout, or it cannot be used.
    """
    found = detect(root) if layout == "auto" else layout
    readers: Mapping[Split, ImageReader]
    if found == "parquet":
        from datamodules.readers.parquet import open_hub, open_parquet

        readers = open_parquet(root) if root.exists() else open_hub(str(root))
    elif found == "webdataset":
        from datamodules.readers.webdataset import open_webdataset

        readers = open_webdataset(root, faults)
    elif found == "npz":
        from datamodules.readers.npz import open_npz

        readers = open_npz(root)
    else:
        from datamodules.readers.folder import open_folder

        readers = open_folder(root)
    if not readers:
        raise DataError(f"{root}: no {found} files; looked for {_LOOKED_FOR}")
    return readers


def detect(root: Path) -> _Layout:
    """Layout of what lies at a root.

    Args:
        root: as for ``open_splits``.

    Returns:
        The only layout that fits.

    Raises:
        DataError: if none or several fit.
    """
    if "{" in str(root):
        return "webdataset"
    if not root.exists():
        return "parquet"
    if root.is_file():
        if root.suffix in _BY_SUFFIX:
            return _BY_SUFFIX[root.suffix]
        raise DataError(f"{root}: no such format; looked for {_LOOKED_FOR}")
    found = _layouts_in(root)
    if (layout := only_layout(root, found)) is not None:
        return layout
    batches = sorted(root.glob("*data_batch*")) or sorted(root.glob("val_data"))
    if batches:
        raise DataError(
            f"{batches[0]}: the pickle variant of downsampled ImageNet, which could run code, is "
            "not opened; fetch the npz variant, or save it again with numpy.savez"
        )
    raise DataError(f"{root}: nothing found; looked for {_LOOKED_FOR}")


def _layouts_in(root: Path) -> list[_Layout]:
    """Layouts that fit a folder, judged by names only."""
    from datamodules.readers.folder import class_folders

    # Data sets of the hub keep their files up to two folders deep; class folders are many.
    suffixes = {entry.suffix for entry in islice(root.iterdir(), _MANY)}
    if len(class_folders(root)) <= 20:
        for pattern in ("*/*", "*/*/*.parquet"):
            suffixes |= {entry.suffix for entry in islice(root.glob(pattern), _MANY)}
    found = [layout for suffix, layout in _BY_SUFFIX.items() if suffix in suffixes]
    return [*found, "folder"] if _has_class_folders(root) else found


def _has_class_folders(root: Path) -> bool:
    """Whether images lie in a folder, at most three below it, judged by the first few folders."""
    from datamodules.readers.folder import class_folders, has_images

    places = [root]
    for _ in range(4):
        if any(has_images(place) for place in places):
            return True
        places = [place / name for place in places for name in class_folders(place)[:20]]
    return False
