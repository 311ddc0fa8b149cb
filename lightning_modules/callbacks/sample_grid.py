"""Draws class-conditional samples while a model trains, and when it is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.callbacks.validation_rhythm import ValidationRhythm
from lightning_modules.pictures import draw_grid, write_png


@runtime_checkable
class DrawsSamples(Protocol):
    """A module that generates images of given classes."""

    def draw_samples(self, labels: Tensor, seed: int) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of classes (B,); equal seeds give equal images."""


class SampleGrid(ValidationRhythm):
    """Writes ``<run>/pictures/samples-step000123.png``, one class to a row, and sends it to W&B.

    The seed is the same every time, so that pictures of successive steps show the same samples.
    All ranks draw, as sharded weights need them all; rank 0 writes.

    Args:
        every_n_validations: draw at every n-th validation of training; 0 draws at the test only.
        samples_per_class: pictures in a row.
        max_classes: most rows; of more classes, evenly spaced ones are shown.
        batch_size: samples drawn at once on each device.
        seed: key of the samples' noise.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        samples_per_class: int = 10,
        max_classes: int = 10,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_validations)
        for name, value in (
            ("samples_per_class", samples_per_class),
            ("max_classes", max_classes),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name}={value}: must be >= 1")
        self.samples_per_class = samples_per_class
        self.max_classes = max_classes
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a module that cannot draw before anything is trained."""
        if not isinstance(pl_module, DrawsSamples):
            raise TypeError(
                f"{type(pl_module).__name__} has no draw_samples(labels, seed): remove SampleGrid "
                "from trainer.callbacks or add the method"
            )

    def draw(self, trainer: Trainer, pl_module: LightningModule, occasion: str) -> None:
        """Draws ``samples-<occasion>.png``."""
        names = _class_names(trainer)
        shown = torch.linspace(0, len(names) - 1, min(len(names), self.max_classes)).round().long()
        labels = shown.repeat_interleave(self.samples_per_class).to(pl_module.device)
        images = self._sample(trainer, pl_module, labels)  # (classes * samples, C, H, W)
        if not trainer.is_global_zero or is_trial(trainer):
            return
        rows_of_images = torch.split(images, self.samples_per_class)
        rows = [(names[int(label)], row) for label, row in zip(shown, rows_of_images, strict=True)]
        picture = draw_grid(rows)
        write_png(picture, Path(trainer.default_root_dir) / "pictures" / f"samples-{occasion}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                stage = "test" if trainer.testing else "val"
                logger.log_image(f"{stage}/samples", [picture], step=trainer.global_step)

    def _sample(self, trainer: Trainer, pl_module: LightningModule, labels: Tensor) -> Tensor:
        if not isinstance(pl_module, DrawsSamples):
            raise TypeError(f"{type(pl_module).__name__} has no draw_samples(labels, seed)")
        parts = []
        with trainer.precision_plugin.forward_context():
            for number, part in enumerate(torch.split(labels, self.batch_size)):
                parts.append(pl_module.draw_samples(part, self.seed + number).float().cpu())
        return torch.cat(parts)


def _class_names(trainer: Trainer) -> list[str]:
    data = getattr(trainer, "datamodule", None)
    names = getattr(data, "class_names", None)
    if not names:
        raise TypeError(
            f"{type(data).__name__} has no class_names: SampleGrid needs the classes to draw"
        )
    return [str(name) for name in names]
