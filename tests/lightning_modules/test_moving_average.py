"""The moving average of the weights is Lightning's, in fewer operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from tiny_pair import TinyData, TinyModel
from torch import Tensor

from lightning_modules.callbacks.moving_average import MovingAverage


def averaged(callback: WeightAveraging) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Averaged weights, which training ends with, and the trained ones beside them."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_steps=6, accelerator="cpu", callbacks=[callback], limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    model = TinyModel()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, TinyData())
    return model.state_dict(), before


def test_it_is_lightnings_average() -> None:
    ours, before = averaged(MovingAverage(decay=0.7))
    theirs, _ = averaged(EMAWeightAveraging(decay=0.7))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(value, before[name], atol=1e-4), name
    trained, _ = averaged(MovingAverage(decay=0.0))
    assert any(not torch.allclose(value, trained[name], atol=1e-4) for name, value in ours.items())


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay=1.5: must be in \[0, 1\] \(MovingAverage.decay\)"):
        MovingAverage(decay=1.5)
