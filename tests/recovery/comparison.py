"""Whether two runs ended in the same state, bit for bit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch


def final_state(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run."""
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return state


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the step, all weights (also the averaged ones) and the optimiser states."""
    first, second = final_state(one), final_state(other)
    assert first["global_step"] == second["global_step"] > 0
    for name in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        assert (name in first) == (name in second), name
        _assert_equal(first.get(name), second.get(name), name)


def rows(run: Path) -> list[dict[str, str]]:
    """Return the rows of the metrics of a run."""
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def _assert_equal(one: object, other: object, path: str) -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert one.keys() == other.keys(), path
        for key in one:
            _assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):  # a sharded optimiser gives back lists for tuples
        assert isinstance(other, (list, tuple))
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_equal(a, b, f"{path}[{number}]")
    else:
        assert one == other, path
