"""Checks of DocumentsAndPhotographs' arguments against their ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.argument_checks import check_image_root
from datamodules.argument_ranges import (
    IMAGES_AT_LEAST,
    check_least,
    check_predict_count,
    check_shares,
    refuse,
)
from datamodules.documents.drawing import SIDE

if TYPE_CHECKING:
    from datamodules.documents.documents import DocumentsAndPhotographs

_AT_LEAST = {**IMAGES_AT_LEAST, "patch_size": 1, "train_size": 1, "test_size": 1}


def check_arguments(data: DocumentsAndPhotographs) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
        FileNotFoundError: if the root leads nowhere.
    """
    check_least(data, _AT_LEAST)
    check_predict_count(data)
    check_shares(data, "max_skipped_share")
    if data.root is None:
        if data.image_size != SIDE:
            refuse(data, "image_size", f"must be {SIDE} for the embedded images, or give a root")
        if (SIDE // 2) % data.patch_size:
            refuse(data, "patch_size", f"must divide {SIDE // 2}, half an embedded image")
    elif data.image_size % data.patch_size:
        refuse(data, "patch_size", f"must divide image_size={data.image_size}")
    check_image_root(data.root, "folder" if data.format == "flat" else data.format)
