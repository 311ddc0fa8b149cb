"""Golden cases of Concerto's losses, their weights, and small views to train on."""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.concerto.clouds import PointCloud
from models.concerto.encoder import EncoderShape
from models.concerto.pretraining import PretrainingShape, PretrainingViews

GOLDENS = Path(__file__).parents[1] / "goldens" / "concerto"
TINY_ENCODER = EncoderShape(
    channels=(16, 32, 32), heads=(1, 2, 2), depths=(1, 1, 2), patch_size=32, drop_path=0.0
)
TINY = PretrainingShape(
    encoder=TINY_ENCODER,
    hidden=32,
    embed=16,
    prototypes=24,
    cluster_level=1,
    cross_level=2,
    image_channels=12,
    patch_grid=(3, 4),
)


@cache
def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case."""
    path = GOLDENS / name
    return json.loads(path.with_suffix(".json").read_text()), load_file(f"{path}.safetensors")


def rule_v1(key: str, shape: torch.Size) -> Tensor:
    """Weights of a golden case, a function of the released key and the shape."""
    if key.endswith("prototype.parametrizations.weight.original0"):
        return torch.ones(shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) >= 2:
        return noise / math.sqrt(math.prod(shape[1:]))
    is_norm = "norm" in key.lower() or key.endswith("cpe.2.weight")
    return 1 + 0.1 * noise if key.endswith("weight") and is_norm else 0.02 * noise


def fill(module: nn.Module, prefix: str = "") -> None:
    """Weights by `rule_v1`."""
    state = {key: rule_v1(prefix + key, value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict(state)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by name of parameter, those that there are."""
    named = network.named_parameters()
    return {name: value.grad for name, value in named if value.grad is not None}


def random_cloud(clouds: int, points: int, seed: int = 0, shift: float = 0.0) -> PointCloud:
    """Clouds of uneven sizes on two walls of the same room, 1.6 m wide."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [points + 7 * number for number in range(clouds)]
    origin = torch.rand(sum(sizes), 3, generator=generator) * 1.6
    wall = torch.arange(len(origin)) % 2
    origin[wall == 0, 0], origin[wall == 1, 2] = 0.0, 0.0
    coord = origin + shift + 0.002 * torch.randn(origin.shape, generator=generator)
    colour = torch.rand(origin.shape, generator=generator)
    normal = torch.eye(3)[2 * wall]
    offset = torch.tensor(sizes).cumsum(0)
    return PointCloud(coord, torch.cat([coord, colour, normal], 1), offset, None, origin)


def random_views(
    images: tuple[int, ...] = (2, 0, 1), shape: PretrainingShape = TINY, seed: int = 0
) -> PretrainingViews:
    """An item for each number of images, 2 global and 2 local views each, three images at most."""
    items = len(images)
    generator = torch.Generator().manual_seed(seed)
    global_ = random_cloud(2 * items, 60, seed)
    size = torch.tensor(shape.patch_grid, dtype=torch.float32)
    count = (len(global_.coord), 3)
    correspondence = torch.rand(*count, 2, generator=generator) * size
    correspondence[torch.rand(count, generator=generator) < 0.4] = -1.0
    tokens = torch.randn(
        sum(images), math.prod(shape.patch_grid), shape.image_channels, generator=generator
    )
    number = torch.tensor(images)
    local = random_cloud(2 * items, 25, seed + 1)
    return PretrainingViews(global_, local, correspondence, number, tokens)
