"""Groups of options that the stages of token reduction share."""

from dataclasses import dataclass
from typing import Literal

from models.token_reduction.selector import SelectorShape


@dataclass(frozen=True)
class ReductionShape:
    """Sizes of the two transformers; width and grid are those of the encoder's tokens.

    Attributes:
        layers: Transformer layers of each (3 in the paper).
        heads: Attention heads (not in the paper: those of the encoder are usual).
        mlp_ratio: Hidden width of the feed-forward layers over the width.
        positions: learned table or fixed sines and cosines; the paper names none, but without
            positions all dropped tokens of an image are rebuilt alike.
        keep_bias: Share that an untrained selector keeps.
    """

    layers: int = 3
    heads: int = 16
    mlp_ratio: float = 4.0
    positions: Literal["learned", "sincos"] = "learned"
    keep_bias: float = 0.6

    def for_tokens(self, channels: int, grid: tuple[int, int]) -> SelectorShape:
        """Complete sizes for tokens of C channels on a grid of rows and columns."""
        return SelectorShape(
            width=channels,
            heads=self.heads,
            layers=self.layers,
            mlp_ratio=self.mlp_ratio,
            grid=grid,
            positions=self.positions,
            keep_bias=self.keep_bias,
        )


@dataclass(frozen=True)
class ReductionOptimisation:
    """AdamW, or Muon on the transformers' matrices, with warm-up and cosine by step.

    Attributes:
        lr: Highest learning rate.
        weight_decay: Decay of matrices; vectors, mask token and positions have none.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        beta2: AdamW's second momentum coefficient.
        muon_lr: Highest rate of Muon on the transformers' matrices (ours; fewer steps at demo
            scale); null trains them by AdamW.
    """

    lr: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 1000
    beta2: float = 0.95
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be > 0 (model.optimisation.lr)")
