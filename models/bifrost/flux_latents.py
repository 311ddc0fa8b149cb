"""VAE latents as FLUX wants them: standardised, packed 2 x 2, with positions.

Letters: B images, C latent channels, h x w packed grid (half the VAE's grid), L = h * w tokens.

Example:
    >>> tokens = pack_latents(torch.zeros(1, 16, 64, 64))
    >>> tokens.shape, unpack_latents(tokens, (32, 32)).shape
    (torch.Size([1, 1024, 64]), torch.Size([1, 16, 64, 64]))
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """Fold squares of 2 x 2 into channels: (B, C, 2h, 2w) -> (B, L, 4C), raster order.

    Raises:
        ValueError: If the shape is not (B, C, even, even).
    """
    if latents.ndim != 4 or latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)}: expected (B, C, even, even); choose an "
            "image size that is a multiple of twice the VAE's factor"
        )
    columns = torch.unflatten(latents, 3, (-1, 2))
    squares = torch.unflatten(columns, 2, (-1, 2))  # (B, C, h, 2, w, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, L, 4C)


def unpack_latents(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `pack_latents`: (B, L, 4C) -> (B, C, 2h, 2w).

    Args:
        tokens: (B, L, 4C).
        grid: Rows h and columns w.

    Raises:
        ValueError: If L is not h * w or the channels are no multiple of 4.
    """
    if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or tokens.shape[2] % 4:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)}: expected (B, {grid[0]} * {grid[1]}, 4C); "
            "give the grid of the packed latents"
        )
    squares = torch.unflatten(torch.unflatten(tokens, 2, (-1, 2, 2)), 1, grid)  # (B, h, w, C, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, C, 2h, 2w)


def image_ids(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Positions (L, 3) float32 of packed tokens for FLUX's rotary embedding: 0, row, column."""
    rows, columns = (torch.arange(size, device=device, dtype=torch.float32) for size in grid)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)


def text_ids(tokens: int, device: torch.device | None = None) -> Tensor:
    """Positions (T, 3) float32 of text tokens: all zero, as in FLUX.1."""
    return torch.zeros(tokens, 3, device=device)


def normalise_latents(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Standardise VAE latents: (z - shift) * scale, both from the VAE's configuration."""
    shift, scale = _standardisation(vae)
    return (latents - shift) * scale


def denormalise_latents(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Inverse of `normalise_latents`."""
    shift, scale = _standardisation(vae)
    return latents / scale + shift


def image_grid(vae: AutoencoderKL, image_size: tuple[int, int]) -> tuple[int, int]:
    """Packed grid h x w of an image of (height, width) pixels.

    Raises:
        ValueError: If the image is not a whole number of packed tokens.
    """
    factor = 2 * 2 ** (len(vae.config["block_out_channels"]) - 1)
    height, width = image_size
    if height < factor or width < factor or height % factor or width % factor:
        raise ValueError(f"image_size={image_size}: both sides must be multiples of {factor}")
    return height // factor, width // factor


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Images -> packed standardised latents.

    Args:
        vae: Autoencoder.
        images: (B, 3, H, W) in [-1, 1].
        noise: (B, C, 2h, 2w) standard normal to sample the posterior with; None takes its mean.

    Returns:
        (B, L, 4C) float32.
    """
    image_grid(vae, (images.shape[2], images.shape[3]))
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    latents = posterior.mean.float()
    if noise is not None:
        latents = latents + posterior.std.float() * noise
    return pack_latents(normalise_latents(latents, vae))


@torch.no_grad()
def decode_images(vae: AutoencoderKL, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Packed standardised latents -> images.

    Args:
        vae: Autoencoder.
        tokens: (B, L, 4C).
        grid: Rows h and columns w of the packed latents.

    Returns:
        (B, 3, H, W) float32, clipped to [-1, 1].
    """
    latents = denormalise_latents(unpack_latents(tokens.float(), grid), vae)
    images = vae.decode(latents.to(vae.dtype)).sample
    return cast("Tensor", images.float().clamp(-1, 1))


def _standardisation(vae: AutoencoderKL) -> tuple[float, float]:
    """Shift and scale; an older VAE states no shift."""
    return float(vae.config["shift_factor"] or 0.0), float(vae.config["scaling_factor"])
