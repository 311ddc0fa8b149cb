"""Pictures at every n-th validation of training and once in the test."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.callbacks.run_checkpoint import is_training_validation


class ValidationRhythm(Callback):
    """Calls `draw` at the first batch of every n-th validation of training, and of the test.

    The count of validations is part of the checkpoint, so that a resumed run keeps the rhythm.

    Args:
        every_n_validations: 1 or more; 0 draws at the test only.

    Raises:
        ValueError: It is negative.
    """

    def __init__(self, every_n_validations: int) -> None:
        if every_n_validations < 0:
            raise ValueError(f"every_n_validations={every_n_validations}: must be >= 0")
        self.every_n_validations = every_n_validations
        self._validations = 0

    @abstractmethod
    def draw(self, trainer: Trainer, pl_module: LightningModule, occasion: str) -> None:
        """Draw, on every rank; ``occasion`` is "step000123" or "test"."""

    def state_dict(self) -> dict[str, Any]:
        """The number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting where the checkpoint was written."""
        self._validations = int(state_dict["validations"])

    # Weight averaging swaps its weights in when the epoch starts and out when it ends, in the
    # order of the callbacks. Before the first batch they are in whatever that order is.
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - whatever the data module yields
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw if it is time."""
        if batch_idx or dataloader_idx or not is_training_validation(trainer):
            return
        self._validations += 1
        if self.every_n_validations and self._validations % self.every_n_validations == 0:
            self.draw(trainer, pl_module, f"step{trainer.global_step:06d}")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - whatever the data module yields
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw once."""
        if not batch_idx and not dataloader_idx:
            self.draw(trainer, pl_module, "test")
