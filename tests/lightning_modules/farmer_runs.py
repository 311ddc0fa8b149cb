"""Tiny FARMER modules and trainers for tests."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from datamodules.imagenet import ImageNetPixels
from lightning_modules.farmer import Farmer
from models.farmer.affine_block import FlowShape
from models.farmer.prior import PriorShape
from tests.quiet_trainings import quiet_trainer

FLOW = FlowShape(2, 1, 16, head_dim=16, output_norm=True, position_affine=True)
PRIOR = PriorShape(
    1,
    16,
    head_dim=16,
    class_tokens=2,
    informative_components=3,
    redundant_components=4,
    scale_activation="softplus",
    informative_floor=0.01,
    redundant_floor=0.3,
    position_embedding="learned",
)


def tiny_farmer(**changes: Any) -> Farmer:  # noqa: ANN401
    """Module for the embedded digits: 8x8 grey, 17 levels, 10 classes."""
    options: dict[str, Any] = {
        "flow": FLOW,
        "prior": PRIOR,
        "patch_size": 2,
        "informative_channels": 2,
        "image_size": 8,
        "channels": 1,
        "levels": 17,
        "num_classes": 10,
        "noise_start": 0.1,
        "noise_end": 0.02,
        "level_stretch": 0.5,
        "lr": 1e-3,
        "warmup_steps": 2,
    }
    return Farmer(**{**options, **changes})


def digits(**changes: Any) -> ImageNetPixels:  # noqa: ANN401
    """Embedded digits in batches of 16."""
    options: dict[str, Any] = {
        "embedded": "digits",
        "image_size": 8,
        "levels": 17,
        "horizontal_flip": False,
        "batch_size": 16,
    }
    return ImageNetPixels(**{**options, **changes})


def tiny_trainer(folder: Path, steps: int = 4, **changes: Any) -> Trainer:  # noqa: ANN401
    """Silent CPU trainer of a few steps."""
    options: dict[str, Any] = {
        "max_steps": steps,
        "devices": 1,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 2,
        "limit_test_batches": 2,
        "gradient_clip_val": 1.0,
    }
    return quiet_trainer(folder, **{**options, **changes})
