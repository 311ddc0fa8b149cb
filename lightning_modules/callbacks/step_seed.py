"""Makes dropout and other global randomness a function of the step, not of the past."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.keyed_random import keyed_generator


class StepSeed(Callback):
    """Seeds torch's global generators from (seed, epoch, batch, rank) ahead of every batch.

    A resumed run then draws the same dropout masks as one that was never stopped, and every
    process draws its own.

    Args:
        seed: Key of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Seed for this batch."""
        key = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(keyed_generator(*key).initial_seed())
