"""Textures of the procedural scenes: crops of photographs and smooth patterns, in one atlas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.keyed_random import keyed_generator

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "test"]

SPLIT_KEYS: dict[Split, int] = {"train": 0, "test": 1}
TILES = 256  # textures in one split's atlas; half are photographs, half patterns

# The splits share no photograph, so that no texture of a test scene was seen in training.
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": ("brick", "chelsea", "grass", "hubble_deep_field", "retina"),
    "test": ("coffee", "gravel"),
}
PHOTO_FOLDER = Path(__file__).parents[1] / "assets" / "photos"

_ATLAS_KEY = 0x61746C  # keeps the atlas' random numbers apart from those of the scenes
_CROP_SHARE = (0.2, 0.6)  # side of a crop, as a share of the photograph's shorter side
_HALF_PERIODS = (2, 8)  # half periods of a pattern over a tile; more would alias at tile size / 4
_TILE_LIMITS = (32, 128)  # texels; a scene's picture of 32 pixels shows about one texel per sample


def tile_texels(image_size: int) -> int:
    """Texels along a tile's side for pictures of this size: detail grows with the picture."""
    low, high = _TILE_LIMITS
    return min(max(image_size, low), high)


def build_atlas(split: Split, seed: int, texels: int) -> Tensor:
    """Make the textures of one split.

    Every tile is meant to be repeated by reflection. The patterns are even functions about the
    tile's edges, so they continue smoothly across them; photographs continue mirrored.

    Args:
        split: which photographs are cropped.
        seed: seed of the crops and patterns.
        texels: side of a tile, see ``tile_texels``.

    Returns:
        (3, 256, texels, texels) RGB in [0, 1]; the first 128 tiles are photographs.
    """
    generator = keyed_generator(seed, SPLIT_KEYS[split], _ATLAS_KEY)
    photos = [_open_photo(name) for name in PHOTOS[split]]
    crops = [_photo_tile(photos[n % len(photos)], texels, generator) for n in range(TILES // 2)]
    patterns = [_pattern_tile(n % 3, texels, generator) for n in range(TILES - TILES // 2)]
    return torch.stack(crops + patterns, dim=1).contiguous()  # (3, 256, T, T)


def _open_photo(name: str) -> Image:
    from PIL import Image

    with Image.open(PHOTO_FOLDER / f"{name}.jpg") as photo:
        return photo.convert("RGB")


def _photo_tile(photo: Image, texels: int, generator: torch.Generator) -> Tensor:
    """A random square crop (3, T, T), low-passed to half the tile's resolution."""
    from PIL import Image

    low, high = _CROP_SHARE
    share, x, y = torch.rand(3, generator=generator).tolist()
    side = (low + (high - low) * share) * min(photo.size)
    left, top = x * (photo.width - side), y * (photo.height - side)
    region = (left, top, left + side, top + side)
    coarse = photo.resize((texels // 2, texels // 2), Image.Resampling.BOX, box=region)
    tile = np.asarray(coarse.resize((texels, texels), Image.Resampling.BILINEAR))
    return torch.from_numpy(tile.astype(np.float32) / 255).permute(2, 0, 1)  # (3, T, T)


def _pattern_tile(kind: int, texels: int, generator: torch.Generator) -> Tensor:
    """Two random colours (3, T, T) mixed by 0: sinusoids, 1: soft checks or 2: soft stripes."""
    low, high = _HALF_PERIODS
    periods = torch.randint(low, high + 1, (2, 1), generator=generator)
    colours = torch.rand(2, 3, 1, 1, generator=generator)
    sharpness = 2 + 6 * torch.rand((), generator=generator)
    place = (torch.arange(texels) + 0.5) / texels
    across, down = torch.cos(math.pi * periods * place)  # (T,), (T,)
    waves = (
        (across[None, :] + down[:, None]) / 4 + 0.5,
        torch.sigmoid(sharpness * 2 * across[None, :] * down[:, None]),
        torch.sigmoid(sharpness * across[None, :]).expand(texels, -1),
    )
    weight = waves[kind]  # (T, T), 0 .. 1
    return weight * colours[0] + (1 - weight) * colours[1]
