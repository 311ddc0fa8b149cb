"""The demo's autoencoder and base FLUX: diffusers' own classes at toy size.

Letters: B items, T text tokens, D width of the language model, L = h * w packed image tokens.

Example:
    >>> vae, flux = build_vae(VaeShape()), build_flux(FluxShape())
    >>> VaeShape().image_grid(32)
    (8, 8)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from models.bifrost.flow import FluxText


@dataclass(frozen=True)
class VaeShape:
    """Sizes of an autoencoder.

    Attributes:
        channels: Channels of each level; every level but the first halves the image.
        latent_channels: Channels of a latent.
        layers: Residual blocks of a level.
        shift: Mean of the latents, see `standardised`.
        scale: 1 / their standard deviation.
    """

    channels: tuple[int, ...] = (16, 32)
    latent_channels: int = 4
    layers: int = 1
    shift: float = 0.0
    scale: float = 1.0

    def image_grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of packed image tokens."""
        side = image_size // 2 ** len(self.channels)
        return side, side


@dataclass(frozen=True)
class FluxShape:
    """Sizes of a base FLUX.

    Attributes:
        in_channels: Channels of a packed token: 4 * those of the autoencoder's latents.
        double_layers: Double-stream blocks.
        single_layers: Single-stream blocks.
        heads: Attention heads.
        head_channels: Channels of a head.
        text_width: D, of the language model whose states it reads.
        rotary_channels: Shares of a head's channels that tell of the three position axes.
        guidance: Whether it embeds a guidance value.
    """

    in_channels: int = 16
    double_layers: int = 2
    single_layers: int = 2
    heads: int = 4
    head_channels: int = 32
    text_width: int = 128
    rotary_channels: tuple[int, int, int] = (8, 12, 12)
    guidance: bool = False

    def __post_init__(self) -> None:
        if sum(self.rotary_channels) != self.head_channels:
            raise ValueError(
                f"rotary_channels={self.rotary_channels}: must add up to "
                f"head_channels={self.head_channels}"
            )


class AutoencodingLoss(NamedTuple):
    """Terms of the autoencoder's training.

    Attributes:
        total: Weighted sum.
        pixels: Mean absolute plus mean squared error of images in [-1, 1].
        divergence: Of the posterior from the standard normal, in nats per latent value.
        squared: Mean squared error alone; PSNR is 10 log10(4 / squared).
    """

    total: Tensor
    pixels: Tensor
    divergence: Tensor
    squared: Tensor


def build_vae(shape: VaeShape) -> AutoencoderKL:
    """An autoencoder with random weights, without attention: images are small."""
    levels = len(shape.channels)
    vae: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(shape.channels),
        layers_per_block=shape.layers,
        latent_channels=shape.latent_channels,
        norm_num_groups=8,
        shift_factor=shape.shift,
        scaling_factor=shape.scale,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return vae


def build_flux(shape: FluxShape) -> FluxTransformer2DModel:
    """A base FLUX with random weights."""
    flux: FluxTransformer2DModel = FluxTransformer2DModel(
        in_channels=shape.in_channels,
        num_layers=shape.double_layers,
        num_single_layers=shape.single_layers,
        attention_head_dim=shape.head_channels,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.text_width,
        pooled_projection_dim=shape.text_width,
        guidance_embeds=shape.guidance,
        axes_dims_rope=tuple(shape.rotary_channels),
    )
    return flux


def flux_text(hidden: Tensor, length: int) -> FluxText:
    """What the toy FLUX sees of a caption: the frozen language model's states.

    Args:
        hidden: (B, T, D) states of left-padded texts, zero at pads.
        length: Text tokens FLUX was trained with; missing pads are put back, as FLUX attends to
            them too.

    Raises:
        ValueError: If there are more tokens than that.
    """
    missing = length - hidden.shape[1]
    if missing < 0:
        raise ValueError(f"length={length}: the text has {hidden.shape[1]} tokens")
    return FluxText(F.pad(hidden, (0, 0, missing, 0)), hidden[:, -1])


def standardised(shape: VaeShape, latents: Tensor) -> VaeShape:
    """The shape with mean and spread of a training set's latents, for the configuration."""
    return replace(shape, shift=float(latents.mean()), scale=float(1 / latents.std()))


def autoencoding_loss(
    vae: AutoencoderKL, images: Tensor, noise: Tensor, divergence_weight: float = 1e-4
) -> AutoencodingLoss:
    """Loss of an autoencoder: absolute and squared error, and a little divergence.

    Args:
        vae: Autoencoder.
        images: (B, 3, S, S) in [-1, 1].
        noise: Standard normal of the latents' shape.
        divergence_weight: Factor of the divergence.
    """
    posterior = vae.encode(images).latent_dist
    latents = posterior.mean + posterior.std * noise
    restored: Tensor = vae.decode(latents.to(images.dtype)).sample.float()
    squared = F.mse_loss(restored, images)
    pixels = F.l1_loss(restored, images) + squared
    variance = posterior.mean.float().square() + posterior.var.float()
    divergence = 0.5 * (variance - 1 - posterior.logvar.float()).mean()
    return AutoencodingLoss(pixels + divergence_weight * divergence, pixels, divergence, squared)
