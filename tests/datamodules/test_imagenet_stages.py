"""ImageNetPixels: its use by a Trainer, and what its import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from datamodules.imagenet import ImageBatch
from datamodules.sample_requests import SampleRequest
from tests.datamodules.constant_images import small
from tests.datamodules.fixture_types import FolderData
from tests.quiet_trainings import quiet_trainer


class Recorder(LightningModule):
    """Keeps the indices of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.seen["train"].append(batch["index"].tolist())
        return self.layer(batch["image"].mean().view(1, 1)).sum()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.seen["val"].append(batch["index"].tolist())

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.seen["test"].append(batch["index"].tolist())

    def predict_step(self, batch: SampleRequest, batch_idx: int) -> Tensor:
        return batch["label"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_trainer_runs_all_stages(
    num_workers: int, tmp_path: Path, folder_data: FolderData
) -> None:
    data = small(folder_data(tmp_path), num_workers=num_workers)
    module, runner = Recorder(), quiet_trainer(tmp_path, num_sanity_val_steps=0, max_epochs=2)
    runner.fit(module, data)
    runner.test(module, data, verbose=False)
    labels = runner.predict(module, data)
    assert len(module.seen["train"]) == 2 * (35 // 4)
    assert module.seen["train"][:8] != module.seen["train"][8:]
    assert sum(module.seen["val"], []) == [*range(5), *range(5)]  # noqa: RUF017
    assert sum(module.seen["test"], []) == list(range(5))  # noqa: RUF017
    assert labels is not None
    assert torch.cat(labels).tolist() == [0, 1] * 10


def test_overfitting_sees_the_same_batch_unaugmented(
    tmp_path: Path, folder_data: FolderData
) -> None:
    module = Recorder()
    trainer = quiet_trainer(tmp_path, max_epochs=2, overfit_batches=1)
    trainer.fit(module, small(folder_data(tmp_path)))
    assert module.seen["train"] == [[0, 1, 2, 3]] * 2


def test_importing_the_datamodule_loads_nothing_heavy() -> None:
    # Lightning itself loads some of these, so only what comes on top counts.
    script = (
        "import sys, lightning.pytorch; before = set(sys.modules); import datamodules.imagenet; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(found.stdout.split())
    assert "datamodules" in loaded
    heavy = {"datasets", "transformers", "diffusers", "open_clip", "timm", "wandb", "pyarrow"}
    assert not loaded & heavy
