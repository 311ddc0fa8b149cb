"""The demo's vision tower and language model: a small multimodal model trained from nothing.

The published method builds on a pretrained Qwen2.5-VL. The demo has none, so one is made first:
a vision tower whose merged output are the latents, and transformers' own text part of Qwen2.5-VL
at a small size. One joint loss makes latents that depend on what is in the picture and states of
captions that tell captions apart, see ``demo_joint_training``.
Letters: B items, N = n * n latents in raster order, D their width and the language model's,
T text tokens, V vocabulary.

Example:
    >>> tower = build_tower(TowerShape(image_size=64))
    >>> tower(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 64, 128])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower.

    Attributes:
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        merge: Patches on the side of one latent.
        width: Channels of a patch.
        layers: Transformer blocks.
        heads: Attention heads.
        latent_width: D, the language model's width.
    """

    image_size: int = 32
    patch_size: int = 4
    merge: int = 2
    width: int = 96
    layers: int = 3
    heads: int = 3
    latent_width: int = 128

    def __post_init__(self) -> None:
        side = self.patch_size * self.merge
        if self.image_size < side or self.image_size % side:
            raise ValueError(
                f"image_size={self.image_size}: must be a multiple of {side}, the side of a latent"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latents."""
        side = self.image_size // (self.patch_size * self.merge)
        return side, side

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class DemoLanguageShape:
    """Sizes of the demo's language model.

    Attributes:
        vocabulary: V, entries of the tokenizer.
        width: D.
        layers: Decoder layers.
        heads: Query heads, and key and value heads.
        mlp: Hidden width of the gated MLP.
        positions: Longest sequence.
    """

    vocabulary: int = 1024
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    positions: int = 512


class DemoTower(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> latents (B, N, D) float32 of mean 0 and variance 1.

    A vision transformer, then squares of patches merged into one latent by a two-layer MLP, as in
    Qwen2.5-VL. The LayerNorm at the end has no weights: each latent has unit variance, so a plain
    squared error needs no scaling.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            embed_dim=shape.width,
            depth=shape.layers,
            num_heads=shape.heads,
            num_classes=0,
            global_pool="",
            class_token=False,
        )
        for module in self.encoder.modules():
            if "fused_attn" in vars(module):  # half as fast in bfloat16 on a CPU at these sizes
                vars(module)["fused_attn"] = False
        merged = shape.merge**2 * shape.width
        self.merger = nn.Sequential(
            nn.Linear(merged, 2 * shape.latent_width),
            nn.GELU(),
            nn.Linear(2 * shape.latent_width, shape.latent_width),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Raises:
            ValueError: If they have another size.
        """
        size = self.shape.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (B, 3, {size}, {size})"
            )
        patches: Tensor = self.encoder.forward_features(images)  # (B, (n * merge)^2, width)
        merge, (rows, columns) = self.shape.merge, self.shape.grid
        squares = torch.unflatten(patches, 1, (rows, merge, columns, merge))
        squares = squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)  # (B, N, merged)
        latents: Tensor = self.merger(squares)
        return F.layer_norm(latents.float(), latents.shape[-1:])


def build_tower(shape: TowerShape) -> DemoTower:
    """A tower with random weights."""
    return DemoTower(shape)


def build_language_model(shape: DemoLanguageShape) -> Qwen2_5_VLTextModel:
    """The text part of a small Qwen2.5-VL, with random weights; its embeddings serve as head.

    Raises:
        ValueError: If the heads do not divide the width into multiples of 4 channels.
    """
    if shape.width % (4 * shape.heads):
        raise ValueError(
            f"width={shape.width}: must be a multiple of 4 * heads = {4 * shape.heads}"
        )
    pairs = shape.width // shape.heads // 2  # rotary pairs, shared out to three axes
    axis = 3 * pairs // 8
    config = Qwen2_5_VLTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [pairs - 2 * axis, axis, axis],
        },
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
    )
    model = Qwen2_5_VLTextModel(config)
    # Fused attention is half as fast in bfloat16 on a CPU at these sizes.
    model.set_attn_implementation("eager")
    return model


def text_hidden(model: Qwen2_5_VLTextModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of left-padded texts; zero at pads.

    Args:
        model: Language model.
        ids: (B, T) int64.
        mask: (B, T) bool, False at pads.
    """
    return _run(model, model.embed_tokens(ids), mask) * mask[..., None]


def caption_logits(
    model: Qwen2_5_VLTextModel, latents: Tensor, ids: Tensor, mask: Tensor
) -> Tensor:
    """Logits (B, T - 1, V) of each next text token behind an image's latents.

    Args:
        model: Language model.
        latents: (B, N, D), read in place of embeddings before the text.
        ids: (B, T) left-padded text.
        mask: (B, T) bool, False at pads.
    """
    words: Tensor = model.embed_tokens(ids[:, :-1])
    embeddings = torch.cat([latents.to(words), words], 1)  # (B, N + T - 1, D)
    visible = torch.cat([mask.new_ones(latents.shape[:2]), mask[:, :-1]], 1)
    hidden = _run(model, embeddings, visible)[:, latents.shape[1] :]
    return F.linear(hidden, model.embed_tokens.weight)


def _run(model: Qwen2_5_VLTextModel, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Stock forward; positions count tokens that are no pads, alike on all three axes."""
    positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 1)  # (B, S)
    hidden: Tensor = model(
        inputs_embeds=embeddings,
        attention_mask=mask.long(),
        position_ids=positions.expand(3, -1, -1),
        use_cache=False,
    ).last_hidden_state
    return hidden
