"""RMS norm of short vectors with its own backward pass.

Torch has no fused RMS norm for CPUs: its gradient is pieced together from seven operations, which
at 32 channels a head cost a fifth of a training step. There memory is what takes time: only the
input, which its maker keeps anyway, is stored for the backward pass, and a scale for each vector.
"""

from typing import Any

import torch
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    """y = w * x / rms(x) over the last dimension, in the weights' precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401
        values = _contiguous(x, weight.dtype)
        squares = values.square()
        scale = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return torch.mul(values, scale, out=squares).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        x, scale, weight = ctx.saved_tensors
        unit = _contiguous(x, weight.dtype).mul_(scale)
        wide = _contiguous(gradient, weight.dtype)
        along = wide * unit
        weight_gradient = along.flatten(0, -2).sum(0)
        # d(x / rms)/dx leaves out the direction of x itself.
        share = along.mul_(weight).mean(-1, keepdim=True)
        inner = wide.mul_(weight).sub_(unit.mul_(share)).mul_(scale)
        return inner.to(gradient.dtype), weight_gradient, None


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy that may be written to."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale vectors to a root mean square of 1, times a weight.

    Args:
        x: (..., E); the result has its type and is contiguous, the arithmetic has the type of
            ``weight``.
        weight: (E,).
        eps: Added to the mean square.
    """
    out: Tensor = _RmsNorm.apply(x, weight, eps)
    return out
