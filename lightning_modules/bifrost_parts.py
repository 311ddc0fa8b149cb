"""The frozen parts of Bifrost-1's two stages as makers of rows."""

from __future__ import annotations

from lightning_modules.bifrost_frozen import Foundation
from lightning_modules.bifrost_painter import Painter
from lightning_modules.bifrost_rows import TEXT_FIELDS, FrozenPart, text_rows

_FLOAT = 4


def latent_part(foundation: Foundation) -> FrozenPart:
    """Latents of the tower: field "latents" (N, C)."""
    tower = foundation.tower
    return FrozenPart(
        name="latents",
        identity=foundation.identities["tower"],
        fields=("latents",),
        reads="image",
        sample_bytes=_FLOAT * tower.tokens * tower.width,
        make=lambda images: {"latents": foundation.latents(images)},
    )


def text_part(foundation: Foundation) -> FrozenPart:
    """Keys, values and states of the language model."""
    shape, length = foundation.language_model.shape, foundation.prompt_length
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim + shape.hidden
    return FrozenPart(
        name="text",
        identity=foundation.text_identity,
        fields=TEXT_FIELDS,
        reads="caption",
        sample_bytes=_FLOAT * length * numbers,
        make=lambda captions: text_rows(foundation.text_states(captions), length),
    )


def pixel_part(painter: Painter, image_size: int) -> FrozenPart:
    """Packed latents of the autoencoder: field "packed" (L, K)."""
    rows, columns = painter.grid(image_size)
    return FrozenPart(
        name="packed",
        identity=painter.identities["vae"],
        fields=("packed",),
        reads="image",
        sample_bytes=_FLOAT * rows * columns * painter.channels,
        make=lambda images: {"packed": painter.encode(images)},
    )


def flux_text_part(painter: Painter) -> FrozenPart:
    """What FLUX sees of a caption: fields "flux_states" (T, E) and "flux_pooled" (P,)."""
    config = painter.flux.config
    width = painter.text_length * config["joint_attention_dim"] + config["pooled_projection_dim"]
    return FrozenPart(
        name="flux_text",
        identity=painter.identities["flux_text"],
        fields=("flux_states", "flux_pooled"),
        reads="caption",
        sample_bytes=_FLOAT * width,
        make=lambda captions: dict(
            zip(("flux_states", "flux_pooled"), painter.text(captions), strict=True)
        ),
    )
