"""Reductions without learning, each in a few lines: what a learned selector has to beat.

None of them is ever optional in a table: random choice, an even grid and pooling often win over
published selectors (arXiv 2502.11501, 2511.02650). Four more look at the tokens alone: their norm,
the class token's attention, a max-min spread (as in DivPrune, CVPR 2025) and k-medoids; bipartite
matching (as in ToMe, ICLR 2023) merges tokens instead of dropping them.

All have one signature: the tokens of B images, how many of each to return (1 to L), and a source of
randomness, which only `random_tokens` uses. Output tokens stand in raster order of their first
input token; an image's result does not depend on the others of its batch. Distances are measured in
float32 whatever the tokens' type. Letters: B images, L = h * w tokens of C channels, K returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from models.token_reduction.coverage import even_positions, spread_tokens
from models.token_reduction.merging import average_pooling, bipartite_merging
from models.token_reduction.reduced import (
    BaselineInput,
    Reduced,
    check_count,
    cosine_similarity,
    keep_tokens,
)

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineInput",
    "Reduced",
    "average_pooling",
    "bipartite_merging",
    "class_attention",
    "farthest_points",
    "k_medoids",
    "largest_norm",
    "random_tokens",
    "uniform_grid",
]

Baseline = Callable[[BaselineInput, int, torch.Generator | None], Reduced]

# Similarities are compared in these steps, so that rounding does not decide between equal tokens.
_STEPS = 2**16
_MEDOID_ROUNDS = 20


def random_tokens(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Keep any tokens, drawn without replacement, for each image anew."""
    check_count(inputs, count)
    device = inputs.tokens.device
    source = device if generator is None else generator.device
    keys = torch.rand(inputs.tokens.shape[:2], generator=generator, device=source)
    return _keep_highest(inputs, keys.to(device), count)


def uniform_grid(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Keep tokens spread as evenly over the grid as their number allows."""
    check_count(inputs, count)
    places = even_positions(inputs.grid, count).to(inputs.tokens.device)
    return keep_tokens(inputs, places.expand(len(inputs.tokens), -1))


def largest_norm(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Keep the longest tokens. Encoders' outlier tokens come first, so standardise before."""
    check_count(inputs, count)
    return _keep_highest(inputs, inputs.tokens.detach().float().norm(dim=-1), count)


def class_attention(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Keep the tokens to which the encoder's class token attends most (as in VisionZip).

    Raises:
        ValueError: If the attention is missing; encoders without a class token have none.
    """
    check_count(inputs, count)
    if inputs.cls_attention is None:
        raise ValueError(
            "cls_attention=None: this baseline needs it; encode with attention=True, or leave it "
            "out for encoders without a class token"
        )
    return _keep_highest(inputs, inputs.cls_attention.float(), count)


def farthest_points(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Keep tokens far from one another by cosine: each next one is farthest from those chosen.

    The first is the token whose nearest neighbour is farthest (as in DivPrune, CVPR 2025).
    """
    check_count(inputs, count)
    batch, length = inputs.tokens.shape[:2]
    similarity = (cosine_similarity(inputs.tokens, inputs.tokens) * _STEPS).round()
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    first = similarity.amax(2).argmin(1, keepdim=True)  # (B, 1)
    present = torch.ones(batch, length, dtype=torch.bool, device=first.device)
    chosen = torch.zeros_like(present).scatter(1, first, True)
    amount = torch.full((batch,), count, device=first.device)
    chosen = spread_tokens(inputs.tokens.detach(), chosen, amount, present)
    return _keep_highest(inputs, chosen.float(), count)


def k_medoids(
    inputs: BaselineInput, count: int, generator: torch.Generator | None = None
) -> Reduced:
    """Keep the medoids of clusters: tokens with the least summed distance to their cluster.

    Alternates Euclidean assignment and choice of medoids from an even grid, at most 20 times. The
    assignment says which medoid stands for each token.
    """
    check_count(inputs, count)
    points = inputs.tokens.detach().float()
    with torch.autocast(points.device.type, enabled=False):
        # Differences, not products: equal tokens are then exactly 0 apart.
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    medoids = even_positions(inputs.grid, count).to(points.device).repeat(len(points), 1)  # (B, K)
    for _ in range(_MEDOID_ROUNDS):
        labels = _nearest_medoid(distance, medoids)
        same = labels[:, None] == labels[:, :, None]  # (B, L, L)
        cost = (distance * same).sum(2)  # to the members of the token's own cluster
        outside = labels[:, None] != torch.arange(count, device=points.device)[:, None]
        updated = cost[:, None].masked_fill(outside, torch.inf).argmin(2)  # (B, K)
        if torch.equal(updated, medoids):
            break
        medoids = updated
    medoids = medoids.sort(1).values
    return keep_tokens(inputs, medoids)._replace(assignment=_nearest_medoid(distance, medoids))


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "random": random_tokens,
        "grid": uniform_grid,
        "pooling": average_pooling,
        "norm": largest_norm,
        "cls_attention": class_attention,
        "farthest": farthest_points,
        "medoids": k_medoids,
        "merging": bipartite_merging,
    }
)
"""Every baseline under the name it has in tables; "cls_attention" needs that of the encoder."""


def _keep_highest(inputs: BaselineInput, scores: Tensor, count: int) -> Reduced:
    """Keep the ``count`` highest of scores (B, L); of equal ones the lower index."""
    order = scores.detach().argsort(dim=1, descending=True, stable=True)
    return keep_tokens(inputs, order[:, :count].sort(1).values)


def _nearest_medoid(distance: Tensor, medoids: Tensor) -> Tensor:
    """Which of the medoids (B, K) is nearest to each token (B, L); a medoid is its own."""
    to_medoids = distance.gather(1, medoids[..., None].expand(-1, -1, distance.shape[2]))
    own = torch.arange(medoids.shape[1], device=medoids.device).expand_as(medoids)
    return to_medoids.argmin(1).scatter(1, medoids, own)
