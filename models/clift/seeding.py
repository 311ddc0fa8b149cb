"""Starting centroids of K-means: random tokens, or distant ones (k-means++).

Letters in shape comments: B scenes, N tokens, C channels, K centroids.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.clift.subsets import take_tokens

# Inner products of a batch's tokens kept while drawing; more are formed as needed.
_PRODUCTS = 2**26


def random_start(
    points: Tensor, valid: Tensor, slots: int, generator: torch.Generator | None
) -> Tensor:
    """(B, K, C) distinct random tokens of each scene."""
    keys = _uniform(points.shape[:2], points, generator).masked_fill(~valid, torch.inf)
    chosen = keys.argsort(dim=-1, stable=True)[:, :slots]
    return take_tokens(points, chosen)


def distant_start(
    points: Tensor, valid: Tensor, slots: int, generator: torch.Generator | None
) -> Tensor:
    """(B, K, C) tokens drawn one by one, by the squared distance to those already drawn.

    Of several draws each time, the one that leaves the least total distance is kept.
    """
    batch, count, _ = points.shape
    trials = 2 + int(math.log(slots))
    draws = _uniform((slots, batch, trials), points, generator)
    products = _inner_products(points)
    squares = points.square().sum(-1)  # (B, N)
    scenes = torch.arange(batch, device=points.device)
    # Before the first draw every valid token is as far as any other.
    distance = torch.where(valid, torch.finfo(torch.float32).max / (4 * count), 0.0)
    weight = valid.to(points.dtype)
    chosen = []
    for draw in draws:
        cumulative = weight.double().cumsum(-1)  # (B, N)
        picks = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        picks = picks.clamp(max=count - 1)  # (B, trials)
        near = squares[:, None] + squares.gather(1, picks)[..., None] - 2 * products(picks)
        near = near.clamp(min=0).scatter(2, picks[..., None], 0).minimum(distance[:, None])
        best = near.sum(-1).argmin(-1)
        distance = near[scenes, best].masked_fill(~valid, 0)
        chosen.append(picks[scenes, best])
        # Where all tokens coincide with drawn ones, any may be next.
        weight = torch.where(distance.sum(-1, keepdim=True) > 0, distance, valid.to(distance))
    return take_tokens(points, torch.stack(chosen, 1))


def _inner_products(points: Tensor) -> Callable[[Tensor], Tensor]:
    """Function from positions (B, M) to their inner products with all tokens, (B, M, N)."""
    batch, count, _ = points.shape
    if batch * count * count > _PRODUCTS:
        return lambda picks: torch.bmm(take_tokens(points, picks), points.mT)
    products = torch.bmm(points, points.mT)
    return lambda picks: take_tokens(products, picks)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform numbers of the generator's device, moved to that of ``like``."""
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=device).to(like.device)
