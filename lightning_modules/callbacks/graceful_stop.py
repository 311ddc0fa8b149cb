"""Stops training between two steps when a signal asks for it, with a checkpoint of that step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging

from lightning_modules.callbacks.run_checkpoint import (
    RunCheckpoint,
    is_followed_by_hooks,
    is_last_batch,
    is_training_validation,
)
from lightning_modules.cli.errors import StopRequested
from lightning_modules.cli.signals import StopRequests


class GracefulStop(Checkpoint):
    """Acts on a remembered signal: saves through ``checkpoint`` and raises ``StopRequested``.

    All processes of a distributed run stop at the same step, whichever of them got the signal.
    It is a ``Checkpoint`` so that Lightning calls it last, after the moving averages are updated.

    Args:
        checkpoint: Saves the training state.
        requests: Remembers the signals of this process.
    """

    def __init__(self, checkpoint: RunCheckpoint, requests: StopRequests) -> None:
        self._checkpoint = checkpoint
        self._requests = requests
        self._seen_step = -1
        self._is_saved = False
        self._requeue: Callable[..., Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, only remember signals."""
        self._requests.retake()
        self._requests.defer = True
        self._seen_step = trainer.global_step
        handler = signal.getsignal(signal.SIGUSR1)
        if callable(handler):  # Lightning's: save, then requeue the SLURM job
            self._requeue = handler
            signal.signal(signal.SIGUSR1, self._remember_requeue)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, stop at once."""
        self._requests.defer = False

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Save here, unless a validation or the end of the epoch follows this batch."""
        if trainer.global_step == self._seen_step:  # gradients are still being accumulated
            return
        self._seen_step = trainer.global_step
        number = self._agree(trainer)
        if number and not is_followed_by_hooks(trainer):
            self._checkpoint.save(trainer)
            self._is_saved = True

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Stop, now that the loggers have got what belongs to the saved step."""
        if self._is_saved:
            self._is_saved = False
            self._stop(trainer, self._agree(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop ahead of the validation, which the resumed run then makes."""
        if is_training_validation(trainer) and (number := self._agree(trainer)):
            _mark_validation_as_due(trainer)
            self._stop(trainer, number)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Break the validation off; the resumed run makes it anew.

        Processes may have different numbers of batches, so several of them cannot agree here.
        """
        if not is_training_validation(trainer) or trainer.world_size > 1:
            return
        if number := self._agree(trainer):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.on_validation_epoch_end(trainer, pl_module)  # swap the weights back
            _mark_validation_as_due(trainer)
            self._stop(trainer, number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the validation, unless the end of the epoch follows."""
        if is_training_validation(trainer) and not is_last_batch(trainer):
            number = self._agree(trainer)
            if number:
                self._stop(trainer, number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; what the epoch has logged is still to be written before stopping."""
        if self._agree(trainer):
            self._checkpoint.save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs, after what :meth:`on_train_epoch_end` has saved."""
        number = self._agree(trainer) if trainer.global_step > 0 else 0
        if number:
            self._stop(trainer, number)

    def _stop(self, trainer: Trainer, number: int) -> None:
        if number == signal.SIGUSR1 and self._requeue is not None:
            self._requests.requested = 0
            self._requeue(number, None)
            return
        self._checkpoint.save(trainer)
        raise StopRequested(number)

    def _agree(self, trainer: Trainer) -> int:
        """Return the signal that some process received, the same on all of them; 0 if none."""
        if trainer.world_size == 1:
            return self._requests.requested
        own = torch.tensor(self._requests.requested, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(own, reduce_op="max"))

    def _remember_requeue(self, number: int, _: object) -> None:
        self._requests.requested = self._requests.requested or number


def _mark_validation_as_due(trainer: Trainer) -> None:
    """Let the checkpoint look as if validation had just begun, so that resuming runs all of it."""
    progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    progress.total.ready = progress.total.started = 1
