"""Writes the trained selector alone, ready to be put before a consumer of tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.token_reduction import TokenReduction
from models.token_reduction.checkpoint import save_reducer
from models.token_reduction.export import export_program


class ReducerExport(Callback):
    """Writes ``<run>/reducer/`` when training ends.

    ``selector.safetensors`` and ``config.json`` are what
    `models.token_reduction.checkpoint.load_reducer` reads; the reconstructor is no part of it.

    Args:
        tokens: If given, also ``reducer.pt2``: a program by `torch.export` that keeps this fixed
            number of tokens, for any batch.
        folder: Name of the folder in the run directory.

    Raises:
        ValueError: If the number is not positive.
    """

    def __init__(self, tokens: int | None = None, folder: str = "reducer") -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens}: must be >= 1, or null for no program")
        self.tokens, self.folder = tokens, folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files."""
        if not isinstance(pl_module, TokenReduction) or is_trial(trainer):
            return
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / self.folder
            save_reducer(folder, pl_module.reducer)
            if self.tokens is not None:
                program = export_program(pl_module.reducer, self.tokens)
                torch.export.save(program, folder / "reducer.pt2")
