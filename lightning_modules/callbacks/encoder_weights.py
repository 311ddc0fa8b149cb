"""Writes the trained encoder of a reading network as a file that the demo's encoder takes."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.reading_encoder import ReadingEncoder
from models.token_reduction.demo_encoder import save_encoder


class EncoderWeights(Callback):
    """Writes ``<run>/demo_encoder.safetensors`` when training ends."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file; its readers stay in the checkpoint alone."""
        if not trainer.is_global_zero or is_trial(trainer):
            return
        if isinstance(pl_module, ReadingEncoder):
            path = Path(trainer.default_root_dir) / "demo_encoder.safetensors"
            save_encoder(pl_module.network, path)
