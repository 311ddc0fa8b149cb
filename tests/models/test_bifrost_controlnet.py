"""The latent ControlNet: golden case, sizes, zero start, gradients and its configuration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from models.bifrost.controlnet import LatentFluxControlNet, check_fits
from models.bifrost.flow import flow_loss, predict_velocity
from tests.models.bifrost_flux import (
    GOLDENS,
    awake_controlnet,
    fill,
    random_inputs,
    read_case,
    small_controlnet,
    small_flux,
)

# float32 noise of the official code is 1.8e-6 by its own measurement
TOLERANCE = 1e-5
DEV_SIZES: dict[str, Any] = {"guidance_embeds": True}  # all others are diffusers' defaults


class ReferenceSines(nn.Module):
    """Sines of time and guidance as the golden cases' machine rounded their frequencies.

    Processors round a few of the 128 exponentials to another neighbour. Times of up to 1,000 and
    guidance of 3,500 make angles of that which are off by 2e-4, and FLUX's output by 5e-5. The
    cases' machine rounded all to the nearest but one.
    """

    def __init__(self) -> None:
        super().__init__()
        exponents = -math.log(10000) * torch.arange(128, dtype=torch.float32) / 128
        self.frequencies = exponents.double().exp().float()
        self.frequencies[12] = torch.nextafter(self.frequencies[12], torch.tensor(1.0))

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None].float() * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


def golden_networks(config: dict[str, Any]) -> tuple[FluxTransformer2DModel, LatentFluxControlNet]:
    """FLUX and ControlNet of a golden case."""
    flux = FluxTransformer2DModel(**config["flux"]).eval()
    sizes = config["controlnet"]
    controlnet = LatentFluxControlNet.from_transformer(
        flux,
        latent_channels=sizes["cond_dim"],
        num_layers=sizes["num_layers"],
        num_single_layers=sizes["num_single_layers"],
    )
    fill(flux)
    fill(controlnet)
    for network in (flux, controlnet):
        embeddings: Any = network.time_text_embed
        embeddings.time_proj = ReferenceSines()
    return flux, controlnet.eval()


def check_golden(name: str) -> None:
    """Compare a golden case with what the networks say."""
    description, case = read_case(name)
    config = description["config"]
    flux, controlnet = golden_networks(config)
    names = ("encoder_hidden_states", "pooled_projections", "timestep", "txt_ids", "img_ids")
    shared = {key: case[key] for key in (*names, "guidance")}
    hidden, latents = case["hidden_states"], case["controlnet_cond"]

    def compare(mine: Tensor, key: str) -> None:
        assert mine.shape == case[key].shape, key
        torch.testing.assert_close(mine, case[key], atol=TOLERANCE, rtol=TOLERANCE, msg=key)

    up = controlnet.up_sampling_block(latents)
    compare(up[..., : case["expected_upsampled"].shape[-1]], "expected_upsampled")
    compare(controlnet.controlnet_x_embedder(up), "expected_control_embed")
    scale = config["controlnet"]["conditioning_scale"]
    double, single = controlnet(
        hidden, latents, conditioning_scale=scale, return_dict=False, **shared
    )
    for number, residual in enumerate(double):
        compare(residual, f"expected_block_sample.{number}")
    for number, residual in enumerate(single):
        compare(residual, f"expected_single_block_sample.{number}")
    compare(flux(hidden, return_dict=False, **shared)[0], "expected_flux_no_control")
    steered = flux(
        hidden,
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        return_dict=False,
        **shared,
    )
    compare(steered[0], "expected_flux_with_control")


@torch.no_grad()
def test_residuals_and_flux_match_the_official_code() -> None:
    check_golden("controlnet_c48")


@pytest.mark.slow  # 0.7 GB of weights
@torch.no_grad()
def test_released_width_matches_the_official_code() -> None:
    check_golden("controlnet_c3584")


def test_sines_are_those_of_diffusers_up_to_rounding() -> None:
    stock: Any = small_flux(guidance=True).time_text_embed
    times = torch.tensor([0.25, 0.8, 3.5]) * 1000
    difference = (stock.time_proj(times) - ReferenceSines()(times)).abs()
    # Two neighbours of a frequency below 1 are 6e-8 apart; the angle is rounded once more.
    assert bool((difference.amax(1) <= 2.5e-7 * times).all())


def meta_controlnet(double: int, single: int) -> LatentFluxControlNet:
    """ControlNet of FLUX.1-dev's sizes without memory."""
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**DEV_SIZES, num_layers=1, num_single_layers=1)
        return LatentFluxControlNet.from_transformer(
            flux,
            num_layers=double,
            num_single_layers=single,
            load_weights_from_transformer=False,
        )


@pytest.mark.parametrize(("double", "single", "billions"), [(4, 1, 1.771), (1, 4, 1.176)])
def test_size_on_flux_dev(double: int, single: int, billions: float) -> None:
    count = sum(p.numel() for p in meta_controlnet(double, single).parameters())
    assert round(count / 1e9, 3) == billions


def test_keys_are_those_of_the_release() -> None:
    official = json.loads((GOLDENS / "official_controlnet_keys.json").read_text())
    controlnet = meta_controlnet(1, 4)
    assert sorted(controlnet.state_dict()) == sorted(official)
    assert controlnet.controlnet_x_embedder.weight.shape == (3072, 3584)


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5])
@torch.no_grad()
def test_fresh_controlnet_leaves_flux_bit_identical(scale: float) -> None:
    flux = small_flux()
    latents = int(16 / scale**2)
    clean, _, sigmas, condition = random_inputs(2, latents=latents)
    controlnet = small_controlnet(flux, scale).eval()
    alone = predict_velocity(flux, None, clean, sigmas, condition, (4, 4))
    steered = predict_velocity(flux, controlnet, clean, sigmas, condition, (4, 4))
    assert torch.equal(steered, alone)
    nn.init.ones_(controlnet.controlnet_blocks[0].bias)
    moved = predict_velocity(flux, controlnet, clean, sigmas, condition, (4, 4))
    assert not torch.allclose(moved, alone)


def test_gradient_reaches_every_parameter_within_three_steps() -> None:
    flux = small_flux(guidance=True)
    controlnet = small_controlnet(flux).train()
    optimiser = torch.optim.SGD(controlnet.parameters(), lr=0.5)
    reached: list[set[str]] = []
    for step in range(3):
        clean, noise, sigmas, condition = random_inputs(4, seed=step)
        optimiser.zero_grad()
        flow_loss(flux, controlnet, clean, noise, sigmas, condition, (4, 4)).mean().backward()
        named = controlnet.named_parameters()
        reached.append({name for name, p in named if p.grad is not None and p.grad.any()})
        optimiser.step()
    everything = {name for name, _ in controlnet.named_parameters()}
    # The biases before a BatchNorm cancel out, and nothing but noise of rounding reaches them.
    cancelled = {"up_sampling_block.upconv.bias", "up_sampling_block.conv.bias"}
    assert all(name.startswith("controlnet_") for name in reached[0])
    assert "controlnet_x_embedder.weight" not in reached[0]
    assert "controlnet_x_embedder.weight" in reached[1]
    assert reached[0] | reached[1] | reached[2] | cancelled == everything
    assert all(p.grad is None for p in flux.parameters())


def test_starts_from_copies_of_the_first_blocks() -> None:
    flux = small_flux()
    controlnet = small_controlnet(flux)
    theirs, own = flux.state_dict(), controlnet.state_dict()
    shared = [key for key in own if key in theirs]
    assert all(torch.equal(own[key], theirs[key]) for key in shared)
    rest = {key.split(".")[0] for key in own if key not in theirs}
    assert rest == {
        "controlnet_x_embedder",
        "controlnet_blocks",
        "controlnet_single_blocks",
        "up_sampling_block",
    }
    own["x_embedder.weight"].zero_()  # copies, not the same memory
    assert theirs["x_embedder.weight"].any()
    with pytest.raises(ValueError, match="num_layers=4: FLUX has 3 blocks"):
        LatentFluxControlNet.from_transformer(flux, latent_channels=8)


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_configuration_survives_saving(tmp_path: Path, scale: float) -> None:
    controlnet = small_controlnet(small_flux(guidance=True), scale)
    fill(controlnet)
    controlnet.save_pretrained(tmp_path)
    loaded = LatentFluxControlNet.from_pretrained(tmp_path)
    assert (loaded.config["latent_channels"], loaded.config["scale"]) == (8, scale)
    assert loaded.config["guidance_embeds"] is True
    state = loaded.state_dict()
    assert list(state) == list(controlnet.state_dict())
    assert all(torch.equal(state[k], v) for k, v in controlnet.state_dict().items())


@torch.no_grad()
def test_grids_that_do_not_fit_are_named() -> None:
    flux = small_flux()
    clean, _, sigmas, condition = random_inputs(2, latents=16)
    with pytest.raises(ValueError, match=r"^latents N=16: scale=2.0 makes 64 tokens .* has 16; "):
        predict_velocity(flux, small_controlnet(flux), clean, sigmas, condition, (4, 4))
    with pytest.raises(ValueError, match=r"^grid=\(4, 5\): expected h \* w = 16"):
        predict_velocity(flux, None, clean, sigmas, condition, (4, 5))
    oblong = condition._replace(latents=condition.latents[:, :4], latent_grid=(1, 4))
    steered = predict_velocity(flux, awake_controlnet(flux), clean, sigmas, oblong, (2, 8))
    square = predict_velocity(
        flux, awake_controlnet(flux), clean, sigmas, oblong._replace(latent_grid=None), (2, 8)
    )
    assert not torch.allclose(steered, square)


def test_networks_of_other_sizes_do_not_fit() -> None:
    flux = small_flux()
    check_fits(small_controlnet(flux), flux)
    with pytest.raises(ValueError, match="guidance_embeds=False: FLUX has True"):
        check_fits(small_controlnet(flux), small_flux(guidance=True))
