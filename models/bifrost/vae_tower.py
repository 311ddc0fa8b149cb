"""Ablation: latents of an autoencoder as the bridge, in place of a vision tower's.

Bifrost-1 (arXiv 2508.05954) compares its patch latents with FLUX's own VAE latents, which say how
a patch looks but little of what it is. Letters: B images, N = n x n tokens, C latent width.

Example:
    >>> import torch
    >>> from models.bifrost.demo_foundations import VaeShape, build_vae
    >>> tower = VaeTower(build_vae(VaeShape()), image_size=32, tokens=16)
    >>> tower(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 16, 64])
"""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from models.bifrost.flux_latents import encode_images, image_grid
from models.bifrost.positions import grid_side
from models.bifrost.vision_tower import LatentTower


class VaeTower(LatentTower):
    """Standardised posterior means of an autoencoder, squares of them folded into one token.

    Args:
        vae: Autoencoder, of FLUX as a rule.
        image_size: Side in pixels that it sees.
        tokens: N; each is a square of the autoencoder's grid, all its channels side by side.

    Raises:
        ValueError: The grid of N tokens does not divide the autoencoder's at this size.
    """

    kind = "VaeTower"

    def __init__(self, vae: AutoencoderKL, image_size: int, tokens: int) -> None:
        rows, side = image_grid(vae, (image_size, image_size))[0], grid_side(tokens)
        if rows % side:
            raise ValueError(
                f"tokens={tokens}: a grid of {side} x {side} must divide the autoencoder's "
                f"{rows} x {rows} packed latents at image_size={image_size}"
            )
        self.fold = rows // side
        width = 4 * int(vae.config["latent_channels"]) * self.fold**2
        super().__init__(vae, image_size, tokens, width)

    def _encode(self, images: Tensor) -> Tensor:
        vae: Any = self.network
        packed = encode_images(vae, images)  # (B, rows rows, 4c)
        side = grid_side(self.tokens)
        squares = packed.view(len(images), side, self.fold, side, self.fold, packed.shape[-1])
        return squares.transpose(2, 3).reshape(len(images), self.tokens, self.width)

    def _about(self) -> tuple[object, ...]:
        vae: Any = self.network
        scaling = (vae.config["shift_factor"], vae.config["scaling_factor"])
        return (*super()._about(), self.tokens, *scaling)
