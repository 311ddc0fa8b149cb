"""How the views of a cloud are drawn and changed; the defaults are the paper's."""

from __future__ import annotations

import math
from dataclasses import dataclass

_CHANCES = (
    "drop_colour",
    "drop_normal",
    "drop_some",
    "drop_some_share",
    "colour_jitter_chance",
    "colour_shift_chance",
    "rotate_chance",
    "flip_chance",
    "elastic_chance",
)
_SIZES = ("brightness", "contrast", "saturation", "colour_shift", "rotate", "tilt", "jitter")


@dataclass(frozen=True)
class ViewOptions:
    """Views and augmentation of training clouds (arXiv 2510.23607, appendix; as released).

    A chance of 0 switches a change off. Colours are changed once for both global views together
    and anew for every local view; geometry is changed anew for every view.

    Attributes:
        global_share: least and most points of the second global view, as shares of the most
            points a view may have.
        local_views: number of local views.
        local_share: least and most points of a local view, likewise.
        drop_colour: chance that the whole cloud loses its colours.
        drop_normal: chance that it loses its normals.
        drop_some: chance that some of its points lose their colours, and likewise normals.
        drop_some_share: share of the points that do.
        brightness: colours are multiplied by 1 - brightness .. 1 + brightness.
        contrast: and moved from or to their mean grey by such a factor.
        saturation: and from or to their own grey by such a factor.
        hue: hue is turned by up to this share of the circle, 0 .. 0.5.
        colour_jitter_chance: chance of each of these four, which come in random order.
        colour_shift: largest offset of each colour channel, of the range 0 .. 1.
        colour_shift_chance: chance of the offset.
        centre: whether the middle of a view, and in z its lowest point, becomes the origin.
        scale: least and most enlargement.
        rotate: largest turn about z, radians.
        tilt: largest turn about x and about y, radians.
        rotate_chance: chance of each of the three turns.
        flip_chance: chance that x, and likewise y, is mirrored.
        jitter: standard deviation of the noise on coordinates, metres.
        jitter_clip: largest such noise, metres.
        elastic: granularity and magnitude, in metres, of each elastic distortion in turn.
        elastic_chance: chance that a view is distorted.

    Raises:
        ValueError: if a value is out of range.
    """

    global_share: tuple[float, float] = (0.4, 1.0)
    local_views: int = 4
    local_share: tuple[float, float] = (0.1, 0.4)
    drop_colour: float = 0.2
    drop_normal: float = 0.2
    drop_some: float = 0.5
    drop_some_share: float = 0.2
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.02
    colour_jitter_chance: float = 0.8
    colour_shift: float = 0.05
    colour_shift_chance: float = 0.95
    centre: bool = True
    scale: tuple[float, float] = (0.9, 1.1)
    rotate: float = math.pi
    tilt: float = math.pi / 64
    rotate_chance: float = 0.8
    flip_chance: float = 0.5
    jitter: float = 0.005
    jitter_clip: float = 0.02
    elastic: tuple[tuple[float, float], ...] = ((0.2, 0.4), (0.8, 1.6))
    elastic_chance: float = 0.95

    def __post_init__(self) -> None:
        for name in _CHANCES:
            if not 0 <= getattr(self, name) <= 1:
                self._fail(name, "must be 0 .. 1")
        for name in _SIZES:
            if not 0 <= getattr(self, name) < math.inf:
                self._fail(name, "must be >= 0")
        for name in ("global_share", "local_share"):
            least, most = getattr(self, name)
            if not 0 < least <= most <= 1:
                self._fail(name, "must be the least and the most, 0 < least <= most <= 1")
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            self._fail("scale", "must be the least and the most, 0 < least <= most")
        if self.local_views < 0:
            self._fail("local_views", "must be >= 0")
        if not 0 <= self.hue <= 0.5:
            self._fail("hue", "must be 0 .. 0.5")
        if self.jitter_clip <= 0:
            self._fail("jitter_clip", "must be > 0; jitter 0 switches the noise off")
        if any(not (granularity > 0 and size >= 0) for granularity, size in self.elastic):
            self._fail("elastic", "must be pairs of a granularity > 0 and a magnitude >= 0")

    def _fail(self, name: str, expected: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)}: {expected} (data.init_args.views.{name})")
