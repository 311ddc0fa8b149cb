"""Concerto's schedules as pure functions of the optimiser step, and the rates of its layers.

``step`` counts completed optimiser steps, so the value is the one in force during the step that
follows, whatever number of batches is accumulated for it. Teacher momentum and weight decay are
half-cosines (`lightning_modules.schedules.cosine`).
"""

import math
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


def one_cycle_rate(
    step: int,
    total: int,
    share: float = 0.05,
    start_divisor: float = 10.0,
    end_divisor: float = 1000.0,
) -> float:
    """Learning rate over the highest one: half a cosine up, half a cosine down.

    Args:
        step: Completed optimiser steps.
        total: Optimiser steps of the training.
        share: Share of the steps in which the rate rises.
        start_divisor: Highest rate over that of the first step.
        end_divisor: Rate of the first step over that of the last.
    """
    start = 1 / start_divisor
    return _one_cycle(step, total, share, start, 1.0, start / end_divisor)


def one_cycle_momentum(
    step: int, total: int, share: float = 0.05, highest: float = 0.95, lowest: float = 0.85
) -> float:
    """AdamW's beta1: falls from ``highest`` while the rate rises, and comes back."""
    return _one_cycle(step, total, share, highest, lowest, highest)


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


def _one_cycle(step: int, total: int, share: float, start: float, peak: float, end: float) -> float:
    """Half a cosine from ``start`` to ``peak``, then one to ``end`` at the last step."""
    last = max(total - 1, 1)
    top = min(max(total * share - 1, 0.0), last)
    step = min(max(step, 0), last)
    if step <= top and top > 0:
        return _half_cosine(step / top, start, peak)
    return _half_cosine((step - top) / ((last - top) or 1), peak, end)


def _half_cosine(progress: float, start: float, end: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))
