"""Groups of options that the two training stages of Bifrost-1 share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from models.bifrost.positions import PositionKind

Options = TypeVar("Options")


@dataclass(frozen=True)
class BranchShape:
    """What of a vision branch its language model does not decide.

    Attributes:
        positions: Where image tokens stand, see `models.bifrost.positions.image_positions`.
        queries: "masked" as in the paper; "learned_2d" is the ablation whose learned queries read
            no latents, so that decoding takes one step.
        checkpointing: Recompute the layers' activations in the backward pass to save memory.
    """

    positions: PositionKind = "learned"
    queries: Literal["masked", "learned_2d"] = "masked"
    checkpointing: bool = False


@dataclass(frozen=True)
class ControlNetShape:
    """Sizes of a latent ControlNet that neither FLUX nor the latents decide.

    Attributes:
        double_layers: Double-stream blocks, copies of FLUX's first ones.
        single_layers: Single-stream blocks, likewise.
        checkpointing: Recompute activations of FLUX and ControlNet in the backward pass.
        lean_attention: Attention with fewer passes over memory, for toy sizes on a CPU; the
            numbers are the same up to rounding.
    """

    double_layers: int = 4
    single_layers: int = 1
    checkpointing: bool = False
    lean_attention: bool = False


@dataclass(frozen=True)
class BifrostOptimisation:
    """AdamW with warm-up and cosine by step.

    Attributes:
        lr: Highest learning rate.
        lowest: Share of it at both ends of the schedule.
        weight_decay: Decay of matrices; vectors, mask token and positions have none.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        beta2: Second momentum coefficient.
        muon_lr: Highest rate of Muon on the layers' matrices (ours); null leaves them to AdamW.
    """

    lr: float = 5e-4
    lowest: float = 0.03
    weight_decay: float = 0.02
    warmup_steps: int = 5000
    beta2: float = 0.95
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be > 0 (model.optimisation.lr)")
        if not 0 <= self.lowest <= 1:
            raise ValueError(f"lowest={self.lowest}: must be in [0, 1] (model.optimisation.lowest)")

    @property
    def rates(self) -> tuple[float, float, float | None]:
        """Rate, decay and Muon's rate, as `parameter_groups` takes them."""
        return self.lr, self.weight_decay, self.muon_lr

    @property
    def course(self) -> tuple[int, float, float]:
        """Warm-up, second momentum and lowest share, as `warmup_cosine_steps` takes them."""
        return self.warmup_steps, self.beta2, self.lowest


def rebuilt(kind: type[Options], value: Options | dict[str, Any]) -> Options:
    """A dataclass, which a checkpoint hands back as a plain dictionary."""
    return kind(**value) if isinstance(value, dict) else value
