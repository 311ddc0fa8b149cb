"""The optimisers: one fused call gives the steps of torch's loop and leaves clipping alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_modules.optimizers import FusedAdamW, MuonAdamW, parameter_groups


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))


def take_steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int = 20) -> None:
    for step in range(count):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        network(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_fused_steps_are_those_of_torchs_loop() -> None:
    ours, theirs = small_network(), small_network()
    start = copy.deepcopy(ours.state_dict())
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    take_steps(ours, FusedAdamW([{"params": ours.parameters()}], **options))
    take_steps(theirs, torch.optim.AdamW(theirs.parameters(), foreach=False, **options))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(value, start[name], atol=1e-3), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_under_mixed_precision(precision: Any) -> None:  # noqa: ANN401
    network = small_network()
    groups = parameter_groups(network.named_parameters(), 1e-2, 0.1, muon_lr=1e-2, hidden=r"^0\.")
    optimizer = MuonAdamW(groups)
    network(torch.ones(4, 6)).mul(1e3).square().sum().backward()
    # Lightning refuses where the optimiser itself would unscale.
    MixedPrecision(precision, "cpu").clip_gradients(optimizer, 1.0)
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-3)


def test_a_run_begun_with_torchs_loop_goes_on_with_it() -> None:
    old, new = small_network(), small_network()
    before = torch.optim.AdamW(old.parameters(), lr=1e-2)
    take_steps(old, before, 5)
    new.load_state_dict(old.state_dict())
    after = FusedAdamW([{"params": new.parameters()}], lr=1.0)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    take_steps(old, before, 5)
    take_steps(new, after, 5)
    for name, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[name]), name
