"""Pretrained image encoders from local files, frozen: of timm, open_clip and transformers.

Each is a `FrozenEncoder` whose network is read from files that are already there. A network built
elsewhere, such as the tower inside a vision-language model, becomes one by way of its tower:
``FrozenEncoder(TransformersTower(network), layer=-2, mean=..., std=...)``.
"""

from __future__ import annotations

from pathlib import Path

from models.image_encoders.encoder_files import load_open_clip, load_timm, load_transformers
from models.image_encoders.encoder_towers import (
    OpenClipTower,
    TimmTower,
    Tower,
    TransformersTower,
    Triple,
)
from models.image_encoders.frozen_encoder import EncodedImage, FrozenEncoder

__all__ = [
    "EncodedImage",
    "FrozenEncoder",
    "OpenClipEncoder",
    "OpenClipTower",
    "TimmEncoder",
    "TimmTower",
    "Tower",
    "TransformersEncoder",
    "TransformersTower",
]


class TimmEncoder(FrozenEncoder):
    """A vision transformer of timm, for images of any size.

    Args:
        name: timm's name, e.g. "vit_base_patch14_dinov2.lvd142m".
        weights: Its model.safetensors, or a torch file of tensors alone.
        layer: See `FrozenEncoder`.
        mean: Channel means of pixels in [0, 1]; None takes timm's.
        std: Standard deviations likewise.
        attention_layer: See `FrozenEncoder`.
        final_norm: See `FrozenEncoder`.

    Raises:
        FileNotFoundError: If the file is missing; the message says where to get it.
        ValueError: If the name is unknown, the weights do not fit or a layer does not exist.
    """

    def __init__(
        self,
        name: str,
        weights: Path,
        layer: int = -1,
        mean: Triple | None = None,
        std: Triple | None = None,
        attention_layer: int | None = None,
        final_norm: bool = False,
    ) -> None:
        tower = TimmTower(load_timm(name, Path(weights)))
        super().__init__(tower, layer, mean, std, attention_layer, final_norm)


class OpenClipEncoder(FrozenEncoder):
    """The image tower of an open_clip model, for images of one size.

    Args:
        name: open_clip's name, e.g. "ViT-L-14-336-quickgelu" for OpenAI's weights.
        weights: File of the whole model, e.g. its open_clip_model.safetensors.
        layer: See `FrozenEncoder`.
        mean: Channel means of pixels in [0, 1]; None takes what all published weights of this
            model share.
        std: Standard deviations likewise.
        attention_layer: See `FrozenEncoder`.
        image_size: (height, width) of the images; None means the model's own.
        final_norm: See `FrozenEncoder`.

    Raises:
        FileNotFoundError: If the file is missing; the message says where to get it.
        ValueError: If the name is unknown, the weights do not fit, the normalisation is ambiguous
            or a layer does not exist.
    """

    def __init__(
        self,
        name: str,
        weights: Path,
        layer: int = -1,
        mean: Triple | None = None,
        std: Triple | None = None,
        attention_layer: int | None = None,
        image_size: tuple[int, int] | None = None,
        final_norm: bool = False,
    ) -> None:
        network, own_mean, own_std = load_open_clip(name, Path(weights), image_size)
        super().__init__(
            OpenClipTower(network),
            layer,
            mean or own_mean,
            std or own_std,
            attention_layer,
            final_norm,
        )


class TransformersEncoder(FrozenEncoder):
    """CLIP, SigLIP or DINOv2 (with or without registers) from a folder, for images of any size.

    Args:
        folder: With config.json, weights and preprocessor_config.json.
        layer: See `FrozenEncoder`; -2 is LLaVA-NeXT's.
        mean: Channel means of pixels in [0, 1]; None takes the folder's.
        std: Standard deviations likewise.
        attention_layer: See `FrozenEncoder`.
        final_norm: See `FrozenEncoder`.

    Raises:
        FileNotFoundError: If a file is missing; the message says which to get.
        ValueError: If the folder holds another kind of model, not all weights, no normalisation
            and none is given, or a layer does not exist.
    """

    def __init__(
        self,
        folder: Path,
        layer: int = -1,
        mean: Triple | None = None,
        std: Triple | None = None,
        attention_layer: int | None = None,
        final_norm: bool = False,
    ) -> None:
        network, own_mean, own_std = load_transformers(Path(folder))
        super().__init__(
            TransformersTower(network),
            layer,
            mean or own_mean,
            std or own_std,
            attention_layer,
            final_norm,
        )
