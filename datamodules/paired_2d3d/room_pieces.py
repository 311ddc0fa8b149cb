"""Pieces of a procedural room and the furniture made of them.

A piece stands upright in the room's own frame: x east, y north, z up, the origin in the middle of
the floor. Lengths are metres, angles radians.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.paired_2d3d.room_solids import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from datamodules.paired_2d3d.room_textures import Material


class Skin(NamedTuple):
    """How a material lies on a piece.

    Attributes:
        material: what is seen.
        span: metres that the material's width and height cover.
        shift: of its middle, in sides of the material.
        tint: factor of each colour channel.
    """

    material: Material
    span: tuple[float, float]
    shift: tuple[float, float]
    tint: tuple[float, float, float]


class Piece(NamedTuple):
    """One solid of a room.

    Attributes:
        shape: box, cylinder or sphere.
        centre: x, y, z.
        half: half extents along the piece's own axes.
        yaw: turn of its own axes about the vertical.
        segment: number of its class.
        instance: number of the thing that it is part of.
        skin: its surface.
    """

    shape: Shape
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    yaw: float
    segment: int
    instance: int
    skin: Skin


class Part(NamedTuple):
    """A solid of a piece of furniture in the furniture's own frame, which stands at z = 0."""

    shape: Shape
    centre: tuple[float, float, float]
    half: tuple[float, float, float]


class Furniture(NamedTuple):
    """Solids of one piece of furniture, and the radius of the floor that it takes."""

    parts: list[Part]
    radius: float


def make_table(rng: np.random.Generator) -> Furniture:
    """A top on four legs, square or round."""
    x, y = rng.uniform(0.32, 0.5), rng.uniform(0.26, 0.36)
    height, leg, thick = rng.uniform(0.45, 0.72), rng.uniform(0.03, 0.045), 0.03
    round_top = rng.random() < 0.3
    if round_top:
        x = y = rng.uniform(0.32, 0.42)
    top = Shape.CYLINDER if round_top else Shape.BOX
    inset = 0.68 if round_top else 1.0
    legs = _legs(x * inset - leg, y * inset - leg, height - 2 * thick, leg, rng)
    parts = [Part(top, (0, 0, height - thick), (x, y, thick)), *legs]
    return Furniture(parts, x if round_top else math.hypot(x, y))


def make_chair(rng: np.random.Generator) -> Furniture:
    """A seat on four legs with a back."""
    side, seat, back = rng.uniform(0.19, 0.24), rng.uniform(0.38, 0.46), rng.uniform(0.36, 0.46)
    leg, thick = rng.uniform(0.022, 0.032), 0.025
    parts = [
        Part(Shape.BOX, (0, 0, seat - thick), (side, side, thick)),
        Part(Shape.BOX, (0, side - thick, seat + back / 2), (side, thick, back / 2)),
        *_legs(side - leg, side - leg, seat - 2 * thick, leg, rng),
    ]
    return Furniture(parts, math.hypot(side, side))


def make_lamp(rng: np.random.Generator) -> Furniture:
    """A shade, ball or drum, on a pole on a foot."""
    height, foot, shade = rng.uniform(0.9, 1.35), rng.uniform(0.13, 0.18), rng.uniform(0.12, 0.2)
    pole = rng.uniform(0.02, 0.03)
    parts = [
        Part(Shape.CYLINDER, (0, 0, 0.025), (foot, foot, 0.025)),
        Part(Shape.CYLINDER, (0, 0, height / 2), (pole, pole, height / 2)),
    ]
    if rng.random() < 0.5:
        parts.append(Part(Shape.SPHERE, (0, 0, height), (shade, shade, shade)))
    else:
        parts.append(Part(Shape.CYLINDER, (0, 0, height), (shade, shade, 0.75 * shade)))
    return Furniture(parts, max(foot, shade))


def make_shelf(rng: np.random.Generator) -> Furniture:
    """Boards between two sides."""
    x, y = rng.uniform(0.28, 0.42), rng.uniform(0.12, 0.16)
    height, boards, thick = rng.uniform(0.75, 1.1), int(rng.integers(3, 5)), 0.02
    sides = [
        Part(Shape.BOX, (end * (x - thick), 0, height / 2), (thick, y, height / 2))
        for end in (-1, 1)
    ]
    places = np.linspace(0.08, height - thick, boards).tolist()
    shelves = [Part(Shape.BOX, (0, 0, place), (x - 2 * thick, y, thick)) for place in places]
    return Furniture(sides + shelves, math.hypot(x, y))


MAKERS: tuple[Callable[[np.random.Generator], Furniture], ...] = (
    make_table,
    make_chair,
    make_lamp,
    make_shelf,
)


def _legs(x: float, y: float, height: float, half: float, rng: np.random.Generator) -> list[Part]:
    """Four legs at (±x, ±y) from the floor up to a height."""
    shape = Shape.CYLINDER if rng.random() < 0.5 else Shape.BOX
    return [
        Part(shape, (east * x, north * y, height / 2), (half, half, height / 2))
        for east in (-1, 1)
        for north in (-1, 1)
    ]
