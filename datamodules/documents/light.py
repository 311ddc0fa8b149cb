"""Light that comes from one side of the picture and falls off towards the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.documents.keyed_draws import KeyedDraws

SIDES = ("left", "right", "top", "bottom")


class Light(NamedTuple):
    """Light on B pictures.

    Attributes:
        side: (B,) int64, position in ``SIDES``.
        depth: (B,) float64, share of the light that the far side lacks.
        power: (B,) float64, exponent of the fall-off; above 1 it starts slowly.
    """

    side: NDArray[np.int64]
    depth: NDArray[np.float64]
    power: NDArray[np.float64]


def draw_light(draws: KeyedDraws, count: int) -> Light:
    """Choose the light of ``count`` pictures."""
    return Light(
        side=draws.integers(np.full(count, len(SIDES))),
        depth=draws.uniform(0.42, 0.62),
        power=draws.uniform(0.8, 1.5),
    )


def light_field(light: Light, side: int) -> NDArray[np.float32]:
    """Factors (B, side, side) float32, 1 at the side the light comes from."""
    distance = (np.arange(side) + 0.5) / side
    fall = distance ** light.power[:, None]  # (B, S)
    profile = (1 - light.depth[:, None] * fall).astype(np.float32)
    from_end = light.side % 2 == 1  # right, bottom
    profile[from_end] = profile[from_end, ::-1]
    vertical = light.side >= SIDES.index("top")
    profile = profile.reshape(-1, 1, side)
    return np.where(vertical[:, None, None], profile.transpose(0, 2, 1), profile)
