"""Two processes over gloo: own images and masks for each rank, gradients of both together."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from datamodules.documents import DocumentBatch
from lightning_modules.callbacks.reduction_table import ReductionTable
from lightning_modules.randomness import NOISE, device_generator
from lightning_modules.token_reduction import TokenReduction
from models.token_reduction.losses import reduction_loss
from models.token_reduction.selector import sample_mask
from tests.lightning_modules.keep_step import KeepStep
from tests.lightning_modules.reduction_runs import documents, tiny_reduction, tiny_trainer


def reference_loss(module: TokenReduction, batch: DocumentBatch, rank: int) -> torch.Tensor:
    """The first step's loss on one rank's share, written out by hand."""
    generator = device_generator(torch.device("cpu"), 0, NOISE, 0, 0, rank)
    tokens = module.reducer.standardiser(module.tokens(batch))
    mask = sample_mask(module.reducer.selector(tokens), 1.0, generator)
    floor = 0.2 + 0.3 * float(torch.rand((), generator=generator))
    return reduction_loss(module.reconstructor(tokens, mask), tokens, mask, floor)[0]


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_gradients_equal_one_process_with_the_global_batch(tmp_path: Path) -> None:
    options = {"strategy": "ddp_fork", "devices": 2, "callbacks": [KeepStep(tmp_path)]}
    trainer = tiny_trainer(tmp_path, 1, limit_val_batches=0, **options)
    trainer.fit(tiny_reduction(), documents())
    batches = [torch.load(tmp_path / f"batch{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not set(batches[0]["index"].tolist()) & set(batches[1]["index"].tolist())
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = tiny_reduction()
    alone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    seen = torch.cat([alone.tokens(batch) for batch in batches]).flatten(0, 1)
    # Both ranks' images, of which each drew 8 for the statistics.
    assert_close(alone.reducer.standardiser.mean, seen.mean(0), atol=1e-5, rtol=1e-4)
    losses = [reference_loss(alone, batch, rank) for rank, batch in enumerate(batches)]
    torch.stack(losses).mean().backward()
    for name, parameter in alone.named_parameters():
        assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-3)


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_table_of_two_processes_holds_every_method_once(tmp_path: Path) -> None:
    table = ReductionTable(
        (0.25, 1.0), methods=("random", "grid"), train_images=24, reconstructor_steps=2,
        reader_steps=2,
    )  # fmt: skip
    options = {"strategy": "ddp_fork", "devices": 2, "precision": "bf16-mixed"}
    module, data = tiny_reduction(), documents()
    tiny_trainer(tmp_path, 1, limit_val_batches=0).fit(module, data)
    tiny_trainer(tmp_path, callbacks=[table], **options).test(module, data, verbose=False)
    lines = (tmp_path / "reduction" / "reduction.csv").read_text().splitlines()[1:]
    found = [tuple(line.split(",")[:2]) for line in lines]
    names = ("selector", "selector+coverage", "random", "grid")
    assert sorted(found) == sorted((name, share) for name in names for share in ("0.25", "1.0"))
