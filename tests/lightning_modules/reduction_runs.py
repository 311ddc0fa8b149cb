"""Tiny token-reduction modules, data and trainers for tests."""

from typing import Any

import torch

from datamodules.documents import DocumentsAndPhotographs
from lightning_modules.token_reduction import TokenReduction
from lightning_modules.token_reduction_options import ReductionOptimisation, ReductionShape
from models.image_encoders.encoder_towers import TimmTower
from models.image_encoders.frozen_encoder import FrozenEncoder
from models.token_reduction.reading import ReadingShape, build_encoder
from tests.lightning_modules.clift_runs import tiny_trainer

__all__ = ["tiny_trainer"]

SHAPE = ReductionShape(layers=1, heads=2, mlp_ratio=2.0)
OPTIMISATION = ReductionOptimisation(lr=2e-3, warmup_steps=1, muon_lr=0.005)


def tiny_encoder(seed: int = 0) -> FrozenEncoder:
    """A random encoder of 96 x 96 pixels: 36 tokens of 16 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_encoder(ReadingShape(patch_size=16, width=16, layers=2, heads=2), 96)
    return FrozenEncoder(TimmTower(network), -1, mean=(0.5,) * 3, std=(0.5,) * 3)


def tiny_reduction(**changes: Any) -> TokenReduction:  # noqa: ANN401
    """Selector and reconstructor of one layer."""
    options: dict[str, Any] = {
        "encoder": tiny_encoder(),
        "shape": SHAPE,
        "floor": (0.2, 0.5),
        "optimisation": OPTIMISATION,
        "shares": (0.25, 0.5),
        "statistics_images": 16,
    }
    return TokenReduction(**{**options, **changes})


def documents(**changes: Any) -> DocumentsAndPhotographs:  # noqa: ANN401
    """A few pages and photographs in batches of 8."""
    options: dict[str, Any] = {
        "patch_size": 16,
        "batch_size": 8,
        "eval_batch_size": 8,
        "train_size": 64,
        "val_size": 16,
        "test_size": 24,
        "predict_count": 8,
    }
    return DocumentsAndPhotographs(**{**options, **changes})
