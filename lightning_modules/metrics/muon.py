"""Muon for convolution kernels: momentum whose matrix is made orthogonal before the step.

Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks", with the step size
of Liu et al., 2025 (arXiv 2502.16982), so that rates compare with AdamW's. ``torch.optim.Muon``
takes matrices only and always iterates in bfloat16, which costs a CPU without bfloat16 units eight
times the float32 time at the sizes used here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import cast, overload

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz iteration with the coefficients of the reference: steepest slope at zero
# while singular values end up near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Brings the singular values of matrices (..., rows, columns) close to 1.

    Args:
        matrices: (..., rows, columns).
        steps: Newton-Schulz iterations.
        dtype: what the iterations compute in; None is the matrices' own.

    Returns:
        Same shape and dtype as ``matrices``.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype or matrices.dtype)
    scale = x.norm(dim=(-2, -1), keepdim=True) + 1e-7
    x = (x / scale).flatten(0, -3).contiguous()  # (n, r, c), r <= c
    gram = x.new_empty(*x.shape[:2], x.shape[1])
    step, following = torch.empty_like(gram), torch.empty_like(x)
    for _ in range(steps):
        # Into tensors at hand: fresh ones cost a CPU a quarter of the time.
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C, out=step)
        torch.baddbmm(x, step, x, beta=_A, out=following)
        x, following = following, x
    orthogonal = x.mT if tall else x
    return orthogonal.reshape(matrices.shape).to(matrices.dtype)


@torch.no_grad()
def muon_update(
    parameters: Sequence[nn.Parameter],
    averages: Sequence[Tensor],
    lr: float,
    momentum: float,
    dtype: torch.dtype | None = None,
) -> None:
    """Moves parameters and their gradient averages, all in place, by one Muon step.

    Matrices of one size are handled together: one by one, the products are too small to be fast.

    Args:
        parameters: kernels (out, in, ...) that have gradients, treated as (out, in * ...).
        averages: running averages of their gradients, of the same shapes.
        lr: rate on AdamW's scale.
        momentum: decay of the averages.
        dtype: what the steps are made orthogonal in; None is the gradients' own.
    """
    gradients = [cast("Tensor", parameter.grad) for parameter in parameters]
    if not gradients:
        return
    smoothed = list(averages)
    torch._foreach_lerp_(smoothed, gradients, 1 - momentum)
    ahead = torch._foreach_lerp(gradients, smoothed, momentum)
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(ahead):
        rows = matrix.shape[0]
        by_size[rows, matrix.numel() // rows].append(place)
    for (rows, columns), places in by_size.items():
        directions = orthogonalise(
            torch.stack([ahead[place].flatten(1) for place in places]), dtype=dtype
        )
        members: list[Tensor] = [parameters[place] for place in places]
        moves = [move.view_as(p) for p, move in zip(members, directions, strict=True)]
        torch._foreach_add_(members, moves, alpha=-lr * 0.2 * max(rows, columns) ** 0.5)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised steps, for parameters of two or more dimensions.

    Args:
        params: kernels (out, in, ...); each is treated as an (out, in * ...) matrix.
        lr: on AdamW's scale; the entries of a step have a root mean square of about 0.2 * lr.
        momentum: decay of the gradient average.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.9
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes one step; ``closure`` is called first, as the optimiser interface asks."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            averages = [
                self.state[p].setdefault("average", torch.zeros_like(p.grad)) for p in trained
            ]
            muon_update(trained, averages, group["lr"], group["momentum"])
        return loss
