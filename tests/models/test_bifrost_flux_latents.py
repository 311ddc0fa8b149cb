"""Packing, positions and standardisation of VAE latents."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_controlnet import FluxControlNetPipeline

from models.bifrost.flux_latents import (
    decode_images,
    denormalise_latents,
    encode_images,
    image_grid,
    image_ids,
    normalise_latents,
    pack_latents,
    text_ids,
    unpack_latents,
)


def small_vae(shift: float | None = 0.25) -> AutoencoderKL:
    """Autoencoder that halves the image, with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=shift,
        scaling_factor=0.5,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_packing_is_that_of_flux_and_has_an_inverse(grid: tuple[int, int]) -> None:
    height, width = 2 * grid[0], 2 * grid[1]
    latents = torch.arange(2 * 4 * height * width).reshape(2, 4, height, width).float()
    tokens = pack_latents(latents)
    assert torch.equal(tokens, FluxControlNetPipeline._pack_latents(latents, 2, 4, height, width))
    assert torch.equal(unpack_latents(tokens, grid), latents)
    ids = image_ids(grid)
    theirs = FluxControlNetPipeline._prepare_latent_image_ids(
        2, *grid, torch.device("cpu"), torch.float32
    )
    assert torch.equal(ids, theirs)
    assert text_ids(3).shape == (3, 3)


def test_standardisation_comes_from_the_configuration() -> None:
    vae, latents = small_vae(), torch.full((1, 4, 2, 2), 2.25)
    assert torch.equal(normalise_latents(latents, vae), torch.ones(1, 4, 2, 2))
    assert torch.equal(denormalise_latents(normalise_latents(latents, vae), vae), latents)
    assert torch.equal(normalise_latents(latents, small_vae(shift=None)), 0.5 * latents)


def test_images_go_through_packed_tokens() -> None:
    vae = small_vae()
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert image_grid(vae, (16, 24)) == (4, 6)
    tokens = encode_images(vae, images)
    assert (tokens.shape, tokens.requires_grad) == ((2, 24, 16), False)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        expected = vae.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_images(vae, tokens, (4, 6)), expected)
    noise = torch.randn(posterior.mean.shape)
    drawn = unpack_latents(encode_images(vae, images, noise), (4, 6))
    wanted = (posterior.mean + posterior.std * noise - 0.25) * 0.5
    torch.testing.assert_close(drawn, wanted)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"^latents of shape \(1, 4, 3, 4\): expected"):
        pack_latents(torch.zeros(1, 4, 3, 4))
    with pytest.raises(ValueError, match=r"^tokens of shape \(1, 6, 16\): expected \(B, 2 \* 2"):
        unpack_latents(torch.zeros(1, 6, 16), (2, 2))
    with pytest.raises(ValueError, match=r"^image_size=\(16, 18\): both sides must be multiples"):
        encode_images(small_vae(), torch.zeros(1, 3, 16, 18))
