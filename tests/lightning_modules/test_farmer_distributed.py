"""Two processes over gloo: own noise for each rank, gradients of the global batch, sharding."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_modules.farmer import Farmer
from lightning_modules.randomness import NOISE, device_generator
from tests.lightning_modules.farmer_runs import digits, tiny_farmer, tiny_trainer
from tests.lightning_modules.keep_step import KeepStep
from tests.lightning_modules.two_processes import run_sharded

SHARDED = """
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from tests.lightning_modules.farmer_runs import digits, tiny_farmer, tiny_trainer

torch.manual_seed(0)
folder = Path(sys.argv[1])
module = tiny_farmer(prior_noise=0.1)
before = module.network.flow.blocks[0].proj_in.weight.detach().clone()
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
trainer = tiny_trainer(folder, steps=3, strategy=strategy, devices=2, precision="bf16-mixed")
trainer.fit(module, digits())
weight = module.network.flow.blocks[0].proj_in.weight
assert isinstance(weight, DTensor)
assert not torch.equal(weight.full_tensor().cpu(), before)
samples = module.eval().draw_samples(torch.arange(10), seed=0, scale=1.0)
assert samples.isfinite().all() and samples.shape == (10, 1, 8, 8)
(folder / f"rank{trainer.global_rank}.txt").write_text("done")
"""


def reference_loss(module: Farmer, batch: dict[str, torch.Tensor], rank: int) -> torch.Tensor:
    """The first step's loss on one rank's share, written out by hand."""
    generator = device_generator(torch.device("cpu"), 0, NOISE, 0, 0, rank)
    chance = torch.empty(batch["label"].shape).uniform_(generator=generator)
    labels = torch.where(chance < 0.1, -1, batch["label"])
    parts = module.likelihood(batch["image"], labels, 0.1, generator)
    return -parts.total.mean() / module.dims


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_gradients_equal_one_process_with_the_global_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tiny_farmer()
    trainer = tiny_trainer(
        tmp_path,
        steps=1,
        limit_val_batches=0,
        strategy="ddp_fork",
        devices=2,
        callbacks=[KeepStep(tmp_path)],
    )
    trainer.fit(module, digits())
    batches = [torch.load(tmp_path / f"batch{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not set(batches[0]["index"].tolist()) & set(batches[1]["index"].tolist())
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = tiny_farmer()
    alone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    alone.train()
    # The histogram behind the stretch is of all training images, not of one rank's.
    whole = tiny_farmer()
    tiny_trainer(tmp_path, steps=1, limit_val_batches=0).fit(whole, digits())
    assert torch.equal(alone.stretch.edges, whole.stretch.edges)
    losses = [reference_loss(alone, batch, rank) for rank, batch in enumerate(batches)]
    torch.stack(losses).mean().backward()
    for name, parameter in alone.named_parameters():
        assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-4)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_sharded_training_and_sampling(tmp_path: Path) -> None:
    """FSDP2 over two CPU processes: weights are sharded, trained, and still draw samples."""
    run_sharded(SHARDED, tmp_path, seconds=200)
