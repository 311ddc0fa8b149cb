"""Encoders of point clouds from runs of this project or from released files."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning_modules.cli.checkpoint_files import read_checkpoint, weights_file
from lightning_modules.cli.errors import CheckpointError
from models.concerto.checkpoint import load_backbone
from models.concerto.encoder import EncoderShape, PointTransformer

_log = logging.getLogger(__name__)


def choose_backbone(pretrained: Path | None, shape: EncoderShape | None) -> PointTransformer:
    """An encoder with the weights of a file, or random ones if there is none.

    Args:
        pretrained: As for `read_backbone`; a file that is gone is made up for by the shape, as a
            trained checkpoint brings all weights along.
        shape: Sizes; may be left out where the file is there.

    Raises:
        ValueError: If there are no sizes or the file has others.
        FileNotFoundError: If the file is gone and there are no sizes.
        CheckpointError: If the file cannot be used.
    """
    if pretrained is not None and (pretrained.exists() or shape is None):
        encoder = read_backbone(pretrained)
        if shape is not None and shape.channels != encoder.shape.channels:
            raise ValueError(
                f"shape={shape.channels}: the encoder of {pretrained} has channels "
                f"{encoder.shape.channels}; leave the shape out (model.init_args.shape)"
            )
        return encoder.train()
    if shape is None:
        raise ValueError(
            "shape=null: give the sizes of the encoder, or a file with one "
            "(model.init_args.pretrained)"
        )
    return PointTransformer(shape)


def read_backbone(path: Path) -> PointTransformer:
    """Build an encoder with the weights of a file.

    Args:
        path: Run directory, its checkpoint (.ckpt), or a released file (.pth, .safetensors).

    Raises:
        FileNotFoundError: If there is nothing at the path.
        CheckpointError: If it is damaged or holds no encoder of points.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"model.init_args.pretrained={path}: no such file or run directory; correct the path, "
            "or leave it out to start from random weights"
        )
    file = weights_file(path)
    try:
        if file.suffix == ".ckpt":
            read_checkpoint(file)  # compares it with its digest
            return load_backbone(file).encoder
        encoder, notes = load_backbone(file)
    except ValueError as error:
        raise CheckpointError(f"{error} (model.init_args.pretrained)") from None
    for note in notes:
        _log.warning("%s: %s", file, note)
    return encoder
