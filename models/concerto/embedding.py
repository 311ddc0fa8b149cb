"""Input layer of the point encoder, with the mask token of Sonata and Concerto."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stem(nn.Module):
    """Linear layer, norm and GELU on the input features.

    Args:
        in_channels: Input features.
        channels: Width of the finest level.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Embed rows (N, in): (N, C)."""
        return F.gelu(self.norm(self.linear(x)))


class Embedding(nn.Module):
    """Stem with a learned token in place of masked points.

    Args:
        in_channels: Input features.
        channels: Width of the finest level.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, channels))
        self.stem = Stem(in_channels, channels)

    def forward(self, feat: Tensor, mask: Tensor | None) -> Tensor:
        """Embed rows (N, in): (N, C), the token where ``mask`` (N,) is True."""
        x: Tensor = self.stem(feat)
        if mask is None:
            return x
        return torch.where(mask[:, None], self.mask_token.to(x.dtype), x)
