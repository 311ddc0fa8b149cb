"""What the training stages of the demo's foundations share: optimiser, recipe and parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from datamodules.text_image.resident_pairs import ResidentPairs
from models.bifrost.demo_foundations import FluxShape, VaeShape
from models.bifrost.demo_tower import DemoLanguageShape, TowerShape

# What figures and pictures are given of, by the name that they have there.
SPLITS: dict[str, Literal["train", "test"]] = {"train": "train", "held_out": "test"}
_SHOWN = 12
_Options = TypeVar("_Options")
PartShape = TowerShape | DemoLanguageShape | VaeShape | FluxShape
Recipe = dict[str, str | int | float]


@dataclass(frozen=True)
class FoundationOptimisation:
    """AdamW with warm-up and cosine by step.

    Attributes:
        lr: Highest learning rate.
        weight_decay: Decay of matrices and kernels; vectors have none.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        beta2: AdamW's second momentum coefficient.
    """

    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    beta2: float = 0.95

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: must be > 0 (model.optimisation.lr)")


class FoundationPart(NamedTuple):
    """A trained network that is to be shipped.

    Attributes:
        name: Of its files, see `models.bifrost.demo_foundation_files`.
        network: The network.
        shape: Its sizes.
    """

    name: str
    network: nn.Module
    shape: PartShape


def resident_data(module: LightningModule) -> ResidentPairs:
    """The data module of a stage.

    Raises:
        TypeError: If it is another one.
    """
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, ResidentPairs):
        raise TypeError(
            f"{type(data).__name__}: the demo's foundations need "
            "datamodules.text_image.resident_pairs.ResidentPairs (data.class_path)"
        )
    return data


def gallery_rows(
    module: LightningModule, made: str, remake: Callable[[Tensor], Tensor]
) -> list[tuple[str, Tensor]]:
    """Rows of training and of held-out pictures, beneath each row what is made of them.

    Args:
        module: The stage.
        made: Name of the rows made.
        remake: Pictures (B, 3, S, S) in [-1, 1] -> the same.
    """
    rows = []
    for name, split in SPLITS.items():
        pictures = resident_data(module).gallery(split, _SHOWN)["image"].to(module.device)
        rows += [(name.replace("_", " "), pictures), (made, remake(pictures))]
    return rows


def training_recipe(module: LightningModule, optimisation: FoundationOptimisation) -> Recipe:
    """How a stage was trained, as its record is to tell."""
    data, trainer = resident_data(module), module.trainer
    device = module.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(module.device)
    return {
        "stage": type(module).__name__,
        "data": f"{data.source_name}, training split, {data.data_fingerprint}",
        "pairs": data.num_captions,
        "image_size": data.image_size,
        "batch_size": data.batch_size * trainer.world_size,
        "steps": trainer.global_step,
        "planned_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "seed": int(module.hparams["seed"]),
        **cast("Recipe", asdict(optimisation)),
        "device": device,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def rebuilt(kind: type[_Options], value: _Options | dict[str, Any]) -> _Options:
    """A checkpoint hands a dataclass back as a plain dictionary."""
    if not isinstance(value, dict):
        return value
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
    return kind(**plain)
