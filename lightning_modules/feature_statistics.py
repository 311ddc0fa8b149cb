"""Statistics of features that every process saw a part of."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from models.layers.standardiser import FeatureStandardiser


def merge_statistics(own: FeatureStandardiser, world_size: int) -> None:
    """Join the statistics of all ranks; every rank ends with the same ones.

    Args:
        own: This rank's, changed in place.
        world_size: Number of processes; 1 leaves everything as it is.
    """
    if world_size == 1:
        return
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, {k: v.cpu() for k, v in own.state_dict().items()})
    merged = FeatureStandardiser(len(own.mean))
    for state in states:
        part = FeatureStandardiser(len(own.mean))
        part.load_state_dict(state)
        merged.merge(part)
    own.load_state_dict(merged.state_dict())
