"""Probes of tokens: can text still be read, and the scene still be told, from what was kept?

Letters in shape comments: N images, B of a batch, K tokens, C channels, R regions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.metrics.short_training import ShortTraining, fit_network
from models.token_reduction.reading import RegionReader
from models.token_reduction.reduced import Reduced

# Strength of the scene probe's ridge penalty, on standardised features.
_RIDGE = 1e-2


class ReadTokens(NamedTuple):
    """Tokens to read, standardised, and where they were.

    Attributes:
        tokens: (B, K, C).
        positions: (B, K, 2) row and column on the grid.
    """

    tokens: Tensor
    positions: Tensor


def fit_reader(
    reader: RegionReader,
    regions: Tensor,
    tokens_of: Callable[[Tensor, torch.Generator], ReadTokens],
    settings: ShortTraining,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Train a reader in place.

    Args:
        reader: Its weights are the start.
        regions: (N, R) int64 what stands in each region.
        tokens_of: Tokens of the images at positions (B,), with a source of noise.
        settings: How long and how fast.
        advance: Called after each step.
    """

    def loss_of(positions: Tensor, generator: torch.Generator) -> Tensor:
        logits = reader(*tokens_of(positions, generator))  # (B, R, classes)
        return F.cross_entropy(logits.mT, regions[positions])

    fit_network(reader, len(regions), loss_of, settings, advance)


def read_rightly(reader: RegionReader, read: ReadTokens, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Items read rightly and items in all, each (B,), of regions (B, R) that hold something."""
    with torch.no_grad():
        right = reader(*read).argmax(-1) == regions
    there = regions > 0
    return (right & there).sum(1), there.sum(1)


class SceneProbe(nn.Module):
    """A linear classifier of the mean of an image's tokens, fitted in closed form.

    Least squares on one-hot targets with a small ridge penalty: nothing to tune, and the same
    answer every time.

    Args:
        pooled: (N, C) mean tokens, standardised.
        scenes: (N,) int64.
        classes: Number of scenes.
    """

    def __init__(self, pooled: Tensor, scenes: Tensor, classes: int) -> None:
        super().__init__()
        inputs = self._with_constant(pooled)
        targets = F.one_hot(scenes, classes).double()
        penalty = _RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.double)
        penalty[-1, -1] = 0.0
        gram = inputs.mT @ inputs + penalty.to(inputs.device)
        self.register_buffer("weight", torch.linalg.solve(gram, inputs.mT @ targets))

    weight: Tensor

    @staticmethod
    def _with_constant(pooled: Tensor) -> Tensor:
        return F.pad(pooled.double(), (0, 1), value=1.0)

    def forward(self, pooled: Tensor) -> Tensor:
        """Scene (B,) of mean tokens (B, C)."""
        return (self._with_constant(pooled) @ self.weight).argmax(-1)


def area_weights(reduced: Reduced, places: Tensor) -> Tensor:
    """Share (B, K) of the grid that lies nearest to each output token.

    Pooling with these weights lets a few tokens stand for a plain area and many for a dense one, so
    that a selection which prefers text does not pretend that the image is all text.

    Args:
        reduced: K output tokens with positions.
        places: (L, 2) row and column of every input token.
    """
    nearest = torch.cdist(places.expand(len(reduced.tokens), -1, -1), reduced.positions).argmin(-1)
    counts = F.one_hot(nearest, reduced.positions.shape[1]).sum(1)  # (B, K)
    return counts / counts.sum(1, keepdim=True)
