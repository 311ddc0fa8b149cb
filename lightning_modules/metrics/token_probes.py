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

# The scene probe's penalty on standardised inputs, and its steps.
_RIDGE, _ITERATIONS = 1e-4, 100


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
    """Logistic regression on one pooled token per image.

    Fitted by L-BFGS from zero on all images at once: nothing is drawn, so the answer is the same
    every time.

    Args:
        pooled: (N, C) mean tokens.
        scenes: (N,) int64.
        classes: Number of scenes.
    """

    def __init__(self, pooled: Tensor, scenes: Tensor, classes: int) -> None:
        super().__init__()
        with torch.inference_mode(False), torch.enable_grad():
            self.register_buffer("mean", pooled.mean(0))
            self.register_buffer("std", pooled.std(0).clamp(min=1e-6))
            inputs = self._prepared(pooled)
            weight = inputs.new_zeros(inputs.shape[1], classes).requires_grad_()
            optimizer = torch.optim.LBFGS(
                [weight], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
            )

            def loss() -> Tensor:
                optimizer.zero_grad()
                value = F.cross_entropy(inputs @ weight, scenes)
                value = value + _RIDGE * weight.square().sum()
                value.backward()  # type: ignore[no-untyped-call]
                return value

            optimizer.step(loss)  # type: ignore[no-untyped-call]
        self.register_buffer("weight", weight.detach())

    mean: Tensor
    std: Tensor
    weight: Tensor

    def _prepared(self, pooled: Tensor) -> Tensor:
        """Standardised inputs (B, C + 1) with a constant."""
        return F.pad((pooled - self.mean) / self.std, (0, 1), value=1.0)

    @torch.no_grad()
    def forward(self, pooled: Tensor) -> Tensor:
        """Scene (B,) of mean tokens (B, C)."""
        return (self._prepared(pooled) @ self.weight).argmax(-1)


def area_mean(reduced: Reduced, places: Tensor) -> Tensor:
    """Mean tokens (B, C), each weighted by the area that lies nearest to it, see `area_weights`."""
    return (area_weights(reduced, places)[..., None] * reduced.tokens).sum(1)


def area_weights(reduced: Reduced, places: Tensor) -> Tensor:
    """Share (B, K) of the grid that lies nearest to each output token.

    Pooling with these weights lets a few tokens stand for a plain area and many for a dense one, so
    that a selection which prefers text does not pretend that the image is all text.

    Args:
        reduced: K output tokens with positions.
        places: (L, 2) row and column of every input token.
    """
    nearest = torch.cdist(places.expand(len(reduced.tokens), -1, -1), reduced.positions).argmin(-1)
    ones = torch.ones(nearest.shape, device=nearest.device)
    # Counts are whole numbers, so the order in which they are added does not matter.
    counts = ones.new_zeros(reduced.positions.shape[:2]).scatter_add_(1, nearest, ones)  # (B, K)
    return counts / counts.sum(1, keepdim=True)
