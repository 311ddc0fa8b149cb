"""Readers of tokens: what stands in each region of an image, and in what scene it stands.

A reader takes any set of tokens that know where they were, so that the same weights read all tokens
of an image or the few that a selection kept. Letters in shape comments: B images, K tokens, C
channels, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Readings(NamedTuple):
    """What a reading network says about a batch of images.

    Attributes:
        regions: (B, R, classes) logits of what stands in each region.
        tokens: (B, L, classes) logits of what stands under each token.
        scenes: (B, scenes) logits of the whole image.
    """

    regions: Tensor
    tokens: Tensor
    scenes: Tensor


class RegionReader(nn.Module):
    """Reads each region by attention over the tokens that lie in it.

    Args:
        channels: C, of the tokens.
        classes: What may stand in a region; class 0 is nothing.
        grid: Rows and columns of the token grid that positions refer to.
        regions: Rows and columns of regions.
        width: Hidden width.
        heads: Attention weights for each token.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        grid: tuple[int, int],
        regions: tuple[int, int] = (2, 2),
        width: int = 128,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.grid, self.regions = tuple(grid), tuple(regions)
        self.hidden = nn.Sequential(nn.Linear(channels + 2, width), nn.GELU())
        self.scores = nn.Linear(width, heads)
        self.readout = nn.Linear(heads * width, classes)
        self.empty = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Tensor, positions: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits of every region.

        Args:
            tokens: (B, K, C).
            positions: (B, K, 2) row and column on the grid, of the token's centre.
            valid: (B, K) bool; None reads all.

        Returns:
            (B, R, classes); of a region without tokens, the same learned logits everywhere.
        """
        region, local = self._places(positions)
        hidden = self.hidden(torch.cat([tokens, local.to(tokens)], -1))  # (B, K, W)
        count = self.regions[0] * self.regions[1]
        inside = region[:, None] == torch.arange(count, device=region.device)[:, None]  # (B, R, K)
        if valid is not None:
            inside = inside & valid[:, None]
        scores = self.scores(hidden).mT[:, None].float()  # (B, 1, H, K)
        hidden_at = inside[:, :, None]  # (B, R, 1, K)
        weights = scores.masked_fill(~hidden_at, torch.finfo(torch.float32).min).softmax(-1)
        weights = weights * hidden_at  # a region without tokens reads nothing
        pooled = (weights.to(hidden.dtype).flatten(1, 2) @ hidden).unflatten(1, (count, -1))
        logits = self.readout(pooled.flatten(2)).float()
        return torch.where(inside.any(-1)[..., None], logits, self.empty)

    def _places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Region (B, K) of each token, and its place in it (B, K, 2) in [-1, 1]."""
        parts = torch.tensor(self.regions, device=positions.device)
        size = torch.tensor(self.grid, device=positions.device) / parts  # tokens of a region
        cell = ((positions.float() + 0.5) / size).floor().clamp(min=0).minimum(parts - 1)
        local = 2 * ((positions.float() + 0.5) / size - cell) - 1
        return (cell[..., 0] * parts[1] + cell[..., 1]).long(), local


@dataclass(frozen=True)
class ReadingShape:
    """Sizes of a reading network.

    Attributes:
        patch_size: Side of a patch in pixels.
        width: C, channels of a token.
        layers: Transformer blocks.
        heads: Attention heads.
    """

    patch_size: int = 8
    width: int = 96
    layers: int = 5
    heads: int = 4


class ReadingNetwork(nn.Module):
    """A small vision transformer with heads that make it read.

    Args:
        shape: Sizes.
        image_size: Side of the images in pixels, a multiple of the patch.
        classes: What may stand in a region.
        scenes: Kinds of scene.
        regions: Rows and columns of regions.

    Raises:
        ValueError: If the image is not a whole number of patches.
    """

    def __init__(
        self,
        shape: ReadingShape,
        image_size: int,
        classes: int,
        scenes: int,
        regions: tuple[int, int] = (2, 2),
    ) -> None:
        super().__init__()
        if image_size % shape.patch_size:
            raise ValueError(
                f"image_size={image_size}: must be a multiple of patch_size={shape.patch_size}"
            )
        side = image_size // shape.patch_size
        self.grid = (side, side)
        self.encoder = build_encoder(shape, image_size)
        self.reader = RegionReader(shape.width, classes, self.grid, regions)
        self.token_head = nn.Linear(shape.width, classes)
        self.scene_head = nn.Linear(shape.width, scenes)

    def forward(self, images: Tensor) -> Readings:
        """Read images (B, 3, H, W) in [-1, 1]."""
        encoded = self.encoder.forward_features(images)  # (B, 1 + L, C)
        tokens = encoded[:, 1:]
        positions = grid_positions(self.grid, tokens.device).expand(len(tokens), -1, -1)
        return Readings(
            self.reader(tokens, positions),
            self.token_head(tokens),
            self.scene_head(encoded[:, 0]),
        )


def build_encoder(shape: ReadingShape, image_size: int) -> VisionTransformer:
    """The vision transformer of a reading network: a class token and learned positions."""
    encoder = VisionTransformer(
        img_size=image_size,
        patch_size=shape.patch_size,
        embed_dim=shape.width,
        depth=shape.layers,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="token",
    )
    for module in encoder.modules():
        if "fused_attn" in vars(module):
            # Fused attention in bfloat16 takes three times as long on a CPU at these sizes.
            vars(module)["fused_attn"] = False
    return encoder


def grid_positions(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Row and column (L, 2) float32 of every token of a grid, in raster order."""
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
