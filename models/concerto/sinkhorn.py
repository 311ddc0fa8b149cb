"""Targets of online clustering by Sinkhorn-Knopp (arXiv 2006.09882; 2510.23607, sect. 3)."""

from collections.abc import Callable

import torch
from torch import Tensor

# Sums a tensor over all ranks.
Reduce = Callable[[Tensor], Tensor]

# Below, exp(cosine / temperature) leaves the range of float32.
_LEAST_TEMPERATURE = 0.02


@torch.no_grad()
def sinkhorn_targets(
    logits: Tensor, temperature: float, iterations: int = 3, reduce: Reduce | None = None
) -> Tensor:
    """Assign points to prototypes, all prototypes alike in sum.

    Each iteration gives every prototype the same mass over all points of all ranks, then every
    point the mass 1. Factors that all entries share cancel in the last of these divisions, so the
    only thing that ranks exchange is the mass of each prototype, once an iteration, also by a rank
    without points.

    Args:
        logits: (n, P) cosines of n points with P prototypes; n may be 0.
        temperature: Divides the cosines; lower is sharper.
        iterations: At least 1.
        reduce: Sums a tensor over the ranks; None is a single process.

    Returns:
        (n, P) float32 whatever autocast says; rows sum to 1.

    Raises:
        ValueError: If the temperature or the number of iterations is too low.
    """
    if not temperature >= _LEAST_TEMPERATURE:
        raise ValueError(
            f"teacher_temperature={temperature}: must be at least {_LEAST_TEMPERATURE}, or "
            "exponentials of cosines overflow float32"
        )
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: must be at least 1")
    with torch.autocast(logits.device.type, enabled=False):
        mass = (logits.float() / temperature).exp_()
        for _ in range(iterations):
            of_prototypes = mass.sum(0, keepdim=True)  # (1, P)
            mass /= of_prototypes if reduce is None else reduce(of_prototypes)
            mass /= mass.sum(1, keepdim=True)
    return mass
