"""When a training step's values reach the loggers."""

from lightning.pytorch import Trainer


def is_log_step(trainer: Trainer, step: int | None = None) -> bool:
    """Say whether the loggers get the values of a training step.

    A logged value costs half a millisecond, so steps whose values nobody will see log none. Values
    of another step must not be logged in their place either: they would be written as this one's.

    Args:
        trainer: In training.
        step: Optimiser steps before this one; by default those made so far.
    """
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    step = trainer.global_step if step is None else step
    return interval > 0 and (step + 1) % interval == 0
