"""Training of the small frozen encoder that the token-reduction demo reads with."""

from dataclasses import asdict
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.documents.batch import DocumentBatch
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from models.token_reduction.reading import ReadingNetwork, Readings, ReadingShape

# Matrices inside the transformer's blocks, in timm's names.
_HIDDEN = r"\.blocks\."


class ReadingEncoder(LightningModule):
    """A vision transformer taught to read digits and words and to tell scenes apart.

    Supervised on the embedded pages and photographs: what stands in each region, what each token
    covers, and the scene, in the weights' order of importance. Logs ``train/loss``, ``val/ocr``
    (share of the digits and words that are read rightly), ``val/regions`` (empty regions too) and
    ``val/scene``, and the same in test.

    Args:
        shape: Sizes of the network.
        image_size: Side of the images in pixels (taken from the data).
        num_classes: What may stand in a region, nothing included (taken from the data).
        num_scenes: Kinds of scene.
        token_weight: Weight of the tokens' cross-entropy against that of the regions.
        scene_weight: Weight of the scene's cross-entropy.
        lr: Highest rate of AdamW.
        muon_lr: Highest rate of Muon on the blocks' matrices; null leaves them to AdamW.
        weight_decay: Of AdamW, on matrices.
        warmup_steps: Optimiser steps until the highest rates are reached.
        seed: Key of the run (taken from seed_everything).
    """

    def __init__(
        self,
        shape: ReadingShape = ReadingShape(),  # noqa: B008 - frozen
        image_size: int = 96,
        num_classes: int = 27,
        num_scenes: int = 16,
        token_weight: float = 1.0,
        scene_weight: float = 0.5,
        lr: float = 2e-3,
        muon_lr: float | None = 0.01,
        weight_decay: float = 0.02,
        warmup_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        shape = ReadingShape(**shape) if isinstance(shape, dict) else shape
        self.save_hyperparameters(logger=False)
        self.hparams["shape"] = asdict(shape)
        self.network = ReadingNetwork(shape, image_size, num_classes, num_scenes)
        self.ocr, self.regions, self.scene = MeanMetric(), MeanMetric(), MeanMetric()

    def training_step(self, batch: DocumentBatch, batch_idx: int) -> Tensor:
        """Weighted sum of the three cross-entropies."""
        readings: Readings = self.network(batch["image"])
        terms = {
            "train/region_ce": F.cross_entropy(readings.regions.mT, batch["region"]),
            "train/token_ce": F.cross_entropy(readings.tokens.float().mT, batch["item_token"]),
            "train/scene_ce": F.cross_entropy(readings.scenes.float(), batch["scene"]),
        }
        weights = (1.0, self.hparams["token_weight"], self.hparams["scene_weight"])
        loss = sum(
            (weight * term for weight, term in zip(weights, terms.values(), strict=True)),
            start=batch["image"].new_zeros(()),
        )
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
            self.log_dict({name: term.detach() for name, term in terms.items()})
        return loss

    def validation_step(self, batch: DocumentBatch, batch_idx: int) -> None:
        """Shares of what is told rightly."""
        self._measure(batch, "val")

    def test_step(self, batch: DocumentBatch, batch_idx: int) -> None:
        """Shares of what is told rightly."""
        self._measure(batch, "test")

    def _measure(self, batch: DocumentBatch, stage: str) -> None:
        readings: Readings = self.network(batch["image"])
        right = readings.regions.argmax(-1) == batch["region"]  # (B, R)
        self.ocr.update(right[batch["region"] > 0].float())
        self.regions.update(right.float())
        self.scene.update((readings.scenes.argmax(-1) == batch["scene"]).float())
        self.log(f"{stage}/ocr", self.ocr, prog_bar=True)
        self.log(f"{stage}/regions", self.regions)
        self.log(f"{stage}/scene", self.scene, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with Muon inside the blocks; warm-up and cosine to zero by optimiser step."""
        return warmup_cosine_steps(self, self._groups(), self.hparams["warmup_steps"], 0.95)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.hparams
        rates = (options["lr"], options["weight_decay"], options["muon_lr"])
        return parameter_groups(self.network.named_parameters(), *rates, hidden=_HIDDEN)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the configured learning rates win over those stored with the schedule."""
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
