"""Groups of options of Concerto's pre-training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

_Options = TypeVar("_Options")


@dataclass(frozen=True)
class ConcertoOptimisation:
    """AdamW on all parameters alike; one-cycle rate and momentum, cosine weight decay, by step.

    Attributes:
        lr: Highest learning rate of the last block and of all that is no block.
        layer_decay: Factor on the rate for each encoder block further from the last one.
        weight_decay: Decay at the first and at the last step, of every parameter, biases and norms
            included.
        warmup_share: Share of the steps in which the rate rises.
        start_divisor: Highest rate over that of the first step.
        end_divisor: Rate of the first step over that of the last.
        cycle_momentum: Whether beta1 falls from .95 to .85 while the rate rises, and back, as the
            released training does; else it stays .9.
    """

    lr: float = 4e-3
    layer_decay: float = 0.9
    weight_decay: tuple[float, float] = (0.04, 0.2)
    warmup_share: float = 0.05
    start_divisor: float = 10.0
    end_divisor: float = 1000.0
    cycle_momentum: bool = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be > 0 (model.optimisation.lr)")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay={self.layer_decay}: must be in (0, 1] "
                "(model.optimisation.layer_decay)"
            )
        if not 0 < self.warmup_share < 1:
            raise ValueError(
                f"warmup_share={self.warmup_share}: must be in (0, 1) "
                "(model.optimisation.warmup_share)"
            )


@dataclass(frozen=True)
class ConcertoCourse:
    """What changes in the course of pre-training, from the first value to the second.

    Attributes:
        mask_size: Side of a masked cell, in metres.
        mask_ratio: Share of the cells that is masked.
        teacher_temperature: Of the Sinkhorn targets.
        momentum: Of the teacher's moving average; half a cosine over all steps.
        warmup_share: Share of the steps after which all but the momentum have their second value.
    """

    mask_size: tuple[float, float] = (0.1, 0.4)
    mask_ratio: tuple[float, float] = (0.3, 0.7)
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    momentum: tuple[float, float] = (0.994, 1.0)
    warmup_share: float = 0.05

    def __post_init__(self) -> None:
        if min(self.mask_size) <= 0:
            raise ValueError(
                f"mask_size={tuple(self.mask_size)}: must be metres > 0 (model.course.mask_size)"
            )
        if not all(0 <= value <= 1 for value in (*self.mask_ratio, *self.momentum)):
            raise ValueError(
                f"mask_ratio={tuple(self.mask_ratio)}, momentum={tuple(self.momentum)}: "
                "must be in [0, 1] (model.course)"
            )
        if min(self.teacher_temperature) <= 0:
            raise ValueError(
                f"teacher_temperature={tuple(self.teacher_temperature)}: must be > 0 "
                "(model.course.teacher_temperature)"
            )


def rebuilt(kind: type[_Options], value: _Options | dict[str, Any]) -> _Options:
    """A checkpoint hands a dataclass back as a plain dictionary."""
    return kind(**value) if isinstance(value, dict) else value
