"""A model and a data module small enough to train in a test, with everything that can go wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from datamodules.loading import (
    EpochSampler,
    EvaluationSampler,
    OrderedLoader,
    ResumableLoader,
    keyed_generator,
    rank_and_world_size,
)


class TinyModel(LightningModule):
    """Regression with dropout; can be told to produce NaN or to be slow."""

    def __init__(
        self,
        width: int = 8,
        lr: float = 0.05,
        activation: Literal["relu", "gelu"] = "relu",
        image_size: int = 2,
        num_classes: int = 3,
        nan_at: int | None = None,
        nan_term: str = "loss",
        sleep: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: must be >= 1 (model.init_args.width)")
        self.save_hyperparameters(logger=False)
        self.net = nn.Sequential(
            nn.Linear(image_size * image_size, width),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(width, num_classes),
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        time.sleep(self.hparams["sleep"])
        noise_key = (self.hparams["seed"], self.current_epoch, batch_idx, self.global_rank)
        noise = torch.randn(batch["image"].shape, generator=keyed_generator(*noise_key))
        logits = self.net(batch["image"] + 0.1 * noise)
        loss = nn.functional.cross_entropy(logits, batch["label"])
        terms = {"loss": loss, "penalty": logits.detach().pow(2).mean()}
        if self.hparams["nan_at"] == self.global_step:
            terms[self.hparams["nan_term"]] = terms[self.hparams["nan_term"]] * float("nan")
        self.log("train/loss", terms["loss"])
        self.log("train/penalty", terms["penalty"])
        return terms

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        time.sleep(self.hparams["sleep"])
        loss = nn.functional.cross_entropy(self.net(batch["image"]), batch["label"])
        self.log("val/loss", loss, sync_dist=True)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/loss", nn.functional.cross_entropy(self.net(batch["image"]), batch["label"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch["image"]).argmax(1)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OtherModel(TinyModel):
    """The same network under another name: a checkpoint of it is not one of TinyModel."""


class TinyPoints(Dataset[dict[str, Tensor]]):
    """Random points with labels, augmented by noise keyed by (seed, epoch, index)."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.points = torch.randn(count, size * size, generator=generator)
        self.labels = self.points[:, 0].gt(0).long() + self.points[:, 1].gt(0).long()
        self.seed = seed

    def __len__(self) -> int:
        return len(self.points)

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        index = torch.tensor([i for i, _ in pairs])
        noise = [
            torch.randn(self.points.shape[1], generator=keyed_generator(self.seed, e, i))
            for i, e in pairs
        ]
        image = self.points[index] + 0.05 * torch.stack(noise)
        return {"image": image, "label": self.labels[index], "index": index}


class TinyData(LightningDataModule):
    """Points in the plane of ``image_size`` squared dimensions."""

    def __init__(
        self,
        root: Path | None = None,
        image_size: int = 2,
        count: int = 48,
        batch_size: int = 4,
        num_workers: int = 0,
        fail_in_setup: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be >= 1 (data.init_args.batch_size)")
        if root is not None and not root.exists():
            raise FileNotFoundError(f"root={root}: no such folder (data.init_args.root)")
        self.image_size, self.num_classes = image_size, 3
        self.count, self.batch_size, self.num_workers = count, batch_size, num_workers
        self.fail_in_setup, self.seed = fail_in_setup, seed

    def setup(self, stage: str) -> None:
        if self.fail_in_setup:
            raise {"value": ValueError, "bug": KeyError}[self.fail_in_setup](
                "labels.txt: 3 of 4 bad"
            )

    def train_dataloader(self) -> ResumableLoader:
        rank, world = rank_and_world_size(self.trainer)
        data = TinyPoints(self.count, self.image_size, self.seed)
        sampler = EpochSampler(
            len(data), self.batch_size, seed=self.seed, rank=rank, world_size=world
        )
        return ResumableLoader(data, sampler, num_workers=self.num_workers, trainer=self.trainer)

    def val_dataloader(self) -> OrderedLoader:
        rank, world = rank_and_world_size(self.trainer)
        data = TinyPoints(12, self.image_size, self.seed)
        return OrderedLoader(data, EvaluationSampler(12, 4, rank=rank, world_size=world))

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader
