"""Concerto's schedules: the released ones at every step, whatever is accumulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_modules.concerto_schedules import (
    group_rates,
    layer_group,
    layer_rates,
    linear_warmup,
)
from lightning_modules.schedules import cosine, one_cycle_momentum, one_cycle_rate

GOLDEN = Path(__file__).parents[1] / "goldens" / "concerto" / "schedules_base_1000"
DEPTHS, TOTAL = (3, 3, 3, 12, 3), 1000
SCHEDULES: dict[str, Callable[[int], float]] = {
    "momentum": lambda step: cosine(step, TOTAL, 0.994, 1.0),
    "weight_decay": lambda step: cosine(step, TOTAL, 0.04, 0.2),
    "mask_size": lambda step: linear_warmup(step, TOTAL, 0.05, 0.1, 0.4),
    "mask_ratio": lambda step: linear_warmup(step, TOTAL, 0.05, 0.3, 0.7),
    "teacher_temp": lambda step: linear_warmup(step, TOTAL, 0.05, 0.04, 0.07),
    "beta1": lambda step: one_cycle_momentum(step, TOTAL),
}


@pytest.fixture(scope="module")
def table() -> dict[str, Tensor]:
    return load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(GOLDEN.with_suffix(".json").read_text())
    return content


def assert_same(ours: list[float], golden: Tensor) -> None:
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), golden, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_has_the_released_value(name: str, table: dict[str, Tensor]) -> None:
    assert_same([SCHEDULES[name](step) for step in range(TOTAL)], table[f"out.{name}"])


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "beta1"])
def test_values_stay_after_the_last_step(name: str, table: dict[str, Tensor]) -> None:
    assert_same([SCHEDULES[name](TOTAL)], table[f"out.end_{name}"])
    assert SCHEDULES[name](TOTAL + 50) == SCHEDULES[name](TOTAL)


def test_every_group_has_the_released_rate_at_every_step(table: dict[str, Tensor]) -> None:
    rates = torch.tensor(group_rates(DEPTHS, 0.004, 0.9), dtype=torch.float64)
    shares = [one_cycle_rate(step, TOTAL) for step in range(TOTAL)]
    ours = torch.tensor(shares, dtype=torch.float64)[:, None] * rates
    torch.testing.assert_close(ours, table["out.lr"], rtol=1e-9, atol=0.0)


def test_names_fall_into_the_released_groups(description: dict[str, Any]) -> None:
    for number, group in enumerate(description["lr_groups"]):
        for before in ("", "student.backbone.enc.", "network.student.backbone.enc."):
            name = f"{before}{group['keyword']}mlp.0.fc1.weight"
            assert layer_group(name, DEPTHS) == 1 + number
            assert layer_rates([(name, nn.Parameter())], DEPTHS, 0.004, 0.9) == [
                pytest.approx(group["lr"], rel=1e-12)
            ]


@pytest.mark.parametrize(
    "name",
    [
        "student.backbone.embedding.stem.linear.weight",
        "student.backbone.enc.enc1.down.proj.weight",
        "student.mask_head.mlp.0.weight",
        "patch_proj.bias",
        "backbone.dec.dec3.block1.attn.qkv.weight",
    ],
)
def test_what_is_no_encoder_block_has_the_full_rate(name: str) -> None:
    assert layer_group(name, DEPTHS) == 0
    assert layer_rates([(name, nn.Parameter())], DEPTHS, 0.004, 0.9) == [0.004]


@pytest.mark.parametrize("name", ["enc5.block0.weight", "enc.enc0.block3.cpe.1.bias"])
def test_block_that_the_encoder_has_not_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: no block of an encoder of depths"):
        layer_group(name, DEPTHS)


@pytest.mark.parametrize("total", [1, 2, 5, 19, 20, 39, 41])
def test_short_trainings_have_finite_rates(total: int) -> None:
    rates = [one_cycle_rate(step, total) for step in range(total + 2)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[total] == rates[max(total - 1, 1)]
    warm = [linear_warmup(step, total, 0.05, 0.1, 0.4) for step in range(total)]
    assert all(0.1 <= value <= 0.4 for value in warm)
    assert total < 40 or (warm[0], warm[-1]) == (0.1, 0.4)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.95])
def test_the_curve_is_that_of_torch(share: float) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], betas=(0.9, 0.999))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.0, total_steps=30, pct_start=share, div_factor=7, final_div_factor=50
    )
    for step in range(30):
        rate = 2 * one_cycle_rate(step, 30, share, 7, 50)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
        beta1 = one_cycle_momentum(step, 30, share)
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(beta1, rel=1e-9)
        optimizer.step()
        if step < 29:
            scheduler.step()
