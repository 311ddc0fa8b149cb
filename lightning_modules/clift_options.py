"""Groups of options that both training stages of CLiFT share."""

from dataclasses import dataclass
from pathlib import Path

from lightning_modules.metrics.perceptual import PerceptualKind


@dataclass(frozen=True)
class CliftLoss:
    """Loss on rendered pictures: mean squared error plus a weighted perceptual term.

    Attributes:
        perceptual: vgg19 is the paper's and needs ``weights``; efficientnet_lite0 is installed.
        weights: File of VGG19's weights: torchvision's .pth or the MatConvNet .mat.
        weight: Weight of the perceptual term.
    """

    perceptual: PerceptualKind = "none"
    weights: Path | None = None
    weight: float = 0.5


@dataclass(frozen=True)
class CliftOptimisation:
    """AdamW, or Muon on the transformers' matrices, with warm-up and cosine by step.

    Attributes:
        lr: Highest learning rate.
        weight_decay: Decay of all parameters, norms and biases included.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        beta2: AdamW's second momentum coefficient.
        muon_lr: Highest rate of Muon on the transformers' matrices (ours; fewer steps at demo
            scale); null trains them by AdamW, as the paper does.
    """

    lr: float = 4e-4
    weight_decay: float = 0.05
    warmup_steps: int = 2500
    beta2: float = 0.95
    muon_lr: float | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be > 0 (model.optimisation.lr)")
