"""The exponential moving average of the weights, brought up to date in one call a step."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

from lightning_modules.weight_average import WeightAverage, load_whole_state


class MovingAverage(WeightAveraging):
    """Average weights follow the trained ones after every optimiser step.

    The same average as that of Lightning's EMAWeightAveraging, in files of the same layout, with
    two differences: it is updated in one operation (one parameter after the other takes a twentieth
    of a step of FARMER's demo on a CPU), and it works on weights that FSDP2 has sharded. Validation
    and test use the average; files of a run hold both.

    Args:
        decay: Share of the old average that is kept in each step, in [0, 1].
        device: Where the average is kept; null takes the model's own.

    Raises:
        ValueError: If the decay is out of range.
    """

    _average_model: WeightAverage | None  # type: ignore[assignment]

    def __init__(self, decay: float = 0.999, device: str | None = None) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: must be in [0, 1] (MovingAverage.decay)")
        super().__init__(device=None if device is None else torch.device(device))
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait: the weights are not yet what they will be."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the weights that training starts with."""
        average = self._average_model or self._start(pl_module)
        average.follow_device(pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the weights, and the trained weights beside it."""
        average = self._average_model
        if average is None:
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        trained = checkpoint["state_dict"]
        checkpoint["current_model_state"] = trained
        checkpoint["state_dict"] = average.state(pl_module, trained)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(average.updates)}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the loaded weights as the average, and the trained ones from beside them."""
        if not trainer.training:
            return
        average = self._start(pl_module)
        if "current_model_state" in checkpoint:
            load_whole_state(pl_module, checkpoint["current_model_state"])
            average.updates = int(checkpoint["averaging_state"]["n_averaged"])

    def _start(self, pl_module: LightningModule) -> WeightAverage:
        device = None if self._device is None else torch.device(self._device)
        self._average_model = WeightAverage(pl_module, self.decay, device)
        return self._average_model

    def _swap_models(self, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._average_model.swap(pl_module)

    def _copy_average_to_current(self, pl_module: LightningModule) -> None:
        if self._average_model is not None:
            self._average_model.copy_to(pl_module)
