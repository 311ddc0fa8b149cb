"""The embedded paired data: procedural furnished rooms in Pointcept's layout, written once.

Numbers measured on them are to be called "procedural": they say nothing about real rooms.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from datamodules.keyed_random import keyed_generator
from datamodules.paired_2d3d.rgbd_frames import RgbdFrame
from datamodules.paired_2d3d.room_layout import draw_room
from datamodules.paired_2d3d.room_rendering import RoomRenderer, room_camera
from datamodules.paired_2d3d.room_textures import CLASS_NAMES, PHOTO_FOLDER, PhotoSet, photographs
from datamodules.paired_2d3d.scene_tree import CLASS_NAMES as CLASS_FILE
from datamodules.paired_2d3d.scene_writing import (
    ConversionOptions,
    SceneItems,
    convert_scene,
    write_split,
)
from datamodules.written_once import ensure_written

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

RoomSplit = Literal["train", "val", "test", "test_unseen"]

SPLITS: dict[RoomSplit, PhotoSet] = {
    "train": "seen",
    "val": "seen",
    "test": "seen",
    "test_unseen": "unseen",
}
"""Splits and the photographs of their rooms, see ``room_textures``."""

COUNTS: dict[RoomSplit, int] = {"train": 160, "val": 24, "test": 40, "test_unseen": 40}

_FORMAT = 1  # to be raised when the layout on disk changes
_ROOM_KEY = 0x726F6F6D  # keeps the rooms' random numbers apart from other uses of a seed
_PROGRESS_FROM = 32  # rooms
_SOURCES = (
    "cloud_fusion",
    "normals",
    "rgbd_frames",
    "room_cameras",
    "room_layout",
    "room_pieces",
    "room_rendering",
    "room_solids",
    "room_textures",
    "rooms",
    "scene_writing",
    "visibility",
)


def room_tree(
    folder: Path,
    counts: Mapping[RoomSplit, int] | None = None,
    seed: int = 0,
    image_size: int = 128,
    grid_size: float = 0.06,
    images: int = 3,
    extra_views: int = 4,
) -> Path:
    """Make sure that the procedural rooms lie on disk, and say where.

    Rooms of one split never occur in another. Those of train, val and test share their
    photographs (brick, cell, chelsea, coffee, grass, gravel, hubble_deep_field, retina, rocket);
    those of test_unseen are covered with astronaut, camera and clock_motion alone.

    Args:
        folder: for caches of any arguments; made if missing.
        counts: rooms of each split, ``COUNTS`` by default; splits left out have none.
        seed: of all rooms.
        image_size: pixels along a side of the square images.
        grid_size: metres between the points of a cloud.
        images: of each room, in one item if at most four.
        extra_views: further depth maps, of three quarters of the size, that add to the cloud.

    Returns:
        Root in Pointcept's layout, with class_names.json beside the splits.

    Raises:
        ValueError: if a number is out of range.
        DataError: if the folder cannot be written.
    """
    chosen = dict(COUNTS if counts is None else counts)
    _check(chosen, seed, image_size, images, extra_views)
    options = ConversionOptions(grid_size=grid_size)
    shape = (image_size, images, extra_views)
    digest = hashlib.sha256(json.dumps([_FORMAT, chosen, seed, shape, grid_size]).encode())
    photos = sorted(set().union(*(photographs(group) for group in ("seen", "unseen"))))
    files = [Path(__file__).with_name(f"{name}.py") for name in _SOURCES]
    for path in files + [PHOTO_FOLDER / f"{name}.jpg" for name in photos]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    rooms = sum(chosen.values())
    name = f"rooms-{rooms}-{image_size}px-seed{seed}-{digest.hexdigest()[:12]}"
    write = partial(_write_rooms, counts=chosen, seed=seed, shape=shape, options=options)
    return ensure_written(folder / name, write)


def room_frames(
    seed: int, split: RoomSplit, number: int, image_size: int = 128, images: int = 3, extra: int = 4
) -> list[RgbdFrame]:
    """Furnish and render one room.

    Args:
        seed: of all rooms.
        split: of the room.
        number: of the room in its split.
        image_size: pixels along a side.
        images: frames that become images of the item.
        extra: frames of three quarters of the size that only add to the cloud.
    """
    room = draw_room(_room_generator(seed, split, number), SPLITS[split], images, extra)
    renderer = RoomRenderer(room, SPLITS[split])
    poses = (*room.image_poses, *room.extra_poses)
    sizes = [image_size] * images + [image_size * 3 // 4] * extra
    return [
        _frame(renderer, pose, size, f"{row:02d}", row < images)
        for row, (pose, size) in enumerate(zip(poses, sizes, strict=True))
    ]


def _check(
    counts: dict[RoomSplit, int], seed: int, image_size: int, images: int, extra_views: int
) -> None:
    for split, count in counts.items():
        if split not in SPLITS or count < 0:
            raise ValueError(f"counts={counts}: expected numbers >= 0 of {', '.join(SPLITS)}")
    for name, value, least in (
        ("seed", seed, 0),
        ("image_size", image_size, 8),
        ("images", images, 1),
        ("extra_views", extra_views, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be >= {least} for procedural rooms")


def _room_generator(seed: int, split: RoomSplit, number: int) -> np.random.Generator:
    generator = keyed_generator(_ROOM_KEY, seed, list(SPLITS).index(split), number)
    words = torch.randint(1 << 32, (4,), generator=generator)
    return np.random.default_rng(words.tolist())


def _frame(
    renderer: RoomRenderer, pose: NDArray[np.float64], image_size: int, name: str, in_items: bool
) -> RgbdFrame:
    camera = room_camera(pose, image_size)
    seen = renderer.render(camera)
    return RgbdFrame(
        name=name,
        colour=seen.colour,
        depth=seen.depth,
        pose=pose,
        intrinsics=camera.intrinsics,
        depth_intrinsics=camera.intrinsics,
        segment=seen.segment,
        instance=seen.instance,
        in_items=in_items,
    )


def _write_rooms(
    root: Path,
    counts: dict[RoomSplit, int],
    seed: int,
    shape: tuple[int, int, int],
    options: ConversionOptions,
) -> None:
    """Write all rooms behind a progress bar."""
    from rich.progress import Progress

    total = sum(counts.values())
    with Progress(transient=True, disable=total < _PROGRESS_FROM) as progress:
        task = progress.add_task("Rendering procedural rooms", total=total)
        for split, count in counts.items():
            items: SceneItems = {}
            for written in _convert_rooms(root, split, count, seed, shape, options):
                items |= written
                progress.advance(task)
            write_split(root, split, items)
    (root / CLASS_FILE).write_text(json.dumps(CLASS_NAMES))


def _convert_rooms(
    root: Path,
    split: RoomSplit,
    count: int,
    seed: int,
    shape: tuple[int, int, int],
    options: ConversionOptions,
) -> Iterator[SceneItems]:
    for number in range(count):
        frames = room_frames(seed, split, number, *shape)
        yield convert_scene(frames, root, split, f"{split}_{number:04d}", options)
