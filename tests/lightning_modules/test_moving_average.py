"""The moving average of the weights is Lightning's, in fewer operations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from tiny_pair import TinyData, TinyModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_modules.callbacks.moving_average import MovingAverage
from lightning_modules.weight_average import WeightAverage, load_whole_state


def averaged(callback: WeightAveraging) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Averaged weights, which training ends with, and the trained ones beside them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_steps=6, accelerator="cpu", callbacks=[callback], limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    model = TinyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, TinyData())
    return model.state_dict(), before


def test_it_is_lightnings_average() -> None:
    ours, before = averaged(MovingAverage(decay=0.7))
    theirs, _ = averaged(EMAWeightAveraging(decay=0.7))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(value, before[name], atol=1e-4), name
    trained, _ = averaged(MovingAverage(decay=0.0))
    assert any(not torch.allclose(value, trained[name], atol=1e-4) for name, value in ours.items())


class Tied(nn.Module):
    """Two names of one weight, a frozen one, a buffer and a count."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2, bias=False)
        self.other = nn.Linear(2, 2, bias=False)
        self.other.weight = self.one.weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))


def test_weights_and_average_change_places() -> None:
    module = Tied()
    average = WeightAverage(module, 0.5, None)
    before = module.one.weight.detach().clone()
    average.update_parameters(module)
    with torch.no_grad():
        module.one.weight += 2
        module.get_buffer("mean").add_(4)
        module.get_buffer("count").add_(3)
    average.update_parameters(module)
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    state = copy.deepcopy(average.state(module, module.state_dict()))
    for name in ("one.weight", "other.weight"):
        torch.testing.assert_close(state[name], before + 1)
    assert state["mean"].tolist() == [2, 2]
    assert state["frozen"].tolist() == [1, 1]
    assert state["count"] == 3, "a count is no average"
    average.swap(module)
    torch.testing.assert_close(module.state_dict(), state)
    average.swap(module)
    assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_sharded_weights_also_after_a_pass_without_gradients(mesh: DeviceMesh) -> None:
    """A forward pass alone leaves the root's parameters gathered: shards are what counts."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    fully_shard(module[0], mesh=mesh)
    fully_shard(module, mesh=mesh)
    average = WeightAverage(module, 0.5, None)
    average.update_parameters(module)
    load_whole_state(module, {name: value + 2 for name, value in whole.items()})
    average.update_parameters(module)
    batch = torch.ones(1, 3)
    average.swap(module)
    with torch.no_grad():
        module(batch)
    average.swap(module)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    for parameter, value in zip(module.parameters(), whole.values(), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), value + 2)  # type: ignore[attr-defined]
    state = average.state(module, whole)
    torch.testing.assert_close(state, {name: value + 1 for name, value in whole.items()})
    assert average.state(module, {}) == {}, "a process other than the first"
    with pytest.raises(RuntimeError, match="keys that the file or the model lacks"):
        load_whole_state(module, {"0.weight": whole["0.weight"]})


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay=1.5: must be in \[0, 1\] \(MovingAverage.decay\)"):
        MovingAverage(decay=1.5)
