"""Checks of TextImagePairs' arguments against their ranges and against the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.text_image.detection import check_pair_root

if TYPE_CHECKING:
    from datamodules.text_image.text_image import TextImagePairs

_AT_LEAST = {
    "image_size": 1,
    "batch_size": 1,
    "eval_batch_size": 1,
    "num_workers": 0,
    "val_size": 1,
    "cache_decoded_mb": 0,
    "seed": 0,
}


def _fail(data: TextImagePairs, name: str, expected: str) -> None:
    raise ValueError(f"{name}={getattr(data, name)}: {expected} (data.init_args.{name})")


def check_arguments(data: TextImagePairs) -> None:
    """Compare the arguments with their ranges.

    Raises:
        ValueError: one line naming the argument, its value and what was expected.
        FileNotFoundError: if the root, the prompts or the features lead nowhere.
    """
    for name, least in _AT_LEAST.items():
        if getattr(data, name) < least:
            _fail(data, name, f"must be >= {least}")
    for name in ("caption_dropout", "max_skipped_share"):
        if not 0 <= getattr(data, name) <= 1:
            _fail(data, name, "must be 0 .. 1")
    if data.predict_count is not None and data.predict_count < 1:
        _fail(data, "predict_count", "must be >= 1, or null for all")
    if data.resampling not in ("bicubic", "lanczos"):
        _fail(data, "resampling", "must be bicubic or lanczos")
    if data.features is not None and (data.random_crop or data.random_flip):
        name = "random_crop" if data.random_crop else "random_flip"
        _fail(data, name, "must be false with features, which are of the image as it is")
    if not data.decode and data.features is None:
        _fail(data, "decode", "must be true without features")
    for name in ("prompts", "features", "image_root"):
        path = getattr(data, name)
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"data.init_args.{name}={path}: no such file or folder; correct the path"
            )
    check_pair_root(data.root, data.format)
