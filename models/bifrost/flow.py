"""Rectified flow on FLUX's packed latents: sigmas, velocity and training loss.

x_s = (1 - s) x_0 + s eps with sigma s in [0, 1]; the network predicts the velocity eps - x_0
(Liu et al., arXiv 2209.03003; the release trains with uniform s, weight 1 and guidance 3.5).
Letters: B items, L image tokens, K channels of a packed token, T text tokens.

Example:
    >>> condition = Condition(FluxText(states, pooled), latents)
    >>> sigmas = draw_sigmas(len(clean), SigmaDraw(), generator)
    >>> loss = flow_loss(flux, controlnet, clean, noise, sigmas, condition, (8, 8)).mean()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.flux_latents import image_ids, text_ids


class FluxText(NamedTuple):
    """What FLUX sees of the text.

    Attributes:
        states: (B, T, E) states of the text tokens, zero at pads.
        pooled: (B, P) one vector of the whole text.
    """

    states: Tensor
    pooled: Tensor

    def to(self, other: Tensor | torch.device | torch.dtype) -> FluxText:
        """Both tensors moved or cast like ``Tensor.to``."""
        return FluxText(self.states.to(other), self.pooled.to(other))

    def rows(self, index: Tensor) -> FluxText:
        """Items of a batch, by index or mask."""
        return FluxText(self.states[index], self.pooled[index])


class Condition(NamedTuple):
    """What a picture is made from.

    Attributes:
        text: States of the caption.
        latents: (B, N, C) patch-level latents; None leaves the ControlNet out.
        latent_grid: Rows and columns of the latents; None stands for a square.
    """

    text: FluxText
    latents: Tensor | None = None
    latent_grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class SigmaDraw:
    """How sigmas of training items are drawn.

    Attributes:
        kind: "uniform" in (0, 1), as released, or "logit_normal": sigmoid of a normal.
        mean: Of the normal; above 0 for more noise.
        std: Of the normal.
        shift: s -> shift s / (1 + (shift - 1) s) afterwards; 1 changes nothing.
    """

    kind: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("uniform", "logit_normal"):
            raise ValueError(f"kind={self.kind!r}: expected 'uniform' or 'logit_normal'")
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std={self.std}, shift={self.shift}: both must be > 0")


def draw_sigmas(count: int, draw: SigmaDraw, generator: torch.Generator) -> Tensor:
    """Sigmas (count,) float32 in (0, 1], on the generator's device."""
    device = generator.device
    if draw.kind == "uniform":
        sigmas = 1 - torch.rand(count, generator=generator, device=device)
    else:
        normal = torch.randn(count, generator=generator, device=device)
        sigmas = torch.sigmoid(draw.mean + draw.std * normal)
    return draw.shift * sigmas / (1 + (draw.shift - 1) * sigmas)


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """Noise (B, *shape) float32, each item from its own generator, whatever batch it is in."""
    noise = [torch.randn(shape, generator=g, device=g.device) for g in generators]
    return torch.stack(noise)


def predict_velocity(
    flux: FluxTransformer2DModel,
    controlnet: LatentFluxControlNet | None,
    noisy: Tensor,
    sigmas: Tensor,
    condition: Condition,
    grid: tuple[int, int],
    guidance: float = 3.5,
    conditioning_scale: float = 1.0,
) -> Tensor:
    """Velocity (B, L, K) float32 that FLUX predicts, with or without ControlNet.

    Args:
        flux: Transformer.
        controlnet: Left out if None, or if the condition has no latents.
        noisy: (B, L, K) packed noisy latents x_s.
        sigmas: (B,) in [0, 1].
        condition: Text and latents.
        grid: Rows and columns of the image tokens.
        guidance: Value for the guidance embedding, where there is one.
        conditioning_scale: Factor of the ControlNet's residuals.

    Raises:
        ValueError: If the grid is not that of the tokens.
    """
    if grid[0] * grid[1] != noisy.shape[1]:
        raise ValueError(f"grid={grid}: expected h * w = {noisy.shape[1]} image tokens")
    text = condition.text.to(flux.dtype)
    values = noisy.new_full(sigmas.shape, guidance) if flux.config["guidance_embeds"] else None
    noisy, sigmas = noisy.to(flux.dtype), sigmas.to(flux.dtype)
    img_ids = image_ids(grid, noisy.device)
    txt_ids = text_ids(text.states.shape[1], noisy.device)
    double: list[Tensor] | None = None
    single: list[Tensor] | None = None
    if controlnet is not None and condition.latents is not None:
        double, single = controlnet(
            noisy,
            condition.latents.to(controlnet.dtype),
            conditioning_scale=conditioning_scale,
            encoder_hidden_states=text.states,
            pooled_projections=text.pooled,
            timestep=sigmas,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=values,
            return_dict=False,
            latent_grid=condition.latent_grid,
        )
    velocity = flux(
        noisy,
        encoder_hidden_states=text.states,
        pooled_projections=text.pooled,
        timestep=sigmas,
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=values,
        controlnet_block_samples=double,
        controlnet_single_block_samples=single,
        return_dict=False,
    )[0]
    return cast("Tensor", velocity.float())


def flow_loss(
    flux: FluxTransformer2DModel,
    controlnet: LatentFluxControlNet | None,
    clean: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    condition: Condition,
    grid: tuple[int, int],
    guidance: float = 3.5,
) -> Tensor:
    """Mean squared error of the velocity of each item, in float32.

    Args:
        flux: Transformer; frozen or not.
        controlnet: None trains FLUX alone.
        clean: (B, L, K) packed standardised latents x_0.
        noise: (B, L, K) standard normal.
        sigmas: (B,) from `draw_sigmas`.
        condition: Text and latents.
        grid: Rows and columns of the image tokens.
        guidance: Value for the guidance embedding, where there is one.

    Returns:
        (B,) losses; their mean is the training loss.
    """
    level = sigmas[:, None, None]
    noisy = (1 - level) * clean + level * noise
    velocity = predict_velocity(flux, controlnet, noisy, sigmas, condition, grid, guidance=guidance)
    return F.mse_loss(velocity, (noise - clean).float(), reduction="none").flatten(1).mean(1)
