"""The demo's encoder: a small vision transformer that reads, with the weights shipped here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.image_encoders.encoder_files import read_weights
from models.image_encoders.encoder_towers import TimmTower
from models.image_encoders.frozen_encoder import FrozenEncoder
from models.token_reduction.reading import ReadingNetwork, ReadingShape, build_encoder

SHIPPED = Path(__file__).parent / "demo_encoder.safetensors"
_REMEDY = "train it: python train.py fit --config configs/token_reduction/demo_encoder.yaml"


class DemoEncoder(FrozenEncoder):
    """The frozen vision transformer of a `ReadingNetwork`.

    Args:
        weights: File written by `save_encoder`; None takes the shipped one.
        layer: Hidden state to return, see `FrozenEncoder`.
        shape: Sizes it was trained with.
        image_size: Side of the images in pixels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights do not fit the sizes.
    """

    def __init__(
        self,
        weights: Path | None = None,
        layer: int = -2,
        shape: ReadingShape = ReadingShape(),  # noqa: B008 - frozen
        image_size: int = 96,
    ) -> None:
        path = SHIPPED if weights is None else Path(weights)
        network = build_encoder(shape, image_size)
        state = {name: tensor.float() for name, tensor in read_weights(path, _REMEDY).items()}
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(
                f"weights={path}: do not fit {asdict(shape)} at {image_size} pixels; {_REMEDY}"
            ) from error
        # Trained on pixels in [-1, 1] as they come.
        super().__init__(TimmTower(network), layer, mean=(0.5,) * 3, std=(0.5,) * 3)


def save_encoder(network: ReadingNetwork, path: Path) -> None:
    """Write the vision transformer of a network, without its readers, in bfloat16.

    Args:
        network: Trained.
        path: Safetensors file.
    """
    state = network.encoder.state_dict().items()
    save_file({name: value.detach().cpu().to(torch.bfloat16) for name, value in state}, path)
