"""Concerto's schedules as pure functions of the optimiser step, and the rates of its layers.

``step`` counts completed optimiser steps, so the value is the one in force during the step that
follows, whatever number of batches is accumulated for it. Teacher momentum and weight decay are
half-cosines (`lightning_modules.schedules.cosine`).
"""

import re
from collections.abc import Iterable, Sequence

from torch import nn

_BLOCK = re.compile(r"(?:^|\.)enc(\d+)\.block(\d+)\.")


def linear_warmup(step: int, total: int, share: float, start: float, end: float) -> float:
    """Linear from ``start`` to ``end`` over the first steps, then ``end``.

    Args:
        step: Completed optimiser steps.
        total: Optimiser steps of the training.
        share: Share of the steps in which the value changes.
        start: Value of the first step.
        end: Value of the last step of that share and of all after it.
    """
    steps = int(total * share)
    if step >= steps:
        return end
    return start + (end - start) * step / max(steps - 1, 1)


def layer_group(name: str, depths: Sequence[int]) -> int:
    """Number of the parameter's group: 0 for no encoder block, else 1 + the block's number.

    Args:
        name: Name with ``enc{stage}.block{number}.`` in it if it is of an encoder block.
        depths: Blocks of each stage of the encoder.

    Raises:
        ValueError: If the encoder has no such block.
    """
    found = _BLOCK.search(name)
    if found is None:
        return 0
    stage, block = int(found[1]), int(found[2])
    if stage >= len(depths) or block >= depths[stage]:
        raise ValueError(f"{name}: no block of an encoder of depths {tuple(depths)}")
    return 1 + sum(depths[:stage]) + block


def group_rates(depths: Sequence[int], lr: float, decay: float) -> list[float]:
    """Highest rate of each group of `layer_group`.

    Args:
        depths: Blocks of each stage of the encoder.
        lr: Rate of the last block and of all that is no block.
        decay: Factor for each block further from the last one.
    """
    blocks = sum(depths)
    return [lr, *(lr * decay ** (blocks - 1 - number) for number in range(blocks))]


def layer_rates(
    named: Iterable[tuple[str, nn.Parameter]], depths: Sequence[int], lr: float, decay: float
) -> list[float]:
    """Highest rate of each named parameter, in their order; see `group_rates`."""
    rates = group_rates(depths, lr, decay)
    return [rates[layer_group(name, depths)] for name, _ in named]
