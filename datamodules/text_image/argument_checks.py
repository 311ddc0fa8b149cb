"""Checks of TextImagePairs' arguments against their ranges and against the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.argument_ranges import (
    IMAGES_AT_LEAST,
    check_least,
    check_predict_count,
    check_root,
    check_shares,
    refuse,
)
from datamodules.text_image.detection import LOOKED_FOR

if TYPE_CHECKING:
    from datamodules.text_image.text_image import TextImagePairs


def check_arguments(data: TextImagePairs) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
        FileNotFoundError: if the root, the prompts or the features lead nowhere.
    """
    check_least(data, IMAGES_AT_LEAST)
    check_shares(data, "caption_dropout", "max_skipped_share")
    check_predict_count(data, "all")
    if data.resampling not in ("bicubic", "lanczos"):
        refuse(data, "resampling", "must be bicubic or lanczos")
    if data.features is not None and (data.random_crop or data.random_flip):
        name = "random_crop" if data.random_crop else "random_flip"
        refuse(data, name, "must be false with features, which are of the image as it is")
    if not data.decode and data.features is None:
        refuse(data, "decode", "must be true without features")
    for name in ("prompts", "features", "image_root"):
        path = getattr(data, name)
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"data.init_args.{name}={path}: no such file or folder; correct the path"
            )
    check_root(data.root, data.format, LOOKED_FOR, "emoji")
