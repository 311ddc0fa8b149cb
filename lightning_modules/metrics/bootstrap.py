"""Confidence intervals by resampling images, for metrics that are ratios of sums."""

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A figure with its interval.

    Attributes:
        value: Over all images.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def ratio_estimate(
    numerators: Tensor, denominators: Tensor, level: float = 0.95, draws: int = 1000
) -> Estimate:
    """Ratio of sums over images, with a percentile bootstrap interval.

    A share of right answers where images have different numbers of questions is such a ratio, and
    so is an error normalised by the variance.

    Args:
        numerators: (N,) of each image.
        denominators: (N,) of each image, >= 0.
        level: Coverage of the interval.
        draws: Resamplings of the N images; the same ones in every call with this N.

    Raises:
        ValueError: If the denominators sum to nothing.
    """
    tops, bottoms = numerators.double().cpu(), denominators.double().cpu()
    if not bool(bottoms.sum() > 0):
        raise ValueError(
            f"denominators of {len(bottoms)} images sum to 0: there is nothing to rate"
        )
    count = len(tops)
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randint(count, (draws, count), generator=generator)
    ratios = tops[chosen].sum(1) / bottoms[chosen].sum(1)
    tail = (1 - level) / 2
    ends = torch.quantile(ratios.nan_to_num(), torch.tensor([tail, 1 - tail], dtype=torch.double))
    return Estimate(float(tops.sum() / bottoms.sum()), float(ends[0]), float(ends[1]))
