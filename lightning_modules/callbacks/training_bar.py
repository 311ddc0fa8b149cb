"""The progress bar of every run."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class TrainingBar(RichProgressBar):
    """Lightning's bar, which also knows the last epoch of a run that is limited by its steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        last = last_epoch(self.trainer)
        text = f"Epoch {current_epoch}" if last is None else f"Epoch {current_epoch}/{last}"
        return f"{text:{len(self.validation_description)}}"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What modules show in the bar, without the number that a logger gives the run."""
        shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown


def last_epoch(trainer: Trainer) -> int | None:
    """Number of the last epoch, counted from 0; None where there is no end."""
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(trainer.max_epochs)
    batches = trainer.num_training_batches
    if trainer.max_steps > 0 and 0 < batches < math.inf:
        steps = math.ceil(batches / trainer.accumulate_grad_batches)
        limits.append(math.ceil(trainer.max_steps / steps))
    return min(limits) - 1 if limits else None
