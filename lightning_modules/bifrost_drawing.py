"""Pictures from captions and latents through a frozen FLUX.

Letters: B pictures, N latents, C their width, L packed image tokens, K channels of one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_modules.bifrost_frozen import Foundation
from lightning_modules.bifrost_options import ControlNetShape
from lightning_modules.bifrost_painter import Painter
from lightning_modules.randomness import SAMPLES, device_generator
from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.flow import Condition, FluxText, draw_noise
from models.bifrost.flow_sampling import SamplingOptions, sample
from models.bifrost.flux_attention import use_lean_attention
from models.bifrost.positions import grid_side
from models.bifrost.resampler import SCALES

Key = tuple[int, ...]


class PartClock:
    """Seconds spent in named parts of making pictures."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part; a GPU's pending work counts to who caused it."""
        _finish()
        start = time.perf_counter()
        yield
        _finish()
        spent = time.perf_counter() - start
        self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def seconds_each(self, count: int) -> dict[str, float]:
        """Seconds of each part for one of so many pictures."""
        return {part: spent / count for part, spent in self.seconds.items()}


class Drawing:
    """Draws pictures; each depends on its caption, latents, key and the seed alone.

    Args:
        painter: Frozen FLUX with autoencoder and text encoders.
        controlnet: Through which latents steer FLUX.
        grid: Rows and columns of image tokens.
        options: Steps, guidance and scales.
        chunk: Most pictures drawn at a time.
        seed: Key of the noise beside the pictures' own.
    """

    def __init__(
        self,
        painter: Painter,
        controlnet: LatentFluxControlNet,
        grid: tuple[int, int],
        options: SamplingOptions,
        chunk: int,
        seed: int,
    ) -> None:
        self.painter, self.controlnet, self.grid = painter, controlnet, grid
        self.options, self.chunk, self.seed = options, chunk, seed

    @torch.no_grad()
    def paint(
        self,
        captions: Sequence[str],
        latents: Tensor | None,
        keys: Sequence[Key],
        clock: PartClock | None = None,
    ) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1].

        Args:
            captions: B texts.
            latents: (B, N, C); None paints by text alone, without the ControlNet.
            keys: B keys of the noise.
            clock: Measures the parts "text", "FLUX" and "VAE".
        """
        clock = PartClock() if clock is None else clock
        pictures = []
        for start in range(0, len(captions), self.chunk):
            part = slice(start, start + self.chunk)
            with clock.measure("text"):
                text = self.painter.text(captions[part])
            with clock.measure("FLUX"):
                some = None if latents is None else latents[part]
                tokens = self._tokens(text, some, keys[part])
            with clock.measure("VAE"):
                pictures.append(self.painter.decode(tokens, self.grid))
        return torch.cat(pictures)

    def _tokens(self, text: FluxText, latents: Tensor | None, keys: Sequence[Key]) -> Tensor:
        """Packed pictures (B, L, K)."""
        flux, device = self.painter.flux, text.states.device
        shape = (self.grid[0] * self.grid[1], self.painter.channels)
        generators = [device_generator(device, self.seed, SAMPLES, *key) for key in keys]
        noise = draw_noise(generators, shape)
        negative = None
        if self.options.true_guidance != 1:
            first = torch.zeros(len(noise), dtype=torch.int64, device=device)
            negative = Condition(self.painter.text([""]).rows(first), latents)
        controlnet = None if latents is None else self.controlnet
        condition = Condition(text, latents)
        return sample(flux, controlnet, condition, noise, self.grid, self.options, negative)


def build_controlnet(
    foundation: Foundation, painter: Painter, grid: tuple[int, int], shape: ControlNetShape
) -> LatentFluxControlNet:
    """A fresh ControlNet on copies of FLUX's first blocks, all of it trained.

    Args:
        foundation: Gives the latents.
        painter: With the FLUX, whose attention and checkpointing are set too.
        grid: Rows and columns of image tokens.
        shape: Sizes.

    Raises:
        ValueError: FLUX has fewer blocks, or the grids of latents and FLUX do not meet.
    """
    flux, tower = painter.flux, foundation.tower
    controlnet: LatentFluxControlNet = LatentFluxControlNet.from_transformer(
        flux,
        latent_channels=tower.width,
        scale=_scale(grid, tower.tokens),
        num_layers=shape.double_layers,
        num_single_layers=shape.single_layers,
    )
    for network in (flux, controlnet):
        if shape.checkpointing:
            network.enable_gradient_checkpointing()
        if shape.lean_attention:
            use_lean_attention(network)
    return controlnet


def _scale(grid: tuple[int, int], tokens: int) -> float:
    """Side of FLUX's grid over that of the latents.

    Raises:
        ValueError: There is no block for this ratio.
    """
    side = grid_side(tokens)
    scale = grid[0] / side
    if scale not in SCALES:
        raise ValueError(
            f"image_size: makes FLUX's grid {grid[0]} x {grid[1]}, the latents' is {side} x "
            f"{side}; their ratio must be one of {SCALES} (data.image_size, model.foundation)"
        )
    return scale


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
