"""Pictures and captions as the demo's FLUX takes them, by the frozen networks that it stands on.

Letters: M pairs, L packed image tokens, K their channels, T text tokens, D width of text states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from models.bifrost.demo_foundation_files import (
    LANGUAGE,
    SHIPPED,
    TOKENIZER_FILE,
    VAE,
    load_language_model,
    load_vae,
    read_record,
)
from models.bifrost.demo_foundations import flux_text
from models.bifrost.demo_tokenizer import load_tokenizer
from models.bifrost.demo_tower import text_hidden
from models.bifrost.flow import FluxText
from models.bifrost.flux_latents import decode_images, encode_images, image_grid

_PIECE = 128


class EncodedPairs(NamedTuple):
    """Pairs as FLUX takes them.

    Attributes:
        tokens: (M, L, K) packed standardised latents of the pictures.
        text: States (M, T, D) of the captions.
        taught: (M,) bool, whether FLUX is taught the caption.
    """

    tokens: Tensor
    text: FluxText
    taught: Tensor

    def rows(self, index: Tensor) -> EncodedPairs:
        """Some of the pairs, by index or mask."""
        return EncodedPairs(self.tokens[index], self.text.rows(index), self.taught[index])


class FluxGround:
    """The frozen language model and autoencoder, part of no checkpoint.

    Args:
        folder: Files of the language model and its tokenizer; None takes the shipped ones.
        vae_folder: Files of the autoencoder; None takes ``folder``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """

    def __init__(self, folder: Path | None = None, vae_folder: Path | None = None) -> None:
        folder = SHIPPED if folder is None else Path(folder)
        vae_folder = folder if vae_folder is None else Path(vae_folder)
        self.identities = {
            LANGUAGE: str(read_record(folder, LANGUAGE)["weights_sha256"]),
            VAE: str(read_record(vae_folder, VAE)["weights_sha256"]),
        }
        self.tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
        self.language_model = load_language_model(folder)
        self.vae = load_vae(vae_folder)
        self._device = torch.device("cpu")

    @property
    def channels(self) -> int:
        """K."""
        return 4 * int(self.vae.config["latent_channels"])

    @property
    def text_width(self) -> int:
        """D."""
        return int(self.language_model.config.hidden_size)

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of image tokens; ValueError if pictures are no whole number of them."""
        return image_grid(self.vae, (image_size, image_size))

    def to(self, device: torch.device) -> None:
        """Move both networks."""
        for network in (self.language_model, self.vae):
            cast("nn.Module", network).to(device)
        self._device = device

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> FluxText:
        """States of captions, in float32."""
        ids, mask = (part.to(self._device) for part in self.tokenizer.encode(captions))
        pieces = zip(torch.split(ids, _PIECE), torch.split(mask, _PIECE), strict=True)
        with torch.autocast(self._device.type, enabled=False):
            hidden = torch.cat([text_hidden(self.language_model, *piece) for piece in pieces])
        return flux_text(hidden, self.tokenizer.length)

    def tokens(self, images: Tensor) -> Tensor:
        """Packed latents (M, L, K) of images (M, 3, S, S) in [-1, 1], in float32."""
        with torch.autocast(self._device.type, enabled=False):
            pieces = [encode_images(self.vae, piece) for piece in torch.split(images, _PIECE)]
        return torch.cat(pieces)

    def pictures(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Inverse of `tokens`."""
        with torch.autocast(self._device.type, enabled=False):
            pieces = [decode_images(self.vae, p, grid) for p in torch.split(tokens, _PIECE)]
        return torch.cat(pieces)
