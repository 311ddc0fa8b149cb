"""Notices a selector that keeps everything or nothing."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_modules.cli.errors import ReportedError

# Optimiser steps between two looks at whether all processes agree.
_EVERY = 10


class CollapsedError(ReportedError):
    """The selector keeps everything or nothing, and the run was told to stop then."""

    is_on_all_ranks = True


class CollapseAlarm(Callback):
    """Warns, or stops the run, when the share of kept tokens stays at 0 or 1.

    A selector that has collapsed gets next to no gradient and does not come back: a reconstruction
    error that is summed over channels, for one, makes keeping everything the best policy. Reads
    ``keep`` from what ``training_step`` returns.

    Args:
        lowest: Shares below this count as keeping nothing.
        highest: Shares above this count as keeping everything.
        patience: Optimiser steps in a row after which the alarm goes off.
        action: warn once, or stop the run with an error.

    Raises:
        ValueError: If a limit or the patience is out of range.
    """

    def __init__(
        self,
        lowest: float = 0.01,
        highest: float = 0.99,
        patience: int = 500,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if not 0 <= lowest < highest <= 1:
            raise ValueError(
                f"lowest={lowest}, highest={highest}: must be 0 <= lowest < highest <= 1"
            )
        if patience < 1:
            raise ValueError(f"patience={patience}: must be >= 1")
        self.lowest, self.highest, self.patience, self.action = lowest, highest, patience, action
        self._collapsed = 0
        self._warned = False

    def state_dict(self) -> dict[str, int]:
        """Steps of the present collapse, so that a resumed run goes on counting."""
        return {"collapsed": self._collapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._collapsed = int(state_dict["collapsed"])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Look at the share kept in this step.

        Raises:
            CollapsedError: If the selector has collapsed and the run is to stop.
        """
        keep = float(outputs["keep"])
        self._collapsed = 0 if self.lowest <= keep <= self.highest else self._collapsed + 1
        if trainer.global_step % _EVERY or self._warned:
            return
        if not trainer.strategy.reduce_boolean_decision(self._collapsed >= self.patience):
            return
        message = (
            f"keep={keep:.3f} for {self.patience} steps: the selector keeps "
            f"{'nothing' if keep < self.lowest else 'everything'}; expected a share between "
            f"{self.lowest} and {self.highest}. Check model.price and model.floor, or lower the "
            "learning rate"
        )
        if self.action == "stop":
            raise CollapsedError(message)
        self._warned = True
        rank_zero_warn(message)
