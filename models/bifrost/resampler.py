"""Convolutional resampling of patch-level latents to FLUX's token grid (arXiv 2508.05954).

The released block doubles the grid: 16 x 16 latents of a 448-pixel image meet the 32 x 32 packed
tokens of a 512-pixel FLUX. Blocks that keep or halve the grid follow the same pattern.
Letters: B items, N = h * w latents in raster order, C channels.

Every block contains BatchNorm: switch to ``eval`` for inference, let several processes share their
statistics with `synchronise_batch_norm`, and copy buffers, not only parameters, into a moving
average of the weights.

Example:
    >>> resample_block(channels=8, scale=2.0).eval()(torch.zeros(1, 16, 8)).shape
    torch.Size([1, 64, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (0.5, 1.0, 2.0)


def square_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a square of ``tokens`` tokens.

    Raises:
        ValueError: If it is no square.
    """
    side = isqrt(max(tokens, 0))
    if side == 0 or side * side != tokens:
        raise ValueError(f"tokens={tokens}: expected a square number; give the grid as (h, w)")
    return side, side


def resampled_grid(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    """Rows and columns after resampling.

    Raises:
        ValueError: If a grid with an odd side is to be halved, or there is no such scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale}: expected one of {SCALES}")
    if scale == 0.5 and (grid[0] % 2 or grid[1] % 2):
        raise ValueError(f"grid={grid}: expected even sides for scale=0.5; use scale=1 or 2")
    return int(grid[0] * scale), int(grid[1] * scale)


class ResampleBlock(nn.Module):
    """Latents (B, N, C) -> (B, N', C): two convolutions beside a shortcut, then ReLU.

    The output is non-negative, as released, although the latents are signed. The first convolution
    is given by the subclass, which also says what the shortcut does.

    Args:
        channels: C.
        scale: Ratio of the sides of the grids.
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, latents: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Resample a grid of latents.

        Args:
            latents: (B, N, C) in raster order.
            grid: Rows and columns; None stands for a square.

        Raises:
            ValueError: If the shape is not (B, N, C), N is not the grid, or a grid with an odd
                side is to be halved.
        """
        channels = self.conv.in_channels
        if latents.ndim != 3 or latents.shape[2] != channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected (B, N, {channels}); "
                "set latent_channels to the width of the latents"
            )
        grid = square_grid(latents.shape[1]) if grid is None else grid
        if grid[0] * grid[1] != latents.shape[1]:
            raise ValueError(f"grid={grid}: expected h * w = {latents.shape[1]} latents")
        resampled_grid(grid, self.scale)
        picture = torch.unflatten(latents.mT, 2, grid)  # (B, C, h, w)
        hidden = F.relu(self.bn1(self.first(picture)))
        hidden = self.bn2(self.conv(hidden)) + self.shortcut(picture)
        return F.relu(hidden).flatten(2).mT.contiguous()  # (B, N', C)

    def first(self, picture: Tensor) -> Tensor:
        """First convolution, (B, C, h, w) -> (B, C, h', w')."""
        raise NotImplementedError

    def shortcut(self, picture: Tensor) -> Tensor:
        """Resampling without weights, (B, C, h, w) -> (B, C, h', w')."""
        raise NotImplementedError


class UpsampleBlock(ResampleBlock):
    """Doubles both sides; parameter names are those of the release."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2.0)
        self.upconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def first(self, picture: Tensor) -> Tensor:
        """Transposed convolution without overlap."""
        return cast("Tensor", self.upconv(picture))

    def shortcut(self, picture: Tensor) -> Tensor:
        """Every latent four times."""
        return F.interpolate(picture, scale_factor=2, mode="nearest")


class SameSizeBlock(ResampleBlock):
    """Keeps the grid: a plain residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1.0)
        self.sameconv = nn.Conv2d(channels, channels, 3, padding=1)

    def first(self, picture: Tensor) -> Tensor:
        """Convolution of 3 x 3."""
        return cast("Tensor", self.sameconv(picture))

    def shortcut(self, picture: Tensor) -> Tensor:
        """The latents themselves."""
        return picture


class DownsampleBlock(ResampleBlock):
    """Halves both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 0.5)
        self.downconv = nn.Conv2d(channels, channels, 2, stride=2)

    def first(self, picture: Tensor) -> Tensor:
        """Strided convolution without overlap."""
        return cast("Tensor", self.downconv(picture))

    def shortcut(self, picture: Tensor) -> Tensor:
        """Mean of four latents."""
        return F.avg_pool2d(picture, 2)


def resample_block(channels: int, scale: float) -> ResampleBlock:
    """Build the block for a ratio of FLUX's grid to the latents' grid.

    Args:
        channels: C of the latents.
        scale: 2 (released), 1 or 0.5.

    Raises:
        ValueError: If there is no block for the scale or no channel.
    """
    if channels < 1:
        raise ValueError(f"latent_channels={channels}: must be >= 1")
    if scale == 2.0:
        return UpsampleBlock(channels)
    if scale == 1.0:
        return SameSizeBlock(channels)
    if scale == 0.5:
        return DownsampleBlock(channels)
    raise ValueError(f"scale={scale}: expected one of {SCALES}, FLUX's grid / the latents' grid")


def synchronise_batch_norm(module: nn.Module) -> None:
    """Let BatchNorms of all processes share batch statistics, in place (CUDA only).

    Names and values of parameters and buffers stay. Trainer's ``sync_batchnorm=True`` does the
    same; without either, every process keeps its own running statistics.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
                setattr(parent, name, convert(child).train(child.training))
