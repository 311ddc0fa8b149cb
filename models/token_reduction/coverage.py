"""Tokens that cover an image whatever their scores: an even grid, or those unlike any kept one.

Scores alone take a biased sample of an image; a consumer that pools tokens needs some of every
part. Letters: G groups of N tokens of width C.
"""

from math import ceil, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities are compared in these steps, so that rounding does not decide between equal tokens.
_STEPS = 2**16
_CHUNK = 1024


def even_positions(grid: tuple[int, int], count: int) -> Tensor:
    """Places of ``count`` tokens spread evenly over a grid, (count,) int64 ascending.

    Rows are as many as make the spacing alike both ways; each takes its part of the count, a row's
    tokens sit at the centres of equal pieces of it.

    Args:
        grid: Rows and columns.
        count: From 0 to all of them.

    Raises:
        ValueError: If the count is outside that range.
    """
    height, width = grid
    if not 0 <= count <= height * width:
        raise ValueError(f"count={count}: must be from 0 to the {height * width} tokens of {grid}")
    if count == 0:
        return torch.zeros(0, dtype=torch.int64)
    rows = min(max(round(sqrt(count * height / width)), ceil(count / width), 1), height, count)
    places = []
    for i in range(rows):
        row = (2 * i + 1) * height // (2 * rows)
        inside = (i + 1) * count // rows - i * count // rows
        places += [row * width + (2 * j + 1) * width // (2 * inside) for j in range(inside)]
    return torch.tensor(places)


@torch.no_grad()
def spread_tokens(tokens: Tensor, chosen: Tensor, amount: Tensor, present: Tensor) -> Tensor:
    """Add to the chosen tokens, one by one, the token least similar to any chosen so far.

    Similarity is the cosine; equal ones go to the lower index.

    Args:
        tokens: (G, N, C).
        chosen: (G, N) bool, at least one in each group.
        amount: (G,) tokens to have in the end.
        present: (G, N) bool, False for padding, which is never chosen.

    Returns:
        (G, N) bool.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1)
        # One product for all pairs costs less than a few products of one token with all others.
        pairs = _similarity(unit, unit) if unit.shape[1] <= _CHUNK else None
        nearest = _nearest_chosen(unit, chosen)
        chosen = chosen.clone()
        for _ in range(int((amount - chosen.sum(1)).max().clamp(min=0))):
            wanting = chosen.sum(1) < amount
            pick = nearest.masked_fill(chosen | ~present, torch.inf).argmin(1, keepdim=True)
            chosen.scatter_(1, pick, wanting[:, None] | chosen.gather(1, pick))
            source = unit if pairs is None else pairs
            picked = source.gather(1, pick[..., None].expand(-1, -1, source.shape[-1]))
            like = _similarity(unit, picked)[..., 0] if pairs is None else picked[:, 0]
            nearest = nearest.maximum(like)  # (G, N)
    return chosen


def _nearest_chosen(unit: Tensor, chosen: Tensor) -> Tensor:
    """Similarity of each token to the chosen one most like it, (G, N)."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    nearest = torch.full(unit.shape[:2], -torch.inf, device=unit.device)
    for start in range(0, int(chosen.sum(1).max()), _CHUNK):
        places = order[:, start : start + _CHUNK]
        some = unit.gather(1, places[..., None].expand(-1, -1, unit.shape[-1]))
        similarity = _similarity(unit, some)  # (G, N, chunk)
        similarity = similarity.masked_fill(~chosen.gather(1, places)[:, None], -torch.inf)
        nearest = nearest.maximum(similarity.amax(2))
    return nearest


def _similarity(unit: Tensor, others: Tensor) -> Tensor:
    return ((unit @ others.mT) * _STEPS).round()
