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
