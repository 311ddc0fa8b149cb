"""Other latents for Bifrost-1 than those of the language model's own tower, read from files.

`models.bifrost.vision_tower.EncoderTower` is one more: the patch tokens of an open_clip, SigLIP,
DINOv2 or timm encoder of `models.image_encoders.encoders`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from lightning_modules.bifrost_frozen import Precision, check_folder
from models.bifrost.demo_foundation_files import SHIPPED, load_tower, load_vae
from models.bifrost.vae_tower import VaeTower
from models.bifrost.vision_tower import LatentTower


class DemoTower(LatentTower):
    """The demo's vision tower alone, for another language model than the demo's.

    Args:
        folder: Holds its files; null takes the shipped ones.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged.
    """

    def __init__(self, folder: Path | None = None) -> None:
        network = load_tower(SHIPPED if folder is None else Path(folder))
        shape = network.shape
        super().__init__(network, shape.image_size, shape.tokens, shape.latent_width)


class DemoVaeTower(VaeTower):
    """The latents of the demo's autoencoder.

    Args:
        folder: Holds its files; null takes the shipped ones.
        image_size: Side in pixels.
        tokens: See `VaeTower`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or a number does not fit.
    """

    def __init__(self, folder: Path | None = None, image_size: int = 64, tokens: int = 16) -> None:
        super().__init__(load_vae(SHIPPED if folder is None else Path(folder)), image_size, tokens)


class FluxVaeTower(VaeTower):
    """The latents of FLUX's autoencoder, from a folder in diffusers' layout.

    Args:
        folder: As downloaded, with the folder ``vae``.
        image_size: Side in pixels; 512 gives 32 x 32 packed latents of 64 channels.
        tokens: See `VaeTower`.
        dtype: Type of the frozen weights.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A number does not fit.
    """

    def __init__(
        self,
        folder: Path,
        image_size: int = 512,
        tokens: int = 256,
        dtype: Precision = "bfloat16",
    ) -> None:
        folder = check_folder(folder, "black-forest-labs/FLUX.1-dev")
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae", dtype=getattr(torch, dtype), local_files_only=True
        )
        super().__init__(vae, image_size, tokens)
