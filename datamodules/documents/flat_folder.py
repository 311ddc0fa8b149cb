"""Image files that lie directly in a folder, without classes, as in COCO's train2017."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.errors import DataError
from datamodules.readers.folder import SUFFIXES, FolderReader, class_folders, has_images
from datamodules.readers.split_names import split_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from datamodules.readers.protocol import ImageReader, Split

UNKNOWN = -1
"""Label of an image whose class is not known."""


class UnlabelledReader:
    """Another reader's images without their labels.

    Args:
        reader: where the images are.
    """

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader

    @property
    def class_names(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def fingerprint(self) -> str:
        """That of the other reader."""
        return self._reader.fingerprint

    def __len__(self) -> int:
        """Number of images."""
        return len(self._reader)

    def label(self, position: int) -> int:
        """``UNKNOWN``."""
        return UNKNOWN

    def read(self, position: int) -> bytes | NDArray[np.uint8]:
        """What the other reader gives; SampleError if it cannot be read."""
        return self._reader.read(position)

    def sample_id(self, position: int) -> str:
        """Place of the image, for error messages."""
        return self._reader.sample_id(position)


def _open_flat(folder: Path) -> FolderReader:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file()]
    paths = sorted(name for name in names if not name.startswith("."))
    return FolderReader(folder, paths, [UNKNOWN] * len(paths), ())


def open_flat(root: Path, *, strict: bool) -> dict[Split, FolderReader]:
    """Open a folder of images, or the folders of images below it that are named after splits.

    Args:
        root: an existing folder; one that holds images itself is the training split, else its
            sub-folders such as train2017 and val2017 are looked at.
        strict: whether other folders of images, which might be classes, are an error. Otherwise
            they are left out.

    Returns:
        A reader for each split; none if neither the root holds images nor a folder of images
        below it is named after a split.

    Raises:
        DataError: if two folders belong to one split, or others are in doubt under ``strict``.
    """
    folders = [root / name for name in class_folders(root) if has_images(root / name)]
    if has_images(root):
        named: list[tuple[Path, Split]] = [(root, "train")]
        others = folders
    else:
        splits = [(folder, split_of(folder, root)) for folder in folders]
        named = [(folder, split) for folder, split in splits if split is not None]
        others = [folder for folder, split in splits if split is None]
    if named and others and strict:
        raise DataError(
            f"{others[0]}: holds images, as does {named[0][0]}; set data.init_args.format to flat "
            "to leave it out, or to folder if these are classes"
        )
    readers: dict[Split, FolderReader] = {}
    for folder, split in named:
        if split in readers:
            raise DataError(f"{folder}: second folder for split {split}; keep only one")
        readers[split] = _open_flat(folder)
    return readers
