"""Crops of the embedded photographs, which the splits share out among themselves."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.documents.keyed_draws import KeyedDraws
    from datamodules.readers.protocol import Split

PHOTO_FOLDER = Path(__file__).parents[1] / "assets" / "photos"

# No photograph is in two splits. Each has textures (brick, grass; camera's lawn; gravel) and
# things (astronaut, cat; camera; cup, rocket), and something smooth (retina; cell; clock).
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": ("astronaut", "brick", "chelsea", "grass", "hubble_deep_field", "retina"),
    "val": ("camera", "cell"),
    "test": ("clock_motion", "coffee", "gravel", "rocket"),
}

# Shorter side of a photograph, in sides of the crop: from nearly all of it to a detail.
_SCALES = (1.125, 1.375, 1.75, 2.125, 2.625)


class Crops(NamedTuple):
    """B crops of the photographs of one split.

    Attributes:
        photo: (B,) int64, position in ``PHOTOS`` of the split.
        scale: (B,) int64, position in the sizes that a photograph is kept in.
        place: (B, 2) float64, 0 .. 1, of the crop between the upper left and lower right ends.
        mirrored: (B,) bool, left to right.
        gain: (B, 3) float32, contrast of each channel.
        lift: (B,) float32, grey level of black.
    """

    photo: NDArray[np.int64]
    scale: NDArray[np.int64]
    place: NDArray[np.float64]
    mirrored: NDArray[np.bool_]
    gain: NDArray[np.float32]
    lift: NDArray[np.float32]


def draw_crops(draws: KeyedDraws, split: Split) -> Crops:
    """Choose photographs, crops and their exposure; black is lifted as in a print."""
    lift = draws.uniform(26, 56)
    white = draws.uniform(215, 255)
    tint = draws.uniform(0.95, 1.05, shape=(3,))
    return Crops(
        photo=draws.integers(len(PHOTOS[split])),
        scale=draws.integers(len(_SCALES)),
        place=draws.uniform(shape=(2,)),
        mirrored=draws.uniform() < 0.5,
        gain=((white - lift)[:, None] / 255 * tint).astype(np.float32),
        lift=lift.astype(np.float32),
    )


@cache
def scaled_photos(split: Split, side: int) -> list[list[NDArray[np.uint8]]]:
    """Every photograph of a split in every size it is cropped from.

    Args:
        split: whose photographs.
        side: pixels along a side of a crop.

    Returns:
        For each of ``PHOTOS`` and each size, RGB planes (3, height, width) uint8.
    """
    photos = []
    for name in PHOTOS[split]:
        with Image.open(PHOTO_FOLDER / f"{name}.jpg") as file:
            photo = file.convert("RGB")
        scales = [scale * side / min(photo.size) for scale in _SCALES]
        sizes = [(round(scale * photo.width), round(scale * photo.height)) for scale in scales]
        scaled = [photo.resize(size, Image.Resampling.LANCZOS) for size in sizes]
        photos.append([np.ascontiguousarray(np.asarray(s).transpose(2, 0, 1)) for s in scaled])
    return photos


def render_crops(crops: Crops, split: Split, side: int) -> NDArray[np.float32]:
    """Cut the crops out.

    Returns:
        (B, 3, side, side) float32, about 0 .. 255.
    """
    photos = scaled_photos(split, side)
    pixels = np.empty((len(crops.photo), 3, side, side), dtype=np.float32)
    choices = zip(crops.photo.tolist(), crops.scale.tolist(), crops.place, strict=True)
    for row, (photo, scale, place) in enumerate(choices):
        source = photos[photo][scale]
        room = np.array(source.shape[1:]) - side
        top, left = np.rint(place * room).astype(int).tolist()
        crop = source[:, top : top + side, left : left + side]
        pixels[row] = crop[:, :, ::-1] if crops.mirrored[row] else crop
    pixels *= crops.gain[:, :, None, None]
    pixels += crops.lift[:, None, None, None]
    return pixels
