"""What Bifrost-1's ControlNet steers: a frozen FLUX with its autoencoder and text encoders.

Letters: B items, T text tokens, L = h * w packed image tokens, K channels of one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FluxPipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from lightning_modules.bifrost_frozen import Precision, check_folder
from models.bifrost.demo_foundation_files import (
    SHIPPED,
    TOKENIZER_FILE,
    load_flux,
    load_language_model,
    load_vae,
)
from models.bifrost.demo_foundations import flux_text
from models.bifrost.demo_tokenizer import load_tokenizer
from models.bifrost.flow import FluxText
from models.bifrost.flux_latents import decode_images, encode_images, image_grid
from models.bifrost.language_model import FrozenLanguageModel, weights_digest
from models.bifrost.text_states import encode_text


class Painter:
    """A frozen FLUX, its autoencoder, and what reads captions for it; no part of a checkpoint.

    Args:
        flux: Transformer.
        vae: Autoencoder.
        text_length: T, text tokens that FLUX sees.
    """

    def __init__(self, flux: FluxTransformer2DModel, vae: AutoencoderKL, text_length: int) -> None:
        # In a tuple, so that the weights are no part of a module that has this as an attribute.
        self._held = (flux.requires_grad_(False).eval(), vae.requires_grad_(False).eval())
        self.text_length = text_length
        self._identities: dict[str, str] | None = None

    @property
    def flux(self) -> FluxTransformer2DModel:
        """The transformer."""
        return self._held[0]

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self._held[1]

    @property
    def identities(self) -> dict[str, str]:
        """Hashes of the parts: "flux", "vae" and "flux_text"."""
        if self._identities is None:
            vae = self.vae.config
            scaling = f"{vae['shift_factor']} {vae['scaling_factor']}"
            self._identities = {
                "flux": _digest("flux", self.flux),
                "vae": _digest(f"vae {scaling}", self.vae),
                "flux_text": _digest(f"text {self.text_length}", *self._text_networks()),
            }
        return dict(self._identities)

    @property
    def channels(self) -> int:
        """K."""
        return int(self.flux.config["in_channels"])

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows h and columns w of image tokens of a square image.

        Raises:
            ValueError: The image is no whole number of tokens.
        """
        return image_grid(self.vae, (image_size, image_size))

    def _text_networks(self) -> tuple[nn.Module, ...]:
        """Networks that read captions."""
        raise NotImplementedError

    def _read(self, captions: Sequence[str]) -> FluxText:
        """See `text`."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, object]) -> Painter:
        """Itself: copies of a module, such as averaged weights, share what is frozen."""
        return self

    def to(self, device: torch.device) -> None:
        """Move all parts."""
        for network in (*self._held, *self._text_networks()):
            if next(network.parameters()).device != device:
                network.to(device)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> FluxText:
        """What FLUX sees of captions, states (B, T, E) and pooled (B, P), whatever the autocast."""
        with torch.autocast(next(self.flux.parameters()).device.type, enabled=False):
            return self._read(captions)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Packed latents (B, L, K) float32 of images in [-1, 1]: the posterior's mean."""
        with torch.autocast(images.device.type, enabled=False):
            return encode_images(self.vae, images)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of packed latents."""
        with torch.autocast(tokens.device.type, enabled=False):
            return decode_images(self.vae, tokens, grid)


class DemoPainter(Painter):
    """The demo's small FLUX, which reads the states of the demo's language model.

    Args:
        folder: Holds the files of the foundations; null takes the shipped ones.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = SHIPPED if folder is None else Path(folder)
        self._tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        self._reader = (FrozenLanguageModel(load_language_model(folder)),)
        super().__init__(load_flux(folder), load_vae(folder), self._tokenizer.length)

    def _text_networks(self) -> tuple[nn.Module, ...]:
        return (self._reader[0].model,)

    def _read(self, captions: Sequence[str]) -> FluxText:
        device = self._reader[0].device
        ids, mask = (part.to(device) for part in self._tokenizer.encode(captions))
        hidden = encode_text(self._reader[0], ids, mask.long()).hidden
        return flux_text(hidden, self.text_length)


class FluxPainter(Painter):
    """FLUX.1 from a folder in diffusers' layout; captions are read by its CLIP-L and T5.

    Args:
        folder: As downloaded: transformer, vae, text_encoder, text_encoder_2 and their tokenizers.
        text_length: Tokens of T5's prompt.
        dtype: Type of the frozen weights.

    Raises:
        FileNotFoundError: There is no such folder.
    """

    def __init__(self, folder: Path, text_length: int = 512, dtype: Precision = "bfloat16") -> None:
        folder = check_folder(folder, "black-forest-labs/FLUX.1-dev")
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True}
        flux = FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer", **options)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **options)
        absent: dict[str, Any] = {"transformer": None, "vae": None}
        pipelines: Any = FluxPipeline
        self._pipeline = pipelines.from_pretrained(folder, **absent, **options)
        for network in self._text_networks():
            network.requires_grad_(False).eval()
        super().__init__(flux, vae, text_length)

    def _text_networks(self) -> tuple[nn.Module, ...]:
        return self._pipeline.text_encoder, self._pipeline.text_encoder_2

    def _read(self, captions: Sequence[str]) -> FluxText:
        device = next(self._text_networks()[0].parameters()).device
        states, pooled, _ = self._pipeline.encode_prompt(
            list(captions), None, device=device, max_sequence_length=self.text_length
        )
        return FluxText(cast("Tensor", states), cast("Tensor", pooled))


def _digest(about: str, *networks: nn.Module) -> str:
    text = " ".join([about, *(weights_digest(network) for network in networks)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
