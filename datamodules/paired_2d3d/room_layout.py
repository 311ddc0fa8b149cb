"""Random furnished rooms: which pieces, where, with which materials, and where the cameras stand.

Eight classes: floor, wall, rug, picture, window, crate, pouf, furniture. Pictures and windows are
the same framed boards, crates and poufs the same boxes and cylinders: only what they are covered
with tells them apart. Rugs lie on the floor with the floor's geometry. Furniture shares its
materials with all of these and is told by its geometry.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from datamodules.paired_2d3d.room_cameras import Plan, draw_cameras
from datamodules.paired_2d3d.room_pieces import MAKERS, Part, Piece, Skin
from datamodules.paired_2d3d.room_solids import Shape, Solids
from datamodules.paired_2d3d.room_textures import (
    CLASS_NAMES,
    MATERIALS,
    Material,
    PhotoSet,
    aspect,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TINT = 0.09  # of a channel, either way
_SHADE = 0.15  # of all channels, either way
_WALL_SHARES = (0.5, 0.35, 0.15)  # rooms of 2, 3 and 4 walls
_HALF_TURN = math.pi


class Room(NamedTuple):
    """A furnished room of K solids in the world.

    Attributes:
        solids: their geometry.
        segment: (K,) int64 classes, numbers in ``CLASS_NAMES``.
        instance: (K,) int64 things; a thing may be several solids.
        skins: of the K solids.
        light: (3,) metres, the lamp at the ceiling.
        image_poses: (V, 4, 4) camera to world, OpenCV axes: cameras that take pictures.
        extra_poses: (E, 4, 4) cameras that only add to the cloud.
    """

    solids: Solids
    segment: NDArray[np.int64]
    instance: NDArray[np.int64]
    skins: tuple[Skin, ...]
    light: NDArray[np.float64]
    image_poses: NDArray[np.float64]
    extra_poses: NDArray[np.float64]


def draw_room(
    rng: np.random.Generator, photos: PhotoSet, images: int = 3, extra_views: int = 4
) -> Room:
    """Furnish a room at random.

    Args:
        rng: source of all its randomness.
        photos: which photographs its materials come from.
        images: cameras that take pictures.
        extra_views: cameras that only add to the cloud.
    """
    builder = _Furnisher(rng, photos)
    builder.build()
    turn = rng.uniform(-math.pi, math.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    plan = Plan(builder.size, builder.walls, builder.obstacles())
    poses = draw_cameras(rng, plan, images, extra_views)
    world = np.eye(4)
    world[:2, :2] = rotation
    pieces = builder.pieces
    solids = Solids(
        shape=np.array([piece.shape for piece in pieces], dtype=np.int64),
        centre=np.array([piece.centre for piece in pieces]) @ world[:3, :3].T,
        axes=np.stack([_upright_axes(piece.yaw + turn) for piece in pieces]),
        half=np.array([piece.half for piece in pieces]),
    )
    return Room(
        solids,
        segment=np.array([piece.segment for piece in pieces], dtype=np.int64),
        instance=np.array([piece.instance for piece in pieces], dtype=np.int64),
        skins=tuple(piece.skin for piece in pieces),
        light=world[:3, :3] @ builder.light,
        image_poses=world @ poses[:images],
        extra_poses=world @ poses[images:],
    )


def _upright_axes(yaw: float) -> NDArray[np.float64]:
    """Rows are the axes of a solid turned about the vertical."""
    cosine, sine = math.cos(yaw), math.sin(yaw)
    return np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])


class _Furnisher:
    """Puts pieces into one room, in the room's own frame."""

    def __init__(self, rng: np.random.Generator, photos: PhotoSet) -> None:
        self.rng = rng
        self.materials = MATERIALS[photos]
        self.size = rng.uniform(1.95, 2.4, 2)  # east to west, south to north
        self.height = rng.uniform(1.35, 1.65)
        self.walls = int(rng.choice([2, 3, 4], p=_WALL_SHARES))
        self.light = np.append(rng.uniform(-0.2, 0.2, 2) * self.size, self.height + 0.7)
        self.pieces: list[Piece] = []
        self.taken: list[tuple[float, float, float]] = []  # x, y, radius of what stands around
        self._instances = 0

    def build(self) -> None:
        """Put everything in."""
        self._add_shell()
        self._add_hangings()
        self._add_rugs()
        for _ in range(int(self.rng.integers(1, 4))):
            self._add_furniture()
        self._add_crates_and_poufs(int(self.rng.integers(4, 8)))

    def obstacles(self) -> NDArray[np.float64]:
        """Circles (O, 3) of floor, x, y and radius, below what reaches to the cameras."""
        tall = [
            (*piece.centre[:2], math.hypot(*piece.half[:2]))
            for piece in self.pieces
            if CLASS_NAMES[piece.segment] == "furniture" and piece.centre[2] + piece.half[2] > 1
        ]
        return np.array(tall).reshape(-1, 3)

    def _thing(self) -> int:
        self._instances += 1
        return self._instances - 1

    def _choose(self, segment: str) -> Material:
        materials = self.materials[segment]
        return materials[int(self.rng.integers(len(materials)))]

    def _skin(self, material: Material) -> Skin:
        """A material at a random scale and place, in nearly its own colour."""
        span = self.rng.uniform(*material.span)
        x, y = self.rng.uniform(-1, 1, 2).tolist()
        return Skin(material, (span * aspect(material), span), (x, y), self._tint())

    def _tint(self) -> tuple[float, float, float]:
        shade = 1 + self.rng.uniform(-_SHADE, _SHADE)
        red, green, blue = (shade * (1 + self.rng.uniform(-_TINT, _TINT, 3))).tolist()
        return red, green, blue

    def _put(self, part: Part, segment: str, instance: int, skin: Skin, yaw: float = 0.0) -> None:
        number = CLASS_NAMES.index(segment)
        self.pieces.append(Piece(part.shape, part.centre, part.half, yaw, number, instance, skin))

    def _add_shell(self) -> None:
        """Floor and walls, whose inner sides are the room's limits."""
        x, y = (self.size / 2).tolist()
        thick, half = 0.05, self.height / 2
        floor = Part(Shape.BOX, (0, 0, -thick), (x, y, thick))
        self._put(floor, "floor", self._thing(), self._skin(self._choose("floor")))
        skin = self._skin(self._choose("wall"))
        for wall in range(self.walls):
            length, distance = (x, y) if wall % 2 == 0 else (y, x)
            yaw, (east, north) = _wall_frame(wall)
            place = (east * (distance + thick), north * (distance + thick), half)
            part = Part(Shape.BOX, place, (length, thick, half))
            self._put(part, "wall", self._thing(), skin, yaw)

    def _add_hangings(self) -> None:
        """One to three framed boards on every wall: pictures and windows at even odds."""
        kinds = ["picture", "window"]
        self.rng.shuffle(kinds)
        for wall in range(self.walls):
            length = self.size[wall % 2]
            count = int(self.rng.integers(2, 4)) if length > 2.2 else 2
            for slot in range(count):
                kind = kinds.pop() if kinds else str(self.rng.choice(["picture", "window"]))
                room = length / count
                half = np.minimum(self.rng.uniform((0.22, 0.2), (0.42, 0.36)), room / 2 - 0.06)
                spare = room / 2 - half[0] - 0.05
                along = (slot + 0.5) * room - length / 2 + self.rng.uniform(-spare, spare)
                up = self.rng.uniform(0.55, self.height - half[1] - 0.1)
                up = max(up, half[1] + 0.35)
                self._hang(wall, (along, up), half, kind)

    def _hang(
        self, wall: int, place: tuple[float, float], half: NDArray[np.float64], kind: str
    ) -> None:
        """A board with a frame around it, flat on a wall."""
        distance = self.size[1 - wall % 2] / 2
        yaw, (east, north) = _wall_frame(wall)
        along = (north * place[0], -east * place[0])
        instance = self._thing()
        frame = self._skin(self._choose("furniture"))
        for depth, margin in ((0.012, 0.035), (0.02, 0.0)):
            reach = distance - depth
            centre = (east * reach + along[0], north * reach + along[1], place[1])
            part = Part(Shape.BOX, centre, (half[0] + margin, depth, half[1] + margin))
            skin = frame if margin else self._board_skin(self._choose(kind), half)
            self._put(part, kind, instance, skin, yaw)

    def _board_skin(self, material: Material, half: NDArray[np.float64]) -> Skin:
        """A crop of a whole photograph that fills a board."""
        share = self.rng.uniform(0.65, 1.0)  # of the photograph, along its tighter side
        shape = aspect(material)
        height = max(2 * half[1], 2 * half[0] / shape) / share
        span = (height * shape, height)
        spare = [max(0.5 - half[axis] / span[axis], 0.0) for axis in range(2)]
        x, y = (self.rng.uniform(-1, 1, 2) * spare).tolist()
        return Skin(material, span, (0.5 + x, 0.5 + y), self._tint())

    def _add_rugs(self) -> None:
        """One or two rugs, each in a half of its own."""
        count = int(self.rng.integers(1, 3))
        first = int(self.rng.integers(2))
        for number in range(count):
            half_room = self.size / 2 * ((0.5, 1.0) if count == 2 else (1.0, 1.0))
            half = np.minimum(self.rng.uniform(0.4, 0.75, 2), half_room - 0.1)
            spare = half_room - half - 0.04
            centre = self.rng.uniform(-spare, spare)
            if count == 2:
                centre[0] += self.size[0] / 4 * (1 if (number + first) % 2 else -1)
            part = Part(Shape.BOX, (centre[0], centre[1], 0.006), (half[0], half[1], 0.006))
            self._put(part, "rug", self._thing(), self._skin(self._choose("rug")))

    def _find_place(self, radius: float) -> tuple[float, float] | None:
        """A free circle of floor, or None after many tries."""
        limit = self.size / 2 - radius - 0.03
        for _ in range(40):
            x, y = self.rng.uniform(-limit, limit).tolist()
            if all(math.hypot(x - a, y - b) > radius + r + 0.03 for a, b, r in self.taken):
                self.taken.append((x, y, radius))
                return x, y
        return None

    def _add_furniture(self) -> None:
        """A table, chair, lamp or shelf wherever there is room."""
        furniture = MAKERS[int(self.rng.integers(len(MAKERS)))](self.rng)
        place = self._find_place(furniture.radius)
        if place is None:
            return
        yaw = self.rng.uniform(-_HALF_TURN, _HALF_TURN)
        instance, skin = self._thing(), self._skin(self._choose("furniture"))
        axes = _upright_axes(yaw)
        for part in furniture.parts:
            x, y, z = (np.array(part.centre) @ axes).tolist()
            moved = part._replace(centre=(x + place[0], y + place[1], z))
            self._put(moved, "furniture", instance, skin, yaw)

    def _add_crates_and_poufs(self, count: int) -> None:
        """Boxes and cylinders, some with a smaller one on top; smaller where it is crowded."""
        placed = 0
        while placed < count:
            half = self.rng.uniform(0.17, 0.27, 3) * (1, 1, 0.9)
            place = None
            while place is None:
                half *= 0.9
                place = self._find_place(math.hypot(half[0], half[1]))
            self._put_block(place, 0.0, half)
            placed += 1
            if placed < count and self.rng.random() < 0.2:
                self._put_block(place, 2 * half[2], half * self.rng.uniform(0.6, 0.8))
                placed += 1

    def _put_block(
        self, place: tuple[float, float], bottom: float, half: NDArray[np.float64]
    ) -> None:
        kind = str(self.rng.choice(["crate", "pouf"]))
        shape = Shape.BOX if self.rng.random() < 0.6 else Shape.CYLINDER
        x, y, z = half.tolist()
        if shape == Shape.CYLINDER:
            x = y = math.sqrt(x * y)
        part = Part(shape, (*place, bottom + z), (x, y, z))
        yaw = self.rng.uniform(-_HALF_TURN, _HALF_TURN)
        self._put(part, kind, self._thing(), self._skin(self._choose(kind)), yaw)


def _wall_frame(wall: int) -> tuple[float, tuple[int, int]]:
    """Yaw at which a piece's -y side faces inward, and the outward direction (east, north).

    Walls 0 to 3 stand north, east, south and west.
    """
    return ((0.0, (0, 1)), (-math.pi / 2, (1, 0)), (math.pi, (0, -1)), (math.pi / 2, (-1, 0)))[wall]
