"""Stops training at the step whose loss is not a finite number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.cli.checkpoint_files import newest_good_checkpoint
from lightning_modules.cli.errors import ReportedError
from lightning_modules.logging_steps import is_log_step

_MOST_IDS = 16


class NonFiniteError(ReportedError):
    """A loss, a loss term or a weight became NaN or infinite; exit status 1.

    Attributes:
        is_on_all_ranks: Whether every process of a distributed run raises it too.
    """

    is_on_all_ranks = True


class FiniteLoss(Callback):
    """Raises :class:`NonFiniteError` before a non-finite loss reaches the weights.

    The loss is looked at in every step, before its gradient is computed. Further terms that
    ``training_step`` returns in its dict are looked at in every step, those that it only logs
    whenever they are written to the loggers. Nothing is saved while a weight is not finite.
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._step = 0

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's own signature
        batch_idx: int,
    ) -> None:
        """Remember the batch, to name its samples if its loss is not finite."""
        self._batch = batch
        self._step = trainer.global_step

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Check the loss; all processes stop if one of them has to.

        Raises:
            NonFiniteError: If the loss is not finite on some process.
        """
        is_finite = bool(torch.isfinite(loss.detach()).all())
        if trainer.world_size > 1:
            every_rank = bool(trainer.strategy.reduce_boolean_decision(is_finite, all=True))
            if is_finite and not every_rank:
                raise NonFiniteError(f"step {trainer.global_step}: non-finite loss on another rank")
        if not is_finite:
            self._fail(trainer, {"loss": loss, **trainer.callback_metrics})

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Check the other terms of the loss.

        Raises:
            NonFiniteError: If a returned or a logged term is not finite.
        """
        terms = dict(outputs) if isinstance(outputs, Mapping) else {}
        if is_log_step(trainer, self._step):
            terms |= {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train")}
        if any(_non_finite(terms)):
            self._fail(trainer, terms)
        self._batch = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            NonFiniteError: If a parameter holds NaN or infinity.
        """
        for name, parameter in pl_module.named_parameters():
            if not torch.isfinite(parameter.detach()).all():
                where = _describe_step(self._step, trainer.current_epoch, None)
                raise NonFiniteError(f"{where}: weight {name} is not finite; {_last_good(trainer)}")

    def _fail(self, trainer: Trainer, terms: Mapping[str, Any]) -> None:
        found = ", ".join(f"{name}={value:g}" for name, value in _non_finite(terms))
        where = _describe_step(self._step, trainer.current_epoch, self._batch)
        raise NonFiniteError(f"{where}: {found} is not finite; {_last_good(trainer)}")


def _non_finite(terms: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the names and first offending values of the terms that are not finite."""
    for name, value in terms.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = value.detach()[~torch.isfinite(value.detach())]
            if bad.numel():
                yield name, float(bad.flatten()[0])


def _describe_step(step: int, epoch: int, batch: Any) -> str:  # noqa: ANN401 - any type
    text = f"step {step} (epoch {epoch})"
    if isinstance(batch, Mapping) and isinstance(batch.get("index"), Tensor):
        ids = batch["index"].flatten().tolist()
        more = ", ..." if len(ids) > _MOST_IDS else ""
        text += f", samples {', '.join(map(str, ids[:_MOST_IDS]))}{more}"
    return text


def _last_good(trainer: Trainer) -> str:
    best, _ = newest_good_checkpoint([Path(trainer.default_root_dir) / "checkpoints"])
    return f"last finite checkpoint: {best}" if best else "no checkpoint was saved before it"
