"""Options of segmenting point clouds."""

from __future__ import annotations

from dataclasses import dataclass

from models.concerto.segmenter import ProbeMode


@dataclass(frozen=True)
class SegmentationOptimisation:
    """AdamW on all that is trained; one-cycle rate and momentum by optimiser step.

    Attributes:
        lr: Highest learning rate.
        block_factor: Factor on the rate of attention blocks in full fine-tuning.
        weight_decay: Decay of every parameter.
        warmup_share: Share of the steps in which the rate rises.
        start_divisor: Highest rate over that of the first step.
        end_divisor: Rate of the first step over that of the last.
        lovasz: Weight of the Lovász-softmax loss beside cross-entropy.
    """

    lr: float = 2e-3
    block_factor: float = 0.1
    weight_decay: float = 0.02
    warmup_share: float = 0.05
    start_divisor: float = 10.0
    end_divisor: float = 1000.0
    lovasz: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "block_factor", "start_divisor", "end_divisor"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}={value}: must be > 0 (model.optimisation.{name})")
        for name in ("weight_decay", "lovasz"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}={value}: must be >= 0 (model.optimisation.{name})")
        if not 0 < self.warmup_share < 1:
            raise ValueError(
                f"warmup_share={self.warmup_share}: must be in (0, 1) "
                "(model.optimisation.warmup_share)"
            )


def check_probe(
    num_classes: int, mode: ProbeMode, standardise: bool, cache_features: bool, varying: bool
) -> None:
    """Refuse options of `PointSegmentation` that contradict each other.

    Args:
        num_classes: Number of classes.
        mode: What is trained.
        standardise: Whether features are standardised.
        cache_features: Whether they are kept.
        varying: Whether the encoder's result varies from step to step.

    Raises:
        ValueError: One line with the option.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: must be >= 2 (model.init_args.num_classes)")
    if standardise and mode != "linear":
        raise ValueError("standardise=true: only for mode linear (model.init_args.standardise)")
    if cache_features and (mode != "linear" or varying):
        raise ValueError(
            "cache_features=true: features change from step to step unless mode is linear, "
            "drop_path false and shuffle_orders false (model.init_args.cache_features)"
        )
