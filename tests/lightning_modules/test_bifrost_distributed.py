"""Two processes over gloo: own masks and noise for each rank, gradients of both; sharding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from datamodules.keyed_random import keyed_generator
from lightning_modules.bifrost_branch import BifrostBranch
from lightning_modules.bifrost_controlnet import BifrostControlNet
from lightning_modules.randomness import NOISE, device_generator
from models.bifrost.flow import draw_sigmas
from models.bifrost.masking import training_mask
from tests.lightning_modules.bifrost_runs import (
    pairs,
    tiny_branch,
    tiny_controlnet,
    tiny_trainer,
    write_foundations,
    write_pairs,
)
from tests.lightning_modules.keep_step import KeepStep
from tests.lightning_modules.two_processes import run_sharded

SHARDED = """
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_modules.bifrost_options import BranchShape
from lightning_modules.callbacks.latent_table import LatentTable
from tests.lightning_modules.bifrost_runs import pairs, tiny_branch, tiny_trainer

folder = Path(sys.argv[1])
module = tiny_branch(folder / "foundations", shape=BranchShape(checkpointing=True))
before = module.branch.layers[0].mlp.up_proj.weight.detach().clone()
strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
options = dict(strategy=strategy, devices=2, precision="bf16-mixed", val_check_interval=1)
options |= dict(callbacks=[LatentTable((1, None), (1.0,), queries=4, gallery=8)])
trainer = tiny_trainer(folder, 3, **options)
data = pairs(folder / "pairs")
trainer.fit(module, data)
weight = module.branch.layers[0].mlp.up_proj.weight
assert isinstance(weight, DTensor)
assert not torch.equal(weight.full_tensor().cpu(), before)
assert trainer.callback_metrics["val/mse"].isfinite()
assert all(p.requires_grad is False for p in module.foundation.language_model.model.parameters())
trainer.test(module, data, verbose=False)
(folder / f"rank{trainer.global_rank}.txt").write_text("done")
"""


def branch_loss(module: BifrostBranch, batch: Any, rank: int) -> torch.Tensor:  # noqa: ANN401
    """The first step's loss on one rank's share, written out by hand."""
    latents, text = module.latents(batch), module.text(batch)
    mask = training_mask(len(latents), 4, keyed_generator(0, NOISE, 0, 0, rank))
    return module._loss(latents, mask, text, latents)


def controlnet_loss(
    module: BifrostControlNet,
    batch: Any,  # noqa: ANN401
    rank: int,
) -> torch.Tensor:
    """As `branch_loss`."""
    clean, condition = module._inputs(batch)
    generator = device_generator(torch.device("cpu"), 0, NOISE, 0, 0, rank)
    sigmas = draw_sigmas(len(clean), module.sigmas, generator)
    noise = torch.empty_like(clean).normal_(generator=generator)
    return module._loss(clean, noise, sigmas, condition).mean()


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["branch", "controlnet"])
def test_gradients_equal_one_process_with_the_global_batch(stage: str, tmp_path: Path) -> None:
    folder, root = write_foundations(tmp_path / "f"), write_pairs(tmp_path / "p")
    make: Any = tiny_branch if stage == "branch" else tiny_controlnet
    loss: Any = branch_loss if stage == "branch" else controlnet_loss
    options = {"strategy": "ddp_fork", "devices": 2, "callbacks": [KeepStep(tmp_path)]}
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0, **options)
    trainer.fit(make(folder), pairs(root, caption_dropout=0.3))
    batches = [torch.load(tmp_path / f"batch{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not set(batches[0]["index"].tolist()) & set(batches[1]["index"].tolist())
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = make(folder)
    start = torch.load(tmp_path / "weights.pt", weights_only=True)
    alone.load_state_dict(start)
    alone.train()
    losses = [loss(alone, batch, rank) for rank, batch in enumerate(batches)]
    torch.stack(losses).mean().backward()
    for name, parameter in alone.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(gradients[name], expected, atol=1e-6, rtol=1e-3, msg=name)
    if stage == "branch":  # both ranks' samples, of which each read its own share
        with torch.no_grad():
            shares = list(pairs(root).train_eval_dataloader())
            whole = torch.cat([alone.latents(batch) for batch in shares])
        assert_close(start["latent_mean"], whole.mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_sharded_branch_trains_validates_and_is_tested(tmp_path: Path) -> None:
    """FSDP2 over two CPU processes."""
    write_foundations(tmp_path / "foundations")
    write_pairs(tmp_path / "pairs")
    run_sharded(SHARDED, tmp_path, seconds=300)
    assert (tmp_path / "bifrost" / "latents.json").is_file()
