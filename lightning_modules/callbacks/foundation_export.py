"""Writes a trained part of the demo's foundations, ready to be shipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.bifrost_foundation_options import FoundationPart, Recipe
from lightning_modules.callbacks.run_checkpoint import is_trial
from models.bifrost.demo_foundation_files import save_part


@runtime_checkable
class TrainsFoundation(Protocol):
    """A module that trains parts of the demo's foundations."""

    def parts(self) -> list[FoundationPart]:
        """The trained networks."""

    def recipe(self) -> Recipe:
        """How they were trained."""

    def figures(self) -> dict[str, float]:
        """What they reach."""

    def save_texts(self, folder: Path) -> None:
        """Write what is no weights, such as a tokenizer."""


class FoundationExport(Callback):
    """Measures the trained parts and writes ``<run>/foundations/`` when training ends.

    Each part is a file of weights and a record with sizes, recipe and figures, as
    `models.bifrost.demo_foundation_files` reads them: copy them to ``models/bifrost/foundations``.
    The figures are logged too, as ``final/*``.

    Args:
        folder: Name of the folder in the run directory.
    """

    def __init__(self, folder: str = "foundations") -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse another module before anything is trained.

        Raises:
            TypeError: If the module trains no foundation.
        """
        if not isinstance(pl_module, TrainsFoundation):
            raise TypeError(
                f"{type(pl_module).__name__}: FoundationExport serves the stages of "
                "configs/bifrost/demo_*.yaml; remove it from trainer.callbacks"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, log and write."""
        if not isinstance(pl_module, TrainsFoundation) or is_trial(trainer):
            return
        if not trainer.is_global_zero:
            return
        pl_module.eval()
        figures = {k: v for k, v in pl_module.figures().items() if math.isfinite(v)}
        for logger in trainer.loggers:
            logger.log_metrics({f"final/{k}": v for k, v in figures.items()}, trainer.global_step)
        folder = Path(trainer.default_root_dir) / self.folder
        recipe = pl_module.recipe()
        for name, network, shape in pl_module.parts():
            save_part(folder, name, network, shape, recipe, figures)
        pl_module.save_texts(folder)
