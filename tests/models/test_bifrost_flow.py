"""Rectified flow: the loss, draws of sigma and noise, and the sampler."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.bifrost.flow import (
    Condition,
    FluxText,
    SigmaDraw,
    draw_noise,
    draw_sigmas,
    flow_loss,
    predict_velocity,
)
from models.bifrost.flow_sampling import SamplingOptions, euler_sigmas, sample
from tests.models.bifrost_flux import awake_controlnet, random_inputs, small_controlnet, small_flux

GRID = (4, 4)


@torch.no_grad()
def test_loss_is_the_squared_error_of_the_velocity() -> None:
    flux = small_flux()
    controlnet = awake_controlnet(flux)
    clean, noise, sigmas, condition = random_inputs(3)
    noisy = torch.stack([(1 - s) * x + s * e for x, e, s in zip(clean, noise, sigmas, strict=True)])
    velocity = predict_velocity(flux, controlnet, noisy, sigmas, condition, GRID)
    expected = (velocity - (noise - clean)).square().mean((1, 2))
    loss = flow_loss(flux, controlnet, clean, noise, sigmas, condition, GRID)
    torch.testing.assert_close(loss, expected)
    without = flow_loss(flux, None, clean, noise, sigmas, condition, GRID)
    assert not torch.allclose(loss, without)


def test_loss_is_float32_under_bfloat16() -> None:
    flux = small_flux().bfloat16()
    controlnet = small_controlnet(small_flux()).bfloat16()
    clean, noise, sigmas, condition = random_inputs(2)
    loss = flow_loss(flux, controlnet, clean, noise, sigmas, condition, GRID)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert controlnet.controlnet_blocks[0].weight.grad.any()


def test_sigmas_follow_their_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = draw_sigmas(20_000, SigmaDraw(), generator)
    assert uniform.min() > 0
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    logits = draw_sigmas(20_000, SigmaDraw("logit_normal", 0.3, 0.8), generator).logit()
    assert float(logits.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.8, abs=0.02)
    again = [draw_sigmas(4, SigmaDraw(), torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*again)
    shifted = draw_sigmas(4, SigmaDraw(shift=3.0), torch.Generator().manual_seed(7))
    torch.testing.assert_close(shifted, 3 * again[0] / (1 + 2 * again[0]))
    with pytest.raises(ValueError, match="kind='normal'"):
        SigmaDraw("normal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift=0"):
        SigmaDraw(shift=0)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_sampler_takes_the_sigmas_of_flux(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist(), mu=mu)
    mine = euler_sigmas(28, tokens)
    torch.testing.assert_close(mine.float(), scheduler.sigmas)
    plain = euler_sigmas(4, tokens, dynamic_shift=False)
    assert plain.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_noise_of_an_item_does_not_depend_on_its_batch() -> None:
    def keyed(*seeds: int) -> Tensor:
        return draw_noise([torch.Generator().manual_seed(s) for s in seeds], (16, 16))

    assert torch.equal(keyed(3, 1, 2)[1], keyed(1)[0])
    assert not torch.equal(keyed(1), keyed(2))


@torch.no_grad()
def test_sampler_is_euler_and_reports_progress() -> None:
    flux = small_flux()
    controlnet = awake_controlnet(flux)
    _, noise, _, condition = random_inputs(2)
    options = SamplingOptions(steps=3, conditioning_scale=0.5, dynamic_shift=False)
    seen: list[tuple[int, int]] = []
    tokens = sample(
        flux,
        controlnet,
        condition,
        noise,
        GRID,
        options,
        progress=lambda *counts: seen.append(counts),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    state = noise
    for level in (3, 2, 1):
        sigmas = torch.full((2,), level / 3)
        velocity = predict_velocity(
            flux, controlnet, state, sigmas, condition, GRID, conditioning_scale=0.5
        )
        state = state - velocity / 3
    torch.testing.assert_close(tokens, state)


@torch.no_grad()
def test_guidance_leads_away_from_the_negative_condition() -> None:
    flux = small_flux()
    _, noise, _, condition = random_inputs(2)
    empty = FluxText(*(torch.zeros_like(part) for part in condition.text))
    negative = Condition(empty)
    guided = SamplingOptions(steps=1, true_guidance=2.0, dynamic_shift=False)
    plain = SamplingOptions(steps=1, dynamic_shift=False)
    toward, away = (sample(flux, None, c, noise, GRID, plain) for c in (condition, negative))
    steered = sample(flux, None, condition, noise, GRID, guided, negative)
    torch.testing.assert_close(steered, away + 2 * (toward - away))
    with pytest.raises(ValueError, match=r"^true_guidance=2.0: needs a negative condition"):
        sample(flux, None, condition, noise, GRID, guided)
    with pytest.raises(ValueError, match="steps=0"):
        SamplingOptions(steps=0)


@torch.no_grad()
def test_guidance_value_reaches_a_flux_that_embeds_it() -> None:
    flux = small_flux(guidance=True)
    _, noise, _, condition = random_inputs(2)
    weak, strong = (
        sample(flux, None, condition, noise, GRID, SamplingOptions(steps=1, guidance=value))
        for value in (1.0, 7.0)
    )
    assert not torch.allclose(weak, strong)


@torch.no_grad()
def test_sampling_runs_in_evaluation_mode_and_restores_the_mode() -> None:
    flux = small_flux()
    controlnet = awake_controlnet(flux)
    _, noise, _, condition = random_inputs(2)
    expected = sample(flux, controlnet, condition, noise, GRID, SamplingOptions(steps=2))
    controlnet.train()
    controlnet.up_sampling_block.bn1.eval()
    statistics = controlnet.up_sampling_block.bn2.running_mean.clone()
    tokens = sample(flux, controlnet, condition, noise, GRID, SamplingOptions(steps=2))
    assert torch.equal(tokens, expected)
    assert torch.equal(statistics, controlnet.up_sampling_block.bn2.running_mean)
    assert controlnet.training
    assert not controlnet.up_sampling_block.bn1.training
    assert not flux.training


def test_text_moves_and_is_selected_by_rows() -> None:
    text = FluxText(torch.rand(3, 5, 4), torch.rand(3, 4))
    chosen = text.rows(torch.tensor([2, 0])).to(torch.bfloat16)
    assert (chosen.states.shape, chosen.pooled.shape) == ((2, 5, 4), (2, 4))
    assert torch.equal(chosen.pooled[0], text.pooled[2].bfloat16())
