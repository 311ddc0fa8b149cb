"""Tiny trainings that write nothing but the checkpoint a test asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer


class SaveAt(Callback):
    """Writes a checkpoint after a number of optimiser steps."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def quiet_trainer(folder: Path, **settings: Any) -> Trainer:  # noqa: ANN401 - the trainer's own
    """CPU trainer that writes nothing of its own accord."""
    silent: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**silent, **settings})
