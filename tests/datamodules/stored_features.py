"""Stored features of images that need no encoder, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.feature_origin import FeatureOrigin
from datamodules.feature_shards import shard_path, write_shard
from datamodules.loading import keyed_generator
from datamodules.token_features import FeatureBatch

ORIGIN = FeatureOrigin(
    layer=2,
    encoder="0123456789abcdef",
    attention_layer=2,
    grid=(2, 3),
    dtype="bfloat16",
    precision="32-true",
    data="fedcba9876543210",
    seed=0,
    source_name="noise",
    kind_names=("page", "photograph"),
    region_names=("nothing", "0", "1"),
    scene_names=("a", "b"),
)
CHANNELS = 8


def features(indices: Sequence[int], origin: FeatureOrigin = ORIGIN) -> dict[str, Tensor]:
    """Tensors of images, each a pure function of its index."""
    index = torch.tensor(indices)
    shape = (origin.grid[0] * origin.grid[1], CHANNELS)
    tokens = [torch.randn(shape, generator=keyed_generator(i)) for i in indices]
    tensors = {
        "tokens": torch.stack(tokens).to(getattr(torch, origin.dtype)),
        "item_token": index[:, None] * torch.arange(shape[0]),
        "cls_attention": index[:, None] / torch.arange(1.0, shape[0] + 1),
        "index": index,
        "kind": index % 2,
        "region": index[:, None] + torch.arange(4),
        "scene": index % 3,
        "complexity": index * 1.5,
    }
    if not origin.attention_layer:
        del tensors["cls_attention"]
    return tensors


def write(
    root: Path,
    *parts: Sequence[int],
    split: str = "train",
    count: int | None = None,
    origin: FeatureOrigin = ORIGIN,
    rank: int = 0,
) -> Path:
    """Write one shard for each part and return the first one's path."""
    count = count or sum(map(len, parts))
    for number, part in enumerate(parts):
        path = shard_path(root, split, rank, number)
        write_shard(path, features(part, origin), origin, split, count)
    return shard_path(root, split, rank, 0)


def same(left: FeatureBatch, right: FeatureBatch) -> bool:
    both: tuple[Any, Any] = (left, right)
    return left.keys() == right.keys() and all(torch.equal(both[0][k], both[1][k]) for k in left)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """26 training images in three shards of two ranks, and five of validation."""
    write(tmp_path, range(13, 26), rank=0, count=26)
    write(tmp_path, [3, 1, 2, 0, 12], range(4, 12), rank=1, count=26)
    write(tmp_path, range(5), split="val")
    return tmp_path
