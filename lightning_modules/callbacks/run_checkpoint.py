"""Checkpoints of the whole training state, taken only where training can go on exactly."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_modules.cli.errors import ConfigError


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-<n>.ckpt`` and lets ``last.ckpt`` point to the newest.

    Lightning's ModelCheckpoint may save in the middle of gradient accumulation or ahead of a
    validation that the resumed run then leaves out. This one saves after an optimiser step, after
    the validation that follows it, or at the end of the epoch, whichever comes last. It also saves
    at the end of training. Use ModelCheckpoint beside it to keep the best model of a metric.

    Args:
        every_n_train_steps: Save after this many optimiser steps; None saves by time alone.
        every_n_minutes: Save when this much time has passed; None saves by steps alone.
        keep: Number of checkpoints to keep, >= 1; two leave one to fall back to.
        dirpath: Folder of the checkpoints; None takes ``checkpoints`` in the run directory.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        every_n_minutes: float | None = 5.0,
        keep: int = 2,
        dirpath: Path | None = None,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            key = "checkpoint.every_n_train_steps"
            raise ValueError(f"every_n_train_steps={every_n_train_steps}: must be >= 1 ({key})")
        if every_n_minutes is not None and every_n_minutes < 0:
            key = "checkpoint.every_n_minutes"
            raise ValueError(f"every_n_minutes={every_n_minutes}: must be >= 0 ({key})")
        if keep < 1:
            raise ValueError(f"keep={keep}: must be >= 1 (checkpoint.keep)")
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.dirpath = dirpath
        self._saved_step = self._seen_step = -1
        self._saved_time = 0.0
        self._is_pending = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse Lightning's folders of shards, whose index only an unsafe unpickler reads.

        Raises:
            ConfigError: If the strategy would write them.
        """
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            problem = "its checkpoints can run code when read; use lightning_modules.fsdp"
            raise ConfigError("configuration", "trainer.strategy", f"{problem}.ShardedStrategy")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting from the state that training starts in."""
        self._saved_step = self._seen_step = trainer.global_step
        self._saved_time = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Save if due, unless a validation or the end of the epoch follows this batch."""
        if trainer.global_step == self._seen_step:  # gradients are still being accumulated
            return
        self._seen_step = trainer.global_step
        self._is_pending = self._is_pending or self._is_due(trainer)
        if self._is_pending and not is_followed_by_hooks(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until after this validation."""
        if self._is_pending and is_training_validation(trainer) and not is_last_batch(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was put off until the end of the epoch, and at the end of training."""
        if self._is_pending or self._is_final(trainer):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now, unless this step is saved already; to be called by all processes.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        self._is_pending = False
        step = trainer.global_step
        if step == self._saved_step or is_trial(trainer):
            return
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        path = folder / f"step-{step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            _link(folder / "last.ckpt", path.name)
            self._tidy(trainer, folder, path.name)
        trainer.strategy.barrier("RunCheckpoint.save")
        self._saved_step, self._saved_time = step, time.monotonic()

    def _tidy(self, trainer: Trainer, folder: Path, newest: str) -> None:
        """Remove old checkpoints; set aside those of a future that this run has not reached."""
        paths = sorted(folder.glob("step-*.ckpt"))
        for path in paths:
            if path.name > newest:
                path.rename(path.with_name(path.name + ".superseded"))
        for path in [path for path in paths if path.name <= newest][: -self.keep]:
            trainer.strategy.remove_checkpoint(path)

    def _is_due(self, trainer: Trainer) -> bool:
        step, every = trainer.global_step, self.every_n_train_steps
        if step == trainer.max_steps or (every is not None and step % every == 0):
            return True
        if self.every_n_minutes is None:
            return False
        is_late = time.monotonic() - self._saved_time >= 60 * self.every_n_minutes
        if trainer.world_size == 1:
            return is_late
        return bool(trainer.strategy.reduce_boolean_decision(is_late, all=False))

    def _is_final(self, trainer: Trainer) -> bool:
        last_epoch = trainer.max_epochs not in (None, -1) and (
            trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        )
        return last_epoch or trainer.should_stop or trainer.global_step == trainer.max_steps


def is_trial(trainer: Trainer) -> bool:
    """Say whether this is a ``fast_dev_run``, which leaves nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def is_training_validation(trainer: Trainer) -> bool:
    """Say whether the validation now running belongs to training and is not the sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def is_last_batch(trainer: Trainer) -> bool:
    """Say whether the batch just trained on is the last of its epoch."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def is_followed_by_hooks(trainer: Trainer) -> bool:
    """Say whether a validation or the end of the epoch comes before the next training batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return is_last_batch(trainer) or (
        fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    )


def _link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):  # a file system without links goes without last.ckpt
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
