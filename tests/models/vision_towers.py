"""Tiny vision transformers of three libraries with random weights, and images for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.image_encoders.encoders import (
    FrozenEncoder,
    OpenClipTower,
    TimmTower,
    Tower,
    TransformersTower,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
IMAGE = {"image_size": 32, "patch_size": 8, "attn_implementation": "sdpa"}
NAMES = ("clip", "siglip", "dinov2", "registers", "timm", "timm_registers", "open_clip")
# Tokens before the patches.
PREFIX = dict(zip(NAMES, (1, 0, 1, 4, 1, 3, 1), strict=True))


def build_network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "clip":
        config: Any = transformers.CLIPVisionConfig(intermediate_size=40, **SIZES, **IMAGE)
        return transformers.CLIPVisionModel(config)
    if name == "siglip":
        config = transformers.SiglipVisionConfig(intermediate_size=40, **SIZES, **IMAGE)
        return transformers.SiglipVisionModel(config)
    if name == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **SIZES, **IMAGE))
    if name == "registers":
        config = transformers.Dinov2WithRegistersConfig(
            mlp_ratio=2, num_register_tokens=3, **SIZES, **IMAGE
        )
        return transformers.Dinov2WithRegistersModel(config)
    if name == "open_clip":
        return OpenClipVisionTransformer(32, 8, width=24, layers=4, heads=2, mlp_ratio=2)
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=4,
        num_heads=2,
        num_classes=0,
        reg_tokens=2 if name == "timm_registers" else 0,
        qk_norm=name == "timm_registers",
        drop_path_rate=0.5,
        dynamic_img_size=True,
    )


def build_tower(name: str, network: nn.Module) -> Tower:
    kinds: dict[str, Callable[[nn.Module], Tower]] = {
        "timm": TimmTower,
        "timm_registers": TimmTower,
        "open_clip": OpenClipTower,
    }
    return kinds.get(name, TransformersTower)(network)


def build_encoder(name: str, layer: int = -2, attention_layer: int | None = None) -> FrozenEncoder:
    return FrozenEncoder(build_tower(name, build_network(name)), layer, MEAN, STD, attention_layer)


def random_images(height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std
