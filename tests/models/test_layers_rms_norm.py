"""The RMS norm with its own backward pass against torch's."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.layers.rms_norm import rms_norm


def test_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_forward_and_backward(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(32, eps=1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, push = torch.randn(2, 4, 7, 32).to(dtype), torch.randn(2, 4, 7, 32).to(dtype)
    theirs, ours = (x.clone().requires_grad_() for _ in range(2))
    expected = norm(theirs.float()).to(dtype)
    (expected * push).sum().backward()
    weight = norm.weight.detach().clone().requires_grad_()
    result = rms_norm(ours, weight, 1e-5)
    (result * push).sum().backward()
    assert_close(result, expected)
    assert_close(ours.grad, theirs.grad, atol=2e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)
    assert_close(weight.grad, norm.weight.grad, atol=1e-3, rtol=1e-3)


def test_zeros_stay_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert bool(x.grad.isfinite().all())
