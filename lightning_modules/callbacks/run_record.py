"""Writes what a run is: its configuration beside its results, and its origin into checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.cli.csv_logger import RunCSVLogger
from lightning_modules.cli.run_directory import RunDirectory, point_latest

ORIGIN_KEY = "quintet"


class RunRecord(Callback):
    """Keeps config.yaml, the configuration shown by W&B and the checkpoints' origin in step.

    Args:
        run: The run directory.
        runs_dir: Parent of all runs, in which ``latest`` points to the run that trained last.
        config_text: The configuration as YAML, loadable with ``--config``.
        resolved: The same with every linked value filled in, for Weights & Biases.
    """

    def __init__(
        self, run: RunDirectory, runs_dir: Path, config_text: str, resolved: dict[str, Any]
    ) -> None:
        self._run = run
        self._runs_dir = runs_dir
        self._config_text = config_text
        self._resolved = resolved

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration; an earlier, different one of the same run is kept beside it."""
        if not trainer.is_global_zero or is_trial(trainer):
            return
        if stage == "fit" or self._run.is_new:
            _replace(self._run.config, self._config_text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update(self._resolved, allow_val_change=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Point ``latest`` here; drop the logged rows that a resumed run will write again."""
        if trainer.is_global_zero and not is_trial(trainer):
            point_latest(self._runs_dir, self._run)
        for logger in trainer.loggers:
            if isinstance(logger, RunCSVLogger):
                logger.rewind(trainer.global_step)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Number the logged rows by optimiser steps.

        Lightning's own counter is one too high after some resumes at the end of an epoch.
        """
        if pl_module.automatic_optimization:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record which classes the checkpoint belongs to."""
        data = getattr(trainer, "datamodule", None)
        checkpoint[ORIGIN_KEY] = {"model": class_path(pl_module), "data": class_path(data)}


def class_path(instance: object) -> str:
    """Return the module and name of the class of an object."""
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _replace(file: Path, text: str) -> None:
    if file.is_file():
        earlier = file.read_text(encoding="utf-8")
        if earlier == text:
            return
        number = 1 + len(list(file.parent.glob("config.before-*.yaml")))
        file.with_name(f"config.before-{number}.yaml").write_text(earlier, encoding="utf-8")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
