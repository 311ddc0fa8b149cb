"""Image files in folders: one folder per class, or the unlabelled downsampled ImageNet.

Classes are the sorted folder names, as in torchvision's ImageFolder, below the root itself or
below root/train, root/val (or validation) and root/test. Flat folders named like train_64x64 and
valid_64x64 (van den Oord et al. 2016) hold images of the single class "unlabelled".
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np

from datamodules.errors import DataError, SampleError
from datamodules.readers.protocol import Split
from datamodules.readers.split_names import SPLIT_WORDS
from datamodules.readers.stamps import file_stamp

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""File name endings, in lower case, that are taken for images."""

UNLABELLED = "unlabelled"
"""Name of the only class of data without labels."""

_FLAT = re.compile(r"(train|valid|val|validation|test)_\d+x\d+")
_STAMPED_FILES = 64


class FolderReader:
    """Image files of one split.

    Args:
        folder: where the paths start.
        paths: relative paths, in sample order.
        labels: class of each path.
        class_names: names of all classes.
    """

    def __init__(
        self, folder: Path, paths: list[str], labels: list[int], class_names: tuple[str, ...]
    ) -> None:
        self._folder = folder
        # One array and not a list of strings: worker processes share its memory, as reading it
        # touches no reference counts.
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self._labels = np.array(labels, dtype=np.int32)
        self._class_names = class_names

    @property
    def class_names(self) -> tuple[str, ...]:
        """Sorted names of the class folders."""
        return self._class_names

    @property
    def fingerprint(self) -> str:
        """All paths, and sizes and end bytes of some files."""
        some = np.linspace(0, len(self) - 1, min(len(self), _STAMPED_FILES)).astype(int)
        stamp = file_stamp(self._path(position) for position in some.tolist())
        return hashlib.blake2b(self._paths.tobytes() + stamp.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        """Number of files."""
        return len(self._paths)

    def _path(self, position: int) -> Path:
        return self._folder / os.fsdecode(bytes(self._paths[position]))

    def label(self, position: int) -> int:
        """Class of a file."""
        return int(self._labels[position])

    def read(self, position: int) -> bytes:
        """Encoded image; SampleError if the file cannot be read."""
        path = self._path(position)
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError(f"{path}: cannot be read ({error.strerror})") from error

    def sample_id(self, position: int) -> str:
        """Path of the file."""
        return str(self._path(position))


def _images(folder: Path) -> list[str]:
    """Sorted relative paths of the images in a folder and its sub-folders."""
    found = []
    for place, _, files in os.walk(folder):
        relative = os.path.relpath(place, folder)
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                found.append(os.path.normpath(os.path.join(relative, name)))
    return sorted(found)


def has_images(folder: Path) -> bool:
    """Whether a folder holds an image file itself, not in a sub-folder."""
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(SUFFIXES) for entry in entries)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the sub-folders that are not hidden."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _open_classes(folder: Path) -> FolderReader:
    names = class_folders(folder)
    if not names or has_images(folder):
        raise DataError(
            f"{folder}: images lie directly in the folder, so their classes are unknown; expected "
            f"one sub-folder per class, such as {folder.name}/n01440764/*.JPEG (for ImageNet's "
            "validation set, sort the files by the list of its development kit)"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        images = _images(folder / name)
        if not images:
            raise DataError(
                f"{folder / name}: class folder without images ({', '.join(SUFFIXES)}); "
                "fill it or remove it"
            )
        paths.extend(os.path.join(name, image) for image in images)
        labels.extend([label] * len(images))
    return FolderReader(folder, paths, labels, tuple(names))


def _open_flat(folder: Path) -> FolderReader:
    paths = _images(folder)
    return FolderReader(folder, paths, [0] * len(paths), (UNLABELLED,))


def flat_folders(root: Path) -> dict[Split, Path]:
    """Folders of unlabelled images, such as train_64x64, directly below a root."""
    found: dict[Split, Path] = {}
    for name in class_folders(root):
        if match := _FLAT.fullmatch(name):
            found[SPLIT_WORDS[match[1]]] = root / name
    return found


def open_folder(root: Path) -> dict[Split, FolderReader]:
    """Open every split of a folder of images.

    Args:
        root: folder with train (and val, validation, test), or with the class folders themselves.

    Returns:
        A reader for each split.

    Raises:
        DataError: if a split has no class folders, or a class no images.
    """
    if flat := flat_folders(root):
        return {split: _open_flat(folder) for split, folder in flat.items()}
    if not (root / "train").is_dir():
        return {"train": _open_classes(root)}
    readers: dict[Split, FolderReader] = {}
    for name, split in SPLIT_WORDS.items():
        if (root / name).is_dir():
            if split in readers:
                raise DataError(f"{root / name}: second folder for split {split}; keep only one")
            readers[split] = _open_classes(root / name)
    return readers
