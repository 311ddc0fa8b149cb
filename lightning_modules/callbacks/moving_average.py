"""The exponential moving average of the weights, brought up to date in one call a step."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage(WeightAveraging):
    """Average weights follow the trained ones after every optimiser step.

    The same as Lightning's EMAWeightAveraging, which goes through the parameters one by one: on a
    CPU that is a twentieth of a step of FARMER's demo. Validation and test use the average; files
    of a run hold both.

    Args:
        decay: Share of the old average that is kept in each step, in [0, 1].
        device: Where the average is kept; null takes the model's own.

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, decay: float = 0.999, device: str | None = None) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay}: must be in [0, 1] (MovingAverage.decay)")
        place = None if device is None else torch.device(device)
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(device=place, multi_avg_fn=average)
