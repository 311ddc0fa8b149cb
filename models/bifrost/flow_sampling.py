"""Euler sampler of a rectified flow on FLUX's packed latents.

Letters: B items, L image tokens, K channels of a packed token.

Example:
    >>> noise = draw_noise([torch.Generator().manual_seed(i) for i in range(2)], (64, 16))
    >>> options = SamplingOptions(steps=16, conditioning_scale=1.0)
    >>> tokens = sample(flux, controlnet, Condition(text, latents), noise, (8, 8), options)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import exp

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.flow import Condition, predict_velocity

Progress = Callable[[int, int], None]
# Sequence lengths and shifts between which FLUX.1 interpolates its dynamic shift.
_SHIFT_LENGTHS, _SHIFT_VALUES = (256, 4096), (0.5, 1.15)


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of `sample`; defaults are those of the released inference script.

    Attributes:
        steps: Euler steps.
        guidance: Value for FLUX's guidance embedding; ignored by a FLUX without one.
        conditioning_scale: Factor of the ControlNet's residuals.
        true_guidance: Weight w of classifier-free guidance v_n + w (v_c - v_n) against the
            negative condition; 1 computes the condition alone.
        dynamic_shift: Whether to shift sigmas by the number of image tokens, as FLUX.1-dev.
    """

    steps: int = 28
    guidance: float = 3.5
    conditioning_scale: float = 0.7
    true_guidance: float = 1.0
    dynamic_shift: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be >= 1")


def euler_sigmas(steps: int, tokens: int, dynamic_shift: bool = True) -> Tensor:
    """Sigmas (steps + 1,) float64 from 1 to 0 of FLUX's sampler.

    Args:
        steps: Euler steps.
        tokens: L, image tokens; more of them shift sigmas upwards.
        dynamic_shift: Whether to shift at all.
    """
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    if dynamic_shift:
        (short, long), (low, high) = _SHIFT_LENGTHS, _SHIFT_VALUES
        factor = exp(low + (high - low) * (tokens - short) / (long - short))
        sigmas = factor / (factor + 1 / sigmas - 1)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def sample(
    flux: FluxTransformer2DModel,
    controlnet: LatentFluxControlNet | None,
    condition: Condition,
    noise: Tensor,
    grid: tuple[int, int],
    options: SamplingOptions = SamplingOptions(),
    negative: Condition | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Integrate the flow from noise to packed latents with Euler steps.

    Both networks run in evaluation mode and are then put back into the mode they were in.

    Args:
        flux: Transformer.
        controlnet: None samples from text alone.
        condition: Text and latents of the pictures.
        noise: (B, L, K) from `draw_noise`.
        grid: Rows and columns of the image tokens.
        options: Steps, guidance and scales.
        negative: What guidance leads away from, usually the empty caption with the same latents.
        progress: Called after each step with the number of steps done and in all.

    Returns:
        (B, L, K) float32 packed standardised latents for `decode_images`.

    Raises:
        ValueError: If guidance is asked for without a negative condition.
    """
    if options.true_guidance != 1 and negative is None:
        raise ValueError(
            f"true_guidance={options.true_guidance}: needs a negative condition, for example the "
            "empty caption; or use 1"
        )
    state = noise.float()
    schedule = euler_sigmas(options.steps, noise.shape[1], options.dynamic_shift).tolist()
    weight = options.true_guidance
    with _evaluating(flux, controlnet):
        for step, (level, following) in enumerate(pairwise(schedule)):
            sigmas = state.new_full((len(state),), level)
            velocity = _velocity(flux, controlnet, state, sigmas, condition, grid, options)
            if negative is not None and weight != 1:
                against = _velocity(flux, controlnet, state, sigmas, negative, grid, options)
                velocity = against + weight * (velocity - against)
            state = state + (following - level) * velocity
            if progress is not None:
                progress(step + 1, options.steps)
    return state


def _velocity(
    flux: FluxTransformer2DModel,
    controlnet: LatentFluxControlNet | None,
    state: Tensor,
    sigmas: Tensor,
    condition: Condition,
    grid: tuple[int, int],
    options: SamplingOptions,
) -> Tensor:
    return predict_velocity(
        flux,
        controlnet,
        state,
        sigmas,
        condition,
        grid,
        guidance=options.guidance,
        conditioning_scale=options.conditioning_scale,
    )


@contextmanager
def _evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Evaluation mode for a while: BatchNorm must not see what is being sampled."""
    modules = [m for n in networks if n is not None for m in n.modules() if m.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
