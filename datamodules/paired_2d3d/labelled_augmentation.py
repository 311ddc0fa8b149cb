"""Random and fixed changes of labelled clouds: training augmentation and test-time copies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from datamodules.paired_2d3d.geometry_augmentation import axis_turn
from datamodules.paired_2d3d.labelled_tree import LabelledCloud

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VOTE_SCALES = (0.95, 1.0, 1.05)
VOTES = 4 * len(_VOTE_SCALES) + 1
"""Copies of test-time augmentation: four quarter turns at three scales, and one mirrored."""


@dataclass(frozen=True)
class LabelledAugmentation:
    """Changes of a training cloud, each drawn anew (section 4 of arXiv 2510.23607, released code).

    Attributes:
        turn: Largest turn around z, either way, in degrees.
        turn_chance: Chance of a turn around z.
        tilt: Largest turn around x and around y, in degrees; each has a chance of one half.
        scale: Smallest and largest factor of the coordinates.
        flip_chance: Chance of mirroring x, and of mirroring y.
        jitter: Standard deviation of each coordinate in metres, cut off at four of them.
        drop_chance: Chance that a fifth of the points is left out.
        contrast_chance: Chance that each colour channel is stretched to its full range and mixed
            with the original in a random share.
        tint: Largest shift of each colour channel of the whole cloud, in [0, 1].
        colour_noise: Standard deviation of the colour of each point, in [0, 1].
    """

    turn: float = 180.0
    turn_chance: float = 0.5
    tilt: float = 180 / 64
    scale: tuple[float, float] = (0.9, 1.1)
    flip_chance: float = 0.5
    jitter: float = 0.005
    drop_chance: float = 0.2
    contrast_chance: float = 0.2
    tint: float = 0.05
    colour_noise: float = 0.05

    def __post_init__(self) -> None:
        for name in ("turn_chance", "flip_chance", "drop_chance", "contrast_chance"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: must be 0 .. 1 (data.init_args.augmentation)")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"scale={tuple(self.scale)}: must be two factors > 0, the smaller first "
                "(data.init_args.augmentation)"
            )
        for name in ("turn", "tilt", "jitter", "tint", "colour_noise"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value}: must be >= 0 (data.init_args.augmentation)")


def augment(
    cloud: LabelledCloud, options: LabelledAugmentation, rng: np.random.Generator
) -> LabelledCloud:
    """A changed copy of a centred cloud; normals follow the coordinates."""
    if rng.random() < options.drop_chance:
        kept = rng.random(len(cloud.segment)) >= 0.2
        kept[rng.integers(len(kept))] = True
        cloud = cloud.rows(np.flatnonzero(kept))
    matrix = _draw_matrix(options, rng)
    coord = cloud.coord @ (matrix * rng.uniform(*options.scale)).T.astype(np.float32)
    noise = rng.normal(0.0, 1.0, coord.shape).clip(-4, 4) * options.jitter
    return replace(
        cloud,
        coord=coord + noise.astype(np.float32),
        normal=cloud.normal @ matrix.T.astype(np.float32),
        colour=_change_colour(cloud.colour, options, rng),
    )


def _draw_matrix(options: LabelledAugmentation, rng: np.random.Generator) -> NDArray[np.float64]:
    """Orthogonal matrix (3, 3) of turns and mirrors; every number is drawn, used or not."""
    chances = rng.random(5)
    angles = np.radians(rng.uniform(-1, 1, 3) * (options.turn, options.tilt, options.tilt))
    angles *= chances[:3] < (options.turn_chance, 0.5, 0.5)
    signs = np.where(chances[3:] < options.flip_chance, -1.0, 1.0)
    turned = axis_turn(2, angles[0]) @ axis_turn(0, angles[1]) @ axis_turn(1, angles[2])
    matrix: NDArray[np.float64] = np.diag([*signs, 1.0]) @ turned
    return matrix


def _change_colour(
    colour: NDArray[np.float32], options: LabelledAugmentation, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Colours (N, 3) in [0, 1] stretched, tinted and made noisy, and still in [0, 1]."""
    stretched, share = rng.random() < options.contrast_chance, rng.random()
    tint = rng.uniform(-1, 1, 3) * options.tint
    noise = rng.normal(0.0, 1.0, colour.shape) * options.colour_noise
    values = colour.astype(np.float64)
    if stretched:
        low, high = values.min(axis=0), values.max(axis=0)
        full = (values - low) / np.where(high > low, high - low, 1.0)
        values = (1 - share) * values + share * full
    changed: NDArray[np.float32] = np.clip(values + tint + noise, 0, 1).astype(np.float32)
    return changed


def crop_sphere(cloud: LabelledCloud, most: int, rng: np.random.Generator) -> LabelledCloud:
    """The ``most`` points nearest to a random one, in their old order; all if they are fewer."""
    centre = cloud.coord[rng.integers(len(cloud.segment))]
    if len(cloud.segment) <= most:
        return cloud
    distance = ((cloud.coord - centre) ** 2).sum(axis=1)
    nearest = np.argpartition(distance, most - 1)[:most]
    return cloud.rows(np.sort(nearest).astype(np.int64))


def vote_copies(cloud: LabelledCloud) -> Iterator[LabelledCloud]:
    """The `VOTES` copies of a centred cloud whose predictions are averaged (section 4)."""
    matrices = [
        (axis_turn(2, quarter * math.pi / 2), scale)
        for scale in _VOTE_SCALES
        for quarter in range(4)
    ]
    # Mirroring both x and y, as released, would only repeat the half turn.
    for matrix, scale in [*matrices, (np.diag([-1.0, 1.0, 1.0]), 1.0)]:
        yield replace(
            cloud,
            coord=cloud.coord @ (matrix * scale).T.astype(np.float32),
            normal=cloud.normal @ matrix.T.astype(np.float32),
        )
