"""Two processes over gloo: gradients of both together, targets balanced over both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.randomness import NOISE, device_generator
from models.concerto import cluster_loss
from models.concerto.pretraining import StepDraws
from models.concerto.sinkhorn import Reduce, sinkhorn_targets
from tests.lightning_modules.concerto_runs import (
    scenes,
    tiny_concerto,
    tiny_trainer,
    tree,
    without_images,
)
from tests.lightning_modules.keep_step import KeepStep

__all__ = ["tree"]  # a fixture

Targets = Callable[[Tensor, float, int, Reduce | None], Tensor]


def two_processes() -> dict[str, Any]:
    """Trainer options; a process that waits for the other in vain gives up."""
    strategy = DDPStrategy(
        start_method="fork", process_group_backend="gloo", timeout=timedelta(seconds=60)
    )
    return {"strategy": strategy, "devices": 2}


class JointTargets:
    """Targets of one process that has the matched points of all ranks.

    Called first for every term of every rank without being ready, to collect the points.
    """

    def __init__(self) -> None:
        self.points: list[list[Tensor]] = []
        self.is_ready = False

    def __call__(
        self, logits: Tensor, temperature: float, iterations: int = 3, reduce: Reduce | None = None
    ) -> Tensor:
        if not self.is_ready:
            self.points[-1].append(logits)
            return sinkhorn_targets(logits, temperature, iterations)
        rank, term = divmod(self.calls, len(self.points[0]))
        self.calls += 1
        assert torch.equal(logits, self.points[rank][term])
        parts = [points[term] for points in self.points]
        joint = sinkhorn_targets(torch.cat(parts), temperature, iterations)
        return joint.split([len(part) for part in parts])[rank]

    def begin(self) -> None:
        self.is_ready, self.calls = True, 0


def losses(module: ConcertoPretraining, batches: list[Any], joint: JointTargets) -> list[Tensor]:
    """Losses of each rank's batch in the first and only step."""
    found = []
    for rank, batch in enumerate(batches):
        if not joint.is_ready:
            joint.points.append([])
        draws = StepDraws(device_generator(torch.device("cpu"), 0, NOISE, 0, 0, rank))
        found.append(module.network(module.views(batch), module.settings(), draws).loss)
    return found


def gradients(module: ConcertoPretraining, of: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the mean of losses."""
    module.zero_grad()
    torch.stack(of).mean().backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
def test_gradients_equal_one_process_whose_targets_see_both_batches(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"limit_val_batches": 0, "callbacks": [KeepStep(tmp_path)], **two_processes()}
    module = tiny_concerto(standardise_targets=True, statistics_images=16)
    tiny_trainer(tmp_path, 1, **options).fit(module, scenes(tree))
    batches = [torch.load(tmp_path / f"batch{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert not set(batches[0]["index"].tolist()) & set(batches[1]["index"].tolist())
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = tiny_concerto(standardise_targets=True)
    alone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    joint = JointTargets()
    monkeypatch.setattr(cluster_loss, "sinkhorn_targets", joint)
    apart = gradients(alone, losses(alone, batches, joint))
    assert [len(points) for points in joint.points] == [3, 3]
    joint.begin()
    together = gradients(alone, losses(alone, batches, joint))
    assert together.keys() == found.keys()
    for name, value in together.items():
        assert_close(value, found[name], atol=1e-6, rtol=1e-3, msg=name)
    head = "network.student.mask_head.mlp.0.weight"
    assert (apart[head] - found[head]).abs().max() > 0.01 * found[head].abs().max()


class KeepRank(Callback):
    """Writes the validation's scores and the teacher of each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        teacher = {k: v for k, v in pl_module.state_dict().items() if ".teacher." in k}
        torch.save((values, teacher), self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arm", ["joint", "images only"])
def test_a_rank_without_images_holds_nobody_up(arm: str, tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "rooms")
    without_images(root, "train", 0, 2, 3, 5, 6, 7)
    without_images(root, "val", 1)
    options = {"callbacks": [KeepRank(tmp_path)], "val_check_interval": 4, **two_processes()}
    data = scenes(root, batch_size=1, eval_batch_size=1)
    tiny_trainer(tmp_path, 4, **options).fit(tiny_concerto(arm), data)
    (values, teacher), (others, same) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert_close(values, others, rtol=0, atol=0)
    assert_close(teacher, same, rtol=0, atol=0)
    assert values["val/cross"].isfinite()  # of the one room that has images
    assert values["val/loss"].isfinite()
