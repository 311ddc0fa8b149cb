"""Checks of PairedScenes' arguments against their ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.argument_ranges import check_least, refuse

if TYPE_CHECKING:
    from datamodules.paired_2d3d.paired_scenes import PairedScenes

_AT_LEAST = {
    "patch_pixels": 1,
    "max_points": 1,
    "images_per_item": 0,
    "batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 0,
    "seed": 0,
}


def check_arguments(data: PairedScenes) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
        FileNotFoundError: if a folder does not exist.
    """
    check_least(data, _AT_LEAST)
    if min(data.patch_grid) < 1:
        refuse(data, "patch_grid", "must be rows and columns of patches, each >= 1")
    if not data.grid_size > 0:
        refuse(data, "grid_size", "must be metres > 0")
    if not data.train_splits:
        refuse(data, "train_splits", "must name a split file, such as train")
    if min(data.procedural_rooms) < 0:
        refuse(data, "procedural_rooms", "must be numbers >= 0 of train, val, test, test_unseen")
    for split in (*data.train_splits, *(data.val_splits or ())):
        if "/" in split or split in ("", ".", ".."):
            raise ValueError(f"split {split!r}: expected a name such as train, without .json")
    if data.root is not None and not data.root.is_dir():
        raise FileNotFoundError(
            f"data.init_args.root={data.root}: no such folder; expected a Pointcept tree with "
            "splits/<split>.json; correct the path, or leave root out to use the embedded rooms"
        )
    check_features(data)


def check_features(data: PairedScenes) -> None:
    """Make sure that stored features, if they are used, can stand for the images.

    Raises:
        ValueError: if images are changed at random.
    """
    if data.image_features is not None and data.image_augmentation.is_on:
        refuse(
            data,
            "image_augmentation",
            "stored features are of unchanged images; switch the chances off, or leave "
            "data.init_args.image_features out",
        )
