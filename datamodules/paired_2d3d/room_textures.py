"""Textures of the procedural rooms: regions of the embedded photographs, read at any scale.

The photographs astronaut, camera and clock_motion occur in the rooms of ``test_unseen`` only; all
others (brick, cell, chelsea, coffee, grass, gravel, hubble_deep_field, retina, rocket) occur in
all other rooms.

Shape letters: M materials, P points, S texels along a side of the finest level.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PHOTO_FOLDER = Path(__file__).parents[1] / "assets" / "photos"
TEXELS = 256  # along a side of a material's finest level
CLASS_NAMES = ("floor", "wall", "rug", "picture", "window", "crate", "pouf", "furniture")

PhotoSet = Literal["seen", "unseen"]

_LEVELS = 6
_CONTRAST = 0.9  # of grey photographs about their mean


class Material(NamedTuple):
    """A region of a photograph as the skin of a solid.

    Attributes:
        photo: its name.
        region: left, top, right and bottom, as shares of the photograph.
        colour: mean colour given to a grey photograph; None keeps the photograph's own colours.
        span: metres that the region's height covers, at least and at most.
    """

    photo: str
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    colour: tuple[float, float, float] | None = None
    span: tuple[float, float] = (1.0, 1.0)


_GRAVEL = Material("gravel", colour=(0.56, 0.54, 0.50), span=(1.3, 2.4))
_BRICK = Material("brick", colour=(0.60, 0.37, 0.29), span=(1.0, 1.8))
_GRASS = Material("grass", colour=(0.42, 0.50, 0.27), span=(0.9, 1.8))
_WOOD = Material("coffee", (0.77, 0.0, 1.0, 0.33), span=(0.5, 0.9))
_PLASTER = Material("cell", (0.0, 0.0, 0.5, 0.5), (0.76, 0.72, 0.63), span=(0.8, 1.6))
_FUR = Material("chelsea", (0.43, 0.02, 0.69, 0.31), span=(0.4, 0.8))
_RED = Material("retina", (0.27, 0.27, 0.73, 0.73), span=(0.5, 1.0))
_LAWN_FLOOR = Material("camera", (0.76, 0.62, 1.0, 0.98), (0.56, 0.54, 0.50), span=(0.8, 1.5))
_LAWN = _LAWN_FLOOR._replace(colour=(0.42, 0.50, 0.27))
_SMOOTH = Material("clock_motion", (0.0, 0.0, 1.0, 0.28), (0.76, 0.72, 0.63), span=(0.8, 1.6))
_SMOOTH_RED = _SMOOTH._replace(colour=(0.60, 0.37, 0.29))
_SUIT = Material("astronaut", (0.03, 0.64, 0.19, 0.90), span=(0.5, 1.0))

MATERIALS: dict[PhotoSet, dict[str, tuple[Material, ...]]] = {
    "seen": {
        "floor": (_GRAVEL, _WOOD),
        "wall": (_BRICK, _PLASTER),
        "rug": (_GRASS, _RED),
        "picture": (Material("chelsea"), Material("coffee"), Material("retina")),
        "window": (Material("rocket"), Material("hubble_deep_field")),
        "crate": (_GRAVEL, _BRICK, _WOOD),
        "pouf": (_GRASS, _FUR, _RED),
        "furniture": (_WOOD, _PLASTER, _FUR, _BRICK),
    },
    "unseen": {
        "floor": (_LAWN_FLOOR, _SMOOTH_RED),
        "wall": (_SMOOTH, _SMOOTH_RED),
        "rug": (_LAWN, _SUIT),
        "picture": (Material("astronaut"),),
        "window": (Material("camera", (0.62, 0.0, 1.0, 0.5), (0.42, 0.50, 0.62)),),
        "crate": (_LAWN_FLOOR, _SMOOTH_RED),
        "pouf": (_LAWN, _SUIT),
        "furniture": (_SMOOTH, _SUIT, _SMOOTH_RED),
    },
}
"""Materials of each class; classes share many, so that no patch tells its class for certain."""


class Atlas(NamedTuple):
    """All materials of one set of photographs, each at ``_LEVELS`` resolutions.

    Attributes:
        materials: the M materials, without repetition.
        texels: (rows, 3) float32 in [0, 1], level by level, then material by material.
        first: (levels,) int64 row at which each level starts.
    """

    materials: tuple[Material, ...]
    texels: NDArray[np.float32]
    first: NDArray[np.int64]


def photographs(photos: PhotoSet) -> set[str]:
    """Names of the photographs in a set."""
    return {material.photo for group in MATERIALS[photos].values() for material in group}


@cache
def build_atlas(photos: PhotoSet) -> Atlas:
    """Cut the regions out of the photographs and halve them again and again."""
    groups = MATERIALS[photos].values()
    materials = tuple(dict.fromkeys(material for group in groups for material in group))
    level = np.stack([_finest(material) for material in materials])  # (M, S, S, 3)
    levels = [level]
    for _ in range(_LEVELS - 1):
        side = level.shape[1] // 2
        level = level.reshape(-1, side, 2, side, 2, 3).mean((2, 4))  # (M, S / 2, S / 2, 3)
        levels.append(level)
    sizes = [0, *(level.size // 3 for level in levels[:-1])]
    texels = np.concatenate([level.reshape(-1, 3) for level in levels])
    return Atlas(materials, texels, np.cumsum(sizes))


def aspect(material: Material) -> float:
    """Width of a material's region over its height, in the photograph."""
    from PIL import Image

    with Image.open(PHOTO_FOLDER / f"{material.photo}.jpg") as photo:
        left, top, right, bottom = material.region
        return (right - left) * photo.width / ((bottom - top) * photo.height)


def _finest(material: Material) -> NDArray[np.float32]:
    """A material's region (S, S, 3) in [0, 1]."""
    from PIL import Image

    with Image.open(PHOTO_FOLDER / f"{material.photo}.jpg") as file:
        photo = file.convert("RGB")
    left, top, right, bottom = material.region
    box = (left * photo.width, top * photo.height, right * photo.width, bottom * photo.height)
    cut = photo.resize((TEXELS, TEXELS), Image.Resampling.BICUBIC, box=box)
    colours: NDArray[np.float32] = np.asarray(cut, dtype=np.float32) / np.float32(255)
    if material.colour is None:
        return colours
    contrast = 1 + _CONTRAST * (colours / colours.mean() - 1)
    tinted = contrast * np.array(material.colour, dtype=np.float32)
    clipped: NDArray[np.float32] = np.clip(tinted, 0, 1).astype(np.float32)
    return clipped


def look_up(
    atlas: Atlas,
    material: NDArray[np.int64],
    place: NDArray[np.float64],
    footprint: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Read materials that are repeated by reflection.

    Args:
        atlas: of the room's photographs.
        material: (P,) numbers of materials.
        place: (P, 2) across and down, in sides of a material.
        footprint: (P,) side of a pixel, in sides of a material; chooses the level whose texels
            are about as large.

    Returns:
        (P, 3) colours in [0, 1], interpolated bilinearly in one level.
    """
    level = np.rint(np.log2(np.maximum(footprint * TEXELS, 1)))
    level = np.minimum(level, len(atlas.first) - 1).astype(np.int64)  # (P,)
    side = TEXELS >> level
    folded = place - 2 * np.floor(place / 2 + 0.5)  # -1 .. 1, the period of the reflection
    inner = np.clip(np.abs(folded) * side[:, None] - 0.5, 0, side[:, None] - 1)
    corner = np.minimum(np.floor(inner), side[:, None] - 2)
    across, down = (inner - corner).astype(np.float32).T[:, :, None]
    column, line = corner.astype(np.int64).T
    first = atlas.first[level] + (material * side + line) * side + column
    texels = atlas.texels
    upper = (1 - across) * texels[first] + across * texels[first + 1]
    lower = (1 - across) * texels[first + side] + across * texels[first + side + 1]
    mixed: NDArray[np.float32] = (1 - down) * upper + down * lower
    return mixed
