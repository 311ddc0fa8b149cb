"""Checks of ImageNetPixels' arguments against their ranges and against the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.argument_ranges import (
    IMAGES_AT_LEAST,
    check_least,
    check_predict_count,
    check_root,
    check_shares,
    refuse,
)
from datamodules.errors import DataError

if TYPE_CHECKING:
    from datamodules.imagenet import ImageNetPixels
    from datamodules.readers.detection import Format
    from datamodules.readers.protocol import ImageReader, Split


def check_arguments(data: ImageNetPixels) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
    """
    check_least(data, IMAGES_AT_LEAST)
    if data.channels not in (1, 3):
        refuse(data, "channels", "must be 1 (grey) or 3 (RGB)")
    if not 2 <= data.levels <= 256:
        refuse(data, "levels", "must be 2 .. 256")
    check_shares(data, "max_skipped_share")
    check_predict_count(data, "10 per class")
    if data.predict_classes == ():
        refuse(data, "predict_classes", "must name a class, or null for all")
    if data.root is None and data.embedded == "digits":
        _check_digits(data)


def _check_digits(data: ImageNetPixels) -> None:
    if (data.image_size, data.levels, data.channels) != (8, 17, 1):
        raise ValueError(
            f"image_size={data.image_size}, levels={data.levels}, channels={data.channels}: the "
            "embedded digits are 8 x 8 with 17 levels and 1 channel (data.init_args.embedded)"
        )


def check_image_root(root: Path | None, layout: Format) -> None:
    """Make sure that a root of images may be one.

    Raises:
        FileNotFoundError: one line with what may lie at a root.
    """
    looked_for = (
        "a folder with train/<class>/*.jpg, train*.parquet, train*.tar or train_data_batch_*.npz"
    )
    check_root(root, layout, looked_for, "data")


def check_splits(readers: Mapping[Split, ImageReader], root: str) -> None:
    """Make sure that there is a training split, none is empty, and all have the same classes.

    Raises:
        DataError: one line naming the root and the split.
    """
    if "train" not in readers:
        found = ", ".join(readers) or "none"
        raise DataError(f"{root}: no training split (found: {found}); add train files")
    for split, reader in readers.items():
        if len(reader) == 0:
            raise DataError(f"{root}: split {split} is empty; add samples or remove its files")
    expected = readers["train"].class_names
    for split, reader in readers.items():
        if reader.class_names != expected:
            odd = sorted(set(reader.class_names) ^ set(expected))[:3]
            raise DataError(
                f"{root}: {len(reader.class_names)} classes in {split}, {len(expected)} in train; "
                f"they must agree (differing: {', '.join(odd) or 'the order'})"
            )


def check_classes(data: ImageNetPixels, readers: Mapping[Split, ImageReader]) -> None:
    """Compare the arguments that depend on the data with it.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
    """
    num_classes, num_train = len(readers["train"].class_names), len(readers["train"])
    for name in ("unflipped_classes", "predict_classes"):
        classes = getattr(data, name) or ()
        if any(not 0 <= label < num_classes for label in classes):
            refuse(data, name, f"classes are 0 .. {num_classes - 1}")
    if "val" not in readers and data.val_size >= num_train:
        refuse(data, "val_size", f"must be less than the {num_train} training samples")
