"""Tiny Concerto modules, paired rooms and trainers for tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.paired_2d3d import PairedScenes
from datamodules.paired_2d3d.view_options import ViewOptions
from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.concerto_options import ConcertoOptimisation
from models.concerto.encoder import EncoderShape
from models.concerto.pretraining import LossWeights, PretrainingShape
from tests.datamodules.paired_roots import paired_root
from tests.lightning_modules.clift_runs import tiny_trainer
from tests.lightning_modules.reduction_runs import tiny_encoder

__all__ = [
    "ARMS",
    "SHAPE",
    "Watcher",
    "logged",
    "scenes",
    "tiny_concerto",
    "tiny_encoder",
    "tiny_trainer",
    "tree",
    "watched_run",
    "without_images",
]

SHAPE = PretrainingShape(
    encoder=EncoderShape(
        channels=(16, 32, 32), heads=(1, 2, 2), depths=(1, 1, 1), patch_size=64, drop_path=0.0
    ),
    hidden=32,
    embed=16,
    prototypes=24,
    cluster_level=1,
    cross_level=2,
    match_radius=0.4,
)
ARMS = {
    "joint": LossWeights(),
    "3D only": LossWeights(2 / 8, 2 / 8, 4 / 8, 0),
    "images only": LossWeights(0, 0, 0, 4 / 8),
}


def tiny_concerto(arm: str = "joint", **changes: Any) -> ConcertoPretraining:  # noqa: ANN401
    """Three levels, an image encoder of 6 x 6 patches."""
    options: dict[str, Any] = {
        "shape": SHAPE,
        "encoder": tiny_encoder(),
        "weights": ARMS[arm],
        "optimisation": ConcertoOptimisation(lr=2e-3, warmup_share=0.3),
        "grid_size": 0.1,
    }
    return ConcertoPretraining(**{**options, **changes})


def scenes(root: Path | None, **changes: Any) -> PairedScenes:  # noqa: ANN401
    """Views of at most 150 points, two local ones, two rooms a batch."""
    options: dict[str, Any] = {
        "root": root,
        "grid_size": 0.1,
        "max_points": 150,
        "views": ViewOptions(local_views=2, elastic_chance=0.0, drop_colour=0.0, drop_normal=0.0),
        "patch_grid": (6, 6),
        "patch_pixels": 16,
        "batch_size": 2,
        "eval_batch_size": 2,
    }
    return PairedScenes(**{**options, **changes})


def without_images(root: Path, split: str, *numbers: int) -> None:
    """Take the images of some items of a split away."""
    file = root / "splits" / f"{split}.json"
    items = json.loads(file.read_text())
    for number in numbers:
        item = items[sorted(items)[number]]
        item["images"], item["correspondences"] = [], []
    file.write_text(json.dumps(items))


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of eight training and two validation rooms with two photographs each."""
    return paired_root(tmp_path_factory.mktemp("paired") / "rooms", train=8)


class Watcher(Callback):
    """Keeps gradients of every optimiser step, and weights after every batch."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor | None]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.rules: list[tuple[float, float]] = []
        self.steps: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer, pl_module)

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in named})

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        self._keep(trainer, pl_module)
        (group,) = {(g["weight_decay"], g["betas"][0]) for g in trainer.optimizers[0].param_groups}
        self.rules.append(group)

    def _keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        self.steps.append(trainer.global_step)


def watched_run(
    module: ConcertoPretraining, data: Any, folder: Path, steps: int = 3, **options: Any  # noqa: ANN401
) -> Watcher:  # fmt: skip
    watcher = Watcher()
    options = {"limit_val_batches": 0, "callbacks": [watcher], **options}
    tiny_trainer(folder, steps, **options).fit(module, data)
    return watcher


def logged(folder: Path, name: str) -> list[float]:
    """Values of one name in the order of steps."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index(name)
    values = [line.split(",")[column] for line in lines[1:]]
    return [float(value) for value in values if value]
