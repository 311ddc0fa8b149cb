"""Patch tokens of several views, in the order of the released CLiFT weights.

A token's channels run (row in patch, column in patch, channel), the channel fastest; tokens of a
scene run (view, row, column).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchLinear(nn.Conv2d):
    """Linear map of token channels whose weight is shaped as a convolution of size one.

    Args:
        inputs: Channels of a token going in.
        outputs: Channels of a token coming out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def zero_bias(self) -> None:
        """Set the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map tokens (..., inputs) to (..., outputs)."""
        return F.linear(input, self.weight.flatten(1), self.bias)


def patchify(maps: Tensor, patch_size: int) -> Tensor:
    """Cut (B, V, C, H, W) into (B, V, h * w, p * p * C) patches of side p.

    Raises:
        ValueError: If the picture is not a whole number of patches.
    """
    batch, views, channels, height, width = maps.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"picture of {height} x {width} pixels: height and width must be multiples of "
            f"patch_size={patch_size}; resize or crop the pictures"
        )
    rows, columns = height // patch_size, width // patch_size
    grid = maps.reshape(batch, views, channels, rows, patch_size, columns, patch_size)
    grid = grid.permute(0, 1, 3, 5, 4, 6, 2)  # (B, V, h, w, p, p, C)
    return grid.reshape(batch, views, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Invert `patchify`: (B, V, h * w, p * p * C) to (B, V, C, H, W)."""
    batch, views = patches.shape[:2]
    rows, columns = height // patch_size, width // patch_size
    grid = patches.reshape(batch, views, rows, columns, patch_size, patch_size, -1)
    grid = grid.permute(0, 1, 6, 2, 4, 3, 5)  # (B, V, C, h, p, w, p)
    return grid.reshape(batch, views, -1, height, width)


def fourier_features(patches: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Sines and cosines of the mean ray of each patch, at pi times each frequency.

    Args:
        patches: (..., p * p * 6) Plücker rays of the pixels of each patch.
        frequencies: F factors of pi.

    Returns:
        (..., 12 * F).
    """
    mean = patches.view(*patches.shape[:-1], -1, 6).mean(-2)  # (..., 6)
    angles = torch.cat([mean * (math.pi * frequency) for frequency in frequencies], dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
