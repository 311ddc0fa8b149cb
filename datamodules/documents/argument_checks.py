"""Checks of DocumentsAndPhotographs' arguments against their ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.argument_checks import check_root
from datamodules.documents.drawing import SIDE

if TYPE_CHECKING:
    from datamodules.documents.documents import DocumentsAndPhotographs

_AT_LEAST = {
    "image_size": 1,
    "patch_size": 1,
    "batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 0,
    "train_size": 1,
    "val_size": 1,
    "test_size": 1,
    "cache_decoded_mb": 0,
    "seed": 0,
}


def _fail(data: DocumentsAndPhotographs, name: str, expected: str) -> None:
    raise ValueError(f"{name}={getattr(data, name)}: {expected} (data.init_args.{name})")


def check_arguments(data: DocumentsAndPhotographs) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
        FileNotFoundError: if the root leads nowhere.
    """
    for name, least in _AT_LEAST.items():
        if getattr(data, name) < least:
            _fail(data, name, f"must be >= {least}")
    if data.predict_count is not None and data.predict_count < 1:
        _fail(data, "predict_count", "must be >= 1")
    if not 0 <= data.max_skipped_share <= 1:
        _fail(data, "max_skipped_share", "must be 0 .. 1")
    if data.root is None:
        if data.image_size != SIDE:
            _fail(data, "image_size", f"must be {SIDE} for the embedded images, or give a root")
        if (SIDE // 2) % data.patch_size:
            _fail(data, "patch_size", f"must divide {SIDE // 2}, half an embedded image")
    elif data.image_size % data.patch_size:
        _fail(data, "patch_size", f"must divide image_size={data.image_size}")
    check_root(data.root, "folder" if data.format == "flat" else data.format)
