"""Which latents are hidden in training: random orders and ratios as in masked autoregression (MAR).

Bifrost-1 (arXiv 2508.05954) imports MAR's masking: one ratio for a batch, drawn from a normal
distribution of mean 1 and deviation 0.25 that is cut to [0.7, 1], and an order for each item.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, erf, sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskRatio:
    """Share of hidden tokens: a normal distribution cut to [low, high].

    Attributes:
        low: Smallest share, > 0.
        high: Largest share, <= 1.
        mean: Of the uncut distribution.
        deviation: Of the uncut distribution; 0 always gives the mean, cut to the bounds.
    """

    low: float = 0.7
    high: float = 1.0
    mean: float = 1.0
    deviation: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"low={self.low}, high={self.high}: must be 0 < low <= high <= 1")
        if self.deviation < 0:
            raise ValueError(f"deviation={self.deviation}: must be >= 0")

    def draw(self, generator: torch.Generator) -> float:
        """A share, by inverting the distribution function."""
        if self.deviation == 0 or self.low == self.high:
            return min(max(self.mean, self.low), self.high)
        bounds = (self.low, self.high)
        first, last = (_normal_below((x - self.mean) / self.deviation) for x in bounds)
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        score = torch.special.ndtri(first + (last - first) * uniform)
        return min(max(self.mean + self.deviation * float(score), self.low), self.high)


def random_orders(items: int, tokens: int, generator: torch.Generator) -> Tensor:
    """(B, N) int64 on the CPU: in each row all tokens in random order."""
    return torch.rand(items, tokens, generator=generator, dtype=torch.float64).argsort(1)


def mask_first(orders: Tensor, count: int) -> Tensor:
    """(B, N) bool: True at the first ``count`` tokens of each order (B, N)."""
    mask = torch.zeros_like(orders, dtype=torch.bool)
    return mask.scatter_(1, orders[:, :count], True)


def training_mask(
    items: int, tokens: int, generator: torch.Generator, ratio: MaskRatio | None = None
) -> Tensor:
    """(B, N) bool on the CPU, True at hidden tokens: ceil(N r) in every row, one r for all.

    Args:
        items: B.
        tokens: N.
        generator: Of the CPU; keyed by the caller, for example by (seed, step, rank).
        ratio: Distribution of r; None takes MAR's.

    Raises:
        ValueError: B or N is below 1.
    """
    for name, value in (("items", items), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    share = (MaskRatio() if ratio is None else ratio).draw(generator)
    return mask_first(random_orders(items, tokens, generator), min(ceil(tokens * share), tokens))


def _normal_below(score: float) -> float:
    """Share of a standard normal distribution below a score."""
    return (1 + erf(score / sqrt(2))) / 2
