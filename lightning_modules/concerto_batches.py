"""Batches of paired scenes as Concerto's network takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from datamodules.paired_2d3d.batch import PairedBatch
from datamodules.paired_2d3d.image_features import ImageFeatures
from datamodules.paired_2d3d.paired_scenes import PairedScenes
from models.concerto.clouds import PointCloud
from models.concerto.pretraining import PretrainingViews

# Images whose features are read at a time.
_AT_A_TIME = 32


def pretraining_views(batch: PairedBatch, tokens: Tensor | None) -> PretrainingViews:
    """All views of a batch.

    Args:
        batch: Of I photographs.
        tokens: (I, P, D) features of these; None if there is no loss on them.
    """
    return PretrainingViews(
        global_=_cloud(batch, "global"),
        local=_cloud(batch, "local"),
        correspondence=batch["correspondence"],
        image_number=batch["image_number"],
        image_tokens=tokens,
    )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def _cloud(batch: PairedBatch, kind: Literal["global", "local"]) -> PointCloud:
    """All views of a kind: coordinates, colour and normal side by side."""
    fields = cast("dict[str, Tensor]", batch)
    parts = [fields[f"{kind}_{part}"] for part in ("coord", "colour", "normal")]
    return PointCloud(
        coord=parts[0],
        feat=torch.cat(parts, 1),  # (N, 9)
        offset=fields[f"{kind}_offset"],
        grid_coord=None,
        origin_coord=fields[f"{kind}_origin_coord"],
    )


def training_features(
    data: PairedScenes, images: int, encode: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[Tensor]:
    """Features (I, P, D) of training images, evenly spaced; stored ones if there are any.

    Args:
        data: Data of the run.
        images: How many, about.
        encode: Features of images (I, 3, H, W) in [0, 1].
        device: Where they are wanted.
    """
    paths = data.train_image_paths()
    paths = paths[:: max(1, len(paths) // images)]
    if not paths:
        return
    if data.image_features is None:
        for batch in data.image_batches(paths):
            yield encode(batch["image"].to(device))
        return
    stored = ImageFeatures(data.image_features)
    stored.check(paths, data.patch_grid)
    # The same on every rank, which merging does not mind.
    for rows in np.array_split(np.arange(len(paths)), -(-len(paths) // _AT_A_TIME)):
        yield torch.from_numpy(stored.tokens(rows)).to(device).float()
