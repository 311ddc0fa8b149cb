"""Muon for convolution kernels: momentum whose matrix is made orthogonal before the step.

Jordan et al., 2024, "Muon: An optimizer for hidden layers in neural networks", with the step size
of Liu et al., 2025 (arXiv 2502.16982), so that rates compare with AdamW's. ``torch.optim.Muon``
takes matrices only and iterates in bfloat16, which costs a CPU without bfloat16 units eight times
the float32 time at the sizes used here.
"""

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz iteration with the coefficients of the reference: steepest slope at zero
# while singular values end up near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(gradient: Tensor, steps: int = 5) -> Tensor:
    """Brings the singular values of a gradient, seen as (rows, everything else), close to 1."""
    matrix = gradient.flatten(1)
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.mT if tall else matrix
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = matrix @ matrix.mT
        matrix = _A * matrix + (_B * gram + _C * gram @ gram) @ matrix
    orthogonal: Tensor = matrix.mT if tall else matrix
    return orthogonal.reshape(gradient.shape)


@torch.no_grad()
def muon_update(
    parameter: nn.Parameter, gradient: Tensor, average: Tensor, lr: float, momentum: float
) -> None:
    """Moves a parameter and its gradient average, both in place, by one Muon step.

    Args:
        parameter: kernel (out, in, ...), treated as an (out, in * ...) matrix.
        gradient: its gradient, of the same shape.
        average: running average of its gradients, of the same shape.
        lr: rate on AdamW's scale.
        momentum: decay of the average.
    """
    average.lerp_(gradient, 1 - momentum)
    direction = orthogonalise(gradient.lerp(average, momentum))
    longer = max(parameter.shape[0], parameter[0].numel())
    parameter.add_(direction, alpha=-lr * 0.2 * longer**0.5)


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["momentum"])
        return loss

    def _update(self, parameter: nn.Parameter, lr: float, momentum: float) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        average = self.state[parameter].setdefault("average", torch.zeros_like(gradient))
        muon_update(parameter, gradient, average, lr, momentum)
