"""The demo's autoencoder, FLUX and the files of the foundations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.demo_foundation_files import (
    FLUX,
    LANGUAGE,
    TOWER,
    VAE,
    load_flux,
    load_language_model,
    load_tower,
    load_vae,
    read_record,
    save_part,
)
from models.bifrost.demo_foundations import (
    FluxShape,
    VaeShape,
    autoencoding_loss,
    build_flux,
    build_vae,
    flux_text,
    standardised,
)
from models.bifrost.demo_tower import (
    DemoLanguageShape,
    TowerShape,
    build_language_model,
    build_tower,
)
from models.bifrost.flow import Condition, FluxText, flow_loss, predict_velocity
from models.bifrost.flux_attention import use_lean_attention
from models.bifrost.flux_latents import encode_images, image_grid
from tests.models.bifrost_flux import awake_controlnet, fill, random_inputs, small_flux

SMALL_FLUX = FluxShape(
    double_layers=1,
    single_layers=1,
    heads=2,
    head_channels=16,
    text_width=32,
    rotary_channels=(4, 6, 6),
)
SMALL_VAE = VaeShape(channels=(8, 8), shift=0.5, scale=2.0)
SMALL_TOWER = TowerShape(image_size=16, width=24, layers=1, latent_width=32)
SMALL_LANGUAGE = DemoLanguageShape(vocabulary=40, width=32, layers=1, mlp=48)


def test_sizes_are_those_of_the_recipe() -> None:
    counts = {
        "vae": build_vae(VaeShape()),
        "flux": build_flux(FluxShape()),
        "language_model": build_language_model(DemoLanguageShape()),
        "tower": build_tower(TowerShape()),
    }
    millions = {k: sum(p.numel() for p in n.parameters()) / 1e6 for k, n in counts.items()}
    expected = {"vae": 0.16, "flux": 1.82, "language_model": 0.99, "tower": 0.48}
    assert {k: round(v, 2) for k, v in millions.items()} == expected
    assert sum(millions.values()) * 2 < 8  # megabytes in float16


@pytest.mark.parametrize(
    ("size", "vae", "scale"),
    [(32, VaeShape(), 2.0), (64, VaeShape(), 2.0), (64, VaeShape((16, 32, 32), 8), 1.0)],
)
@torch.no_grad()
def test_grids_meet_at_either_image_size(size: int, vae: VaeShape, scale: float) -> None:
    grid = vae.image_grid(size)
    network = build_vae(vae).eval()
    assert image_grid(network, (size, size)) == grid
    tower = TowerShape(image_size=size)
    assert grid[0] == scale * tower.grid[0]
    channels = 4 * vae.latent_channels
    tokens = encode_images(network, torch.rand(1, 3, size, size) * 2 - 1)
    assert tokens.shape == (1, grid[0] * grid[1], channels)
    flux = build_flux(FluxShape(in_channels=channels)).eval()
    controlnet = LatentFluxControlNet.from_transformer(
        flux, latent_channels=tower.latent_width, scale=scale, num_layers=1, num_single_layers=1
    ).eval()
    condition = Condition(
        FluxText(torch.randn(1, 16, 128), torch.randn(1, 128)), torch.randn(1, tower.tokens, 128)
    )
    velocity = predict_velocity(flux, controlnet, tokens, torch.rand(1), condition, grid)
    assert velocity.shape == tokens.shape


def test_autoencoder_learns_a_picture() -> None:
    torch.manual_seed(0)
    vae = build_vae(SMALL_VAE)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 4, 4, generator=generator).repeat_interleave(4, 2) * 2 - 1
    images = images.repeat_interleave(4, 3)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = autoencoding_loss(vae, images, torch.randn(2, 4, 8, 8, generator=generator))
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        losses.append(loss)
    assert losses[-1].squared < 0.4 * losses[0].squared
    assert losses[0].divergence >= 0
    torch.testing.assert_close(losses[0].total, losses[0].pixels + 1e-4 * losses[0].divergence)
    latents = 3 + 2 * torch.randn(1000, generator=generator)
    shape = standardised(SMALL_VAE, latents)
    assert (shape.shift, shape.scale) == (pytest.approx(3, abs=0.2), pytest.approx(0.5, abs=0.05))
    assert build_vae(shape).config["shift_factor"] == shape.shift


def test_text_of_flux_keeps_its_length() -> None:
    hidden = torch.randn(2, 5, 4)
    text = flux_text(hidden, 8)
    assert text.states.shape == (2, 8, 4)
    assert not text.states[:, :3].any()
    assert torch.equal(text.states[:, 3:], hidden)
    assert torch.equal(text.pooled, hidden[:, -1])
    with pytest.raises(ValueError, match="length=4: the text has 5 tokens"):
        flux_text(hidden, 4)
    with pytest.raises(ValueError, match=r"rotary_channels=\(8, 8, 8\): must add up to"):
        FluxShape(rotary_channels=(8, 8, 8))


def test_lean_attention_says_the_same() -> None:
    flux = small_flux(guidance=True)
    fill(flux)
    controlnet = awake_controlnet(flux)
    clean, noise, sigmas, condition = random_inputs(3)

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        controlnet.zero_grad()
        loss = flow_loss(flux, controlnet, clean, noise, sigmas, condition, (4, 4))
        loss.mean().backward()
        named = controlnet.named_parameters()
        return loss.detach(), [p.grad.clone() for _, p in named if p.grad is not None]

    loss, gradients = step()
    use_lean_attention(flux)
    use_lean_attention(controlnet)
    lean_loss, lean_gradients = step()
    torch.testing.assert_close(lean_loss, loss)
    assert len(lean_gradients) == len(gradients)
    for mine, theirs in zip(lean_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def save_all(folder: Path) -> dict[str, nn.Module]:
    """Write small parts and return them, rounded as stored."""
    torch.manual_seed(0)
    parts: dict[str, tuple[nn.Module, Any]] = {
        TOWER: (build_tower(SMALL_TOWER), SMALL_TOWER),
        LANGUAGE: (build_language_model(SMALL_LANGUAGE), SMALL_LANGUAGE),
        VAE: (build_vae(SMALL_VAE), SMALL_VAE),
        FLUX: (build_flux(SMALL_FLUX), SMALL_FLUX),
    }
    for name, (network, shape) in parts.items():
        save_part(folder, name, network, shape, {"steps": 10, "seed": 0}, {"psnr": 20.5})
    return {name: network.half().float().eval() for name, (network, _) in parts.items()}


LOADERS: dict[str, Callable[[Path], nn.Module]] = {
    TOWER: load_tower,
    LANGUAGE: load_language_model,
    VAE: load_vae,
    FLUX: load_flux,
}


def test_parts_come_back_frozen(tmp_path: Path) -> None:
    saved = save_all(tmp_path)
    state = torch.get_rng_state()
    for name, load in LOADERS.items():
        loaded = load(tmp_path)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        theirs = saved[name].state_dict()
        assert all(torch.equal(theirs[key], v) for key, v in loaded.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert read_record(tmp_path, VAE)["figures"] == {"psnr": 20.5}
    assert load_vae(tmp_path).config["scaling_factor"] == 2.0
    ids = torch.tensor([[1, 5, 2]])
    again = load_language_model(tmp_path)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(again, saved[LANGUAGE](input_ids=ids).last_hidden_state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, r"do not fit the sizes|must add up"),
        ({"heads": 10**12}, "heads=1000000000000: impossible size"),
        ({"heads": "2"}, "heads=2: impossible size"),
        ({"heads": 0}, "heads=0: impossible size"),
        ({"rotary_channels": [4] * 99}, "impossible size"),
        ({"rotary_channels": [4, 4, 4]}, "must add up to head_channels=16"),
        ({"more": 1}, "shape must state double_layers"),
        ({"text_width": 60_000, "heads": 4000}, "do not fit the sizes"),
    ],
)
def test_records_that_lie_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_all(tmp_path)
    path = tmp_path / f"{FLUX}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"shape": record["shape"] | changes}))
    with pytest.raises(ValueError, match=message) as caught:
        load_flux(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vae\.json: there is no such file; train"):
        load_vae(tmp_path)
    save_all(tmp_path)
    weights = tmp_path / f"{VAE}.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is not the file that vae\.json describes"):
        load_vae(tmp_path)
    (tmp_path / f"{VAE}.json").write_text((tmp_path / f"{FLUX}.json").read_text())
    with pytest.raises(ValueError, match="no record of part 'vae'"):
        load_vae(tmp_path)
    broken = build_vae(SMALL_VAE)
    nn.init.constant_(next(broken.parameters()), 1e6)
    with pytest.raises(ValueError, match="is not finite in float16"):
        save_part(tmp_path, VAE, broken, SMALL_VAE, {}, {})
