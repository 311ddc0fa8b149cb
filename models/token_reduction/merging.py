"""Reductions that average tokens instead of dropping them (letters as in `baselines`)."""

from __future__ import annotations

from math import ceil, sqrt

import torch
from torch import Tensor

from models.token_reduction.reduced import (
    BaselineInput,
    Reduced,
    average_tokens,
    check_count,
    cosine_similarity,
)

# Similarities are compared in these steps, so that rounding does not decide between equal tokens.
_STEPS = 2**16


def average_pooling(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Average rectangles that divide the grid into ``count`` parts of about one size."""
    check_count(inputs, count)
    assignment = _rectangles(inputs.grid, count).to(inputs.tokens.device)
    return average_tokens(inputs, assignment.repeat(len(inputs.tokens), 1), count)


def bipartite_merging(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Merge pairs of similar tokens, round by round (as in ToMe, ICLR 2023, on the tokens alone).

    Tokens are dealt alternately into two sets. Each of the first is matched with the most similar
    of the second, and the most similar pairs are merged: half of all tokens in a round, or as many
    as are too many. A merged token is the mean of all input tokens in it, so their number times
    their mean is conserved.
    """
    check_count(inputs, count)
    batch, remaining = inputs.tokens.shape[:2]
    assignment = torch.arange(remaining, device=inputs.tokens.device).repeat(batch, 1)
    points = inputs._replace(tokens=inputs.tokens.detach().float())
    while remaining > count:
        merged = min(remaining - count, remaining // 2)
        tokens = average_tokens(points, assignment, remaining).tokens
        target = _match_pairs(tokens, merged)  # (B, remaining)
        assignment = target.gather(1, assignment)
        remaining -= merged
    return average_tokens(inputs, _in_raster_order(assignment, count), count)


def _match_pairs(tokens: Tensor, merged: int) -> Tensor:
    """Place (B, N) of each token after the ``merged`` most similar pairs became one token each."""
    similarity = cosine_similarity(tokens[:, ::2], tokens[:, 1::2])  # (B, ceil N / 2, N / 2)
    best, partner = (similarity * _STEPS).round().max(2)
    leaving = best.argsort(dim=1, descending=True, stable=True)[:, :merged]  # (B, merged)
    absorbing = 2 * partner.gather(1, leaving) + 1
    places = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
    staying = torch.ones_like(places).scatter(1, 2 * leaving, 0)
    holder = places.scatter(1, 2 * leaving, absorbing)
    return (staying.cumsum(1) - 1).gather(1, holder)


def _in_raster_order(assignment: Tensor, count: int) -> Tensor:
    """Renumber output tokens by the first input token in each."""
    length = assignment.shape[1]
    places = torch.arange(length, device=assignment.device).expand_as(assignment)
    first = assignment.new_full((len(assignment), count), length)
    order = first.scatter_reduce(1, assignment, places, "amin").argsort(1)
    return order.argsort(1).gather(1, assignment)


def _rectangles(grid: tuple[int, int], count: int) -> Tensor:
    """Number (L,) of the rectangle of each token: rows of rectangles, then along each row.

    Each row of rectangles gets its part of the count by height; areas differ at most by a factor 4.
    """
    height, width = grid
    rows = min(max(round(sqrt(count * height / width)), ceil(count / width), 1), height, count)
    labels, top, made = [], 0, 0
    for row in range(rows):
        bottom, after = ceil((row + 1) * height / rows), rows - row - 1
        inside = round((count - made) * (bottom - top) / (height - top))
        inside = max(1, count - made - width * after, min(width, count - made - after, inside))
        band = made + torch.arange(width) * inside // width  # (w,)
        labels += [band] * (bottom - top)
        top, made = bottom, made + inside
    return torch.cat(labels)
