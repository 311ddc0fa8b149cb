"""A loss that is not a number stops the run at its step and spoils no checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from calls import call, write_tiny
from comparison import final_state


@pytest.mark.parametrize("term", ["loss", "penalty"])
def test_stops_at_that_step(term: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    flags = ["--model.nan_at", "7", "--model.nan_term", term]
    outcome = call("fit", "--config", "tiny.yaml", "--checkpoint.every_n_train_steps", "3", *flags)
    assert outcome.code == 1
    line = outcome.err.strip().splitlines()[-1]
    assert re.match(rf"step 7 \(epoch 0\), samples \d+, \d+, \d+, \d+: {term}=nan", line)
    assert line.endswith("/checkpoints/step-00000006.ckpt")
    assert "Traceback" not in outcome.err
    weights = final_state(Path("runs/latest"))["state_dict"].values()
    assert all(torch.isfinite(tensor).all() for tensor in weights)


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite gradient can spoil the weights although the loss was finite."""
    import tiny_pair

    def spoil(self: tiny_pair.TinyModel, *_: object) -> None:
        if self.global_step == 6:
            next(self.parameters()).data.fill_(float("inf"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny_pair.TinyModel, "on_before_zero_grad", spoil)
    write_tiny(tmp_path)
    outcome = call("fit", "--config", "tiny.yaml", "--checkpoint.every_n_train_steps", "2")
    assert outcome.code == 1
    assert "not finite" in outcome.err
    kept = list(Path("runs/latest/checkpoints").resolve().glob("step-*.ckpt"))
    for file in kept:
        weights = torch.load(file, weights_only=True)["state_dict"].values()
        assert all(torch.isfinite(tensor).all() for tensor in weights)
    assert kept
