"""Two processes over gloo: own scenes and tokens for each rank, gradients of both together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lightning_modules.clift import Clift
from lightning_modules.clift_condensing import CliftCondensing
from lightning_modules.randomness import NOISE, device_generator
from models.clift.clustering import kmeans
from tests.lightning_modules.clift_runs import (
    room_cache,
    rooms,
    tiny_clift,
    tiny_condensing,
    tiny_trainer,
)
from tests.lightning_modules.keep_step import KeepStep

__all__ = ["room_cache"]


def reference_loss(module: Clift, batch: Any, rank: int) -> torch.Tensor:  # noqa: ANN401
    """The first step's loss on one rank's share, written out by hand."""
    generator = device_generator(torch.device("cpu"), 0, NOISE, 0, 0, rank)
    scenes = module.encode(batch)
    chance = float(torch.rand((), generator=generator))
    if isinstance(module, CliftCondensing):
        count = int(64 * (0.05 + 0.95 * chance))
        clusters = kmeans(scenes.tokens, count, 3, "random", generator)
        memory = module.network.remember(module.network.condense(scenes.tokens, clusters))
    else:
        stored = module.store(scenes, "random", 0.25 + 0.75 * chance, generator)
        memory = module.remember(stored)
    pictures = module.render(memory, batch["target"])
    return (pictures - batch["target"]["image"]).square().mean()


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [tiny_clift, tiny_condensing])
def test_gradients_equal_one_process_with_the_global_batch(
    make: Any,  # noqa: ANN401
    room_cache: Path,
    tmp_path: Path,
) -> None:
    options = {"strategy": "ddp_fork", "devices": 2, "callbacks": [KeepStep(tmp_path)]}
    trainer = tiny_trainer(tmp_path, steps=1, limit_val_batches=0, **options)
    trainer.fit(make(), rooms(room_cache))
    batches = [torch.load(tmp_path / f"batch{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not set(batches[0]["index"].tolist()) & set(batches[1]["index"].tolist())
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = make()
    alone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    losses = [reference_loss(alone, batch, rank) for rank, batch in enumerate(batches)]
    torch.stack(losses).mean().backward()
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-3)
        else:
            assert parameter.grad is None


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_second_stage_trains_and_validates_on_two_processes(
    room_cache: Path, tmp_path: Path
) -> None:
    options = {"strategy": "ddp_fork", "devices": 2, "precision": "bf16-mixed"}
    trainer = tiny_trainer(tmp_path, steps=3, callbacks=[KeepStep(tmp_path)], **options)
    module = tiny_condensing()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, rooms(room_cache))
    after = torch.load(tmp_path / "weights.pt", weights_only=True)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert any("squeezer" in name for name in moved)
    assert not any("encoder" in name or "linear_input" in name for name in moved)
