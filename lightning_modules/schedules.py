"""Schedules as functions of the number of completed optimiser steps."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half-cosine from ``start`` at step 0 to ``end`` at step ``total`` and beyond."""
    progress = min(max(step / max(total, 1), 0.0), 1.0)
    return (start - end) * (1 + math.cos(math.pi * progress)) / 2 + end


def warmup_cosine(step: int, total: int, warmup: int, highest: float, lowest: float) -> float:
    """Linear rise from ``lowest`` to ``highest`` over ``warmup`` steps, then cosine back.

    Args:
        step: Completed optimiser steps.
        total: Step at which the curve ends.
        warmup: Step at which ``highest`` is reached.
        highest: Largest value.
        lowest: Value at both ends.
    """
    if step < warmup:
        return lowest + (highest - lowest) * step / warmup
    return cosine(step - warmup, total - warmup, highest, lowest)


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
