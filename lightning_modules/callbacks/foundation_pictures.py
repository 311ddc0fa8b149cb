"""Pictures by which one sees how far a part of the demo's foundations has come."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_modules.callbacks.run_checkpoint import is_training_validation, is_trial
from lightning_modules.pictures import draw_grid, write_png


@runtime_checkable
class DrawsRows(Protocol):
    """A module that has pictures to show."""

    def draw(self) -> list[tuple[str, Tensor]]:
        """Names and pictures (N, 3, H, W) in [-1, 1] of the rows, the same ones every time."""


class FoundationPictures(Callback):
    """Writes ``<run>/pictures/<module>-step001000.png`` and sends it to W&B.

    It draws after every validation of training and at its end. Rows of real pictures stand above
    what the module makes of them.
    """

    def __init__(self) -> None:
        self._drawn_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module that has nothing to show before anything is trained.

        Raises:
            TypeError: If so.
        """
        if not isinstance(pl_module, DrawsRows):
            raise TypeError(
                f"{type(pl_module).__name__} has no draw(): remove FoundationPictures from "
                "trainer.callbacks or add the method"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw after every validation of training."""
        if is_training_validation(trainer):
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what became of it, unless a validation has just done so."""
        if self._drawn_step != trainer.global_step:
            pl_module.eval()
            self._draw(trainer, pl_module)

    @torch.no_grad()
    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, DrawsRows) or not trainer.is_global_zero or is_trial(trainer):
            return
        self._drawn_step = trainer.global_step
        with trainer.precision_plugin.forward_context():
            rows = [(name, images.float().cpu()) for name, images in pl_module.draw()]
        picture = draw_grid(rows)
        kind = type(pl_module).__name__.lower()
        name = f"{kind}-step{trainer.global_step:06d}.png"
        write_png(picture, Path(trainer.default_root_dir) / "pictures" / name)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"val/{kind}", [picture], step=trainer.global_step)
