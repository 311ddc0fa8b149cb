"""The tree of procedural rooms: complete, labelled rightly, split apart, written once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datamodules.paired_2d3d import rooms
from datamodules.paired_2d3d.room_textures import CLASS_NAMES, MATERIALS, photographs
from datamodules.paired_2d3d.rooms import room_frames, room_tree
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.split_files import PairedItem, read_splits
from datamodules.paired_2d3d.tree_checks import check_items

COUNTS: dict[rooms.RoomSplit, int] = {"train": 3, "val": 1, "test": 1, "test_unseen": 1}
SMALL = {"counts": COUNTS, "image_size": 64, "grid_size": 0.08}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return room_tree(tmp_path_factory.mktemp("rooms"), **SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def items(root: Path) -> tuple[PairedItem, ...]:
    return read_splits(SceneTree(root), list(COUNTS))


def test_reader_finds_everything(root: Path, items: tuple[PairedItem, ...]) -> None:
    tree = SceneTree(root)
    check_items(tree, items)
    assert tree.class_names == CLASS_NAMES
    assert len(items) == 6
    assert all(len(item.images) == 3 for item in items)


def test_clouds_are_what_rooms_look_like(root: Path, items: tuple[PairedItem, ...]) -> None:
    tree = SceneTree(root)
    for item in items:
        cloud = tree.cloud(item.cloud)
        segment = tree.labels(item.cloud, "segment", len(cloud.coord))
        instance = tree.labels(item.cloud, "instance", len(cloud.coord))
        assert 1500 < len(cloud.coord) < 6000
        assert set(range(5)) <= set(segment.tolist()) <= set(range(8))
        np.testing.assert_allclose(np.linalg.norm(cloud.normal, axis=1), 1, atol=1e-5)
        # A thing has one class; floor and walls are flat, so their normals are known.
        for thing in np.unique(instance):
            assert len(np.unique(segment[instance == thing])) <= 2  # cells on a border
        floor, wall = segment == 0, segment == 1
        assert np.median(cloud.normal[floor][:, 2]) > 0.99
        assert np.median(np.abs(cloud.normal[wall][:, 2])) < 0.01
        assert np.median(cloud.coord[floor][:, 2]) == pytest.approx(0, abs=1e-3)
        cells = np.floor(cloud.coord / 0.08)
        assert len(np.unique(cells, axis=0)) > 0.99 * len(cells)


def test_images_show_most_points_in_their_own_colour_and_class(
    root: Path, items: tuple[PairedItem, ...]
) -> None:
    from PIL import Image

    for item in items:
        cloud = SceneTree(root).cloud(item.cloud)
        segment = SceneTree(root).labels(item.cloud, "segment", len(cloud.coord))
        split, scene = item.cloud.split("/")
        frames = room_frames(0, split, int(scene.rpartition("_")[2]), 64)  # type: ignore[arg-type]
        seen = np.zeros(len(cloud.coord), dtype=bool)
        for path, links, frame in zip(item.images, item.correspondences, frames, strict=False):
            column, row, point = np.load(root / links).astype(int).T
            seen[point] = True
            picture = np.asarray(Image.open(root / path), dtype=float) / 255
            error = np.abs(picture[row, column] - cloud.colour[point]).mean()
            shuffled = np.random.default_rng(0).permutation(point)
            assert error < 0.5 * np.abs(picture[row, column] - cloud.colour[shuffled]).mean()
            assert frame.segment is not None
            assert (frame.segment[row, column] == segment[point]).mean() > 0.9
        assert seen.mean() > 0.75


def test_photographs_of_unseen_rooms_occur_nowhere_else() -> None:
    assert photographs("unseen") == {"astronaut", "camera", "clock_motion"}
    assert not photographs("unseen") & photographs("seen")
    for groups in MATERIALS.values():
        assert tuple(groups) == CLASS_NAMES


def test_rooms_depend_on_seed_split_and_number_alone() -> None:
    first = room_frames(0, "train", 0, 32)[0]
    again = room_frames(0, "train", 0, 32)[0]
    np.testing.assert_array_equal(first.colour, again.colour)
    np.testing.assert_array_equal(first.pose, again.pose)
    for other in (room_frames(1, "train", 0, 32), room_frames(0, "val", 0, 32)):
        assert not np.allclose(first.pose, other[0].pose)


def test_files_are_the_same_again(root: Path, tmp_path: Path) -> None:
    again = room_tree(tmp_path, **SMALL)  # type: ignore[arg-type]
    assert again.name == root.name
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        assert (again / path).read_bytes() == (root / path).read_bytes()


def test_finished_tree_is_used_and_a_damaged_one_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[rooms.RoomSplit, int] = {"train": 1}
    root = room_tree(tmp_path, counts, image_size=32, grid_size=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(rooms, "draw_room", None)
        assert room_tree(tmp_path, counts, image_size=32, grid_size=0.1) == root
    (root / "train" / "train_0000" / "coord.npy").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        room_tree(tmp_path, counts, image_size=32, grid_size=0.1)
    assert len(np.load(root / "train" / "train_0000" / "coord.npy")) > 100
    assert room_tree(tmp_path, counts, seed=1, image_size=32, grid_size=0.1) != root


def test_those_who_start_together_write_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = rooms.write_split

    def count(root: Path, split: str, items: rooms.SceneItems) -> None:
        written.append(split)
        write(root, split, items)

    monkeypatch.setattr(rooms, "write_split", count)
    together = threading.Barrier(3)

    def ask(_: int) -> Path:
        together.wait()
        return room_tree(tmp_path, {"train": 2}, image_size=32, grid_size=0.1)

    # Locks belong to opened files, so threads hold them against each other as processes do.
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(ask, range(3)))
    assert written == ["train"]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [found.pop()]
    assert not found


def test_interrupted_writing_leaves_no_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rooms, "write_split", stop)
    with pytest.raises(KeyboardInterrupt):
        room_tree(tmp_path, {"train": 1}, image_size=32, grid_size=0.1)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "arguments",
    [{"counts": {"training": 1}}, {"counts": {"train": -1}}, {"seed": -1}, {"image_size": 2}],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        room_tree(tmp_path, **arguments)  # type: ignore[arg-type]


def test_split_files_name_rooms_of_their_split_alone(root: Path) -> None:
    clouds = []
    for split in COUNTS:
        content = json.loads((root / "splits" / f"{split}.json").read_text())
        assert len(content) == COUNTS[split]
        for key, item in content.items():
            assert item["pointclouds"] == f"data/{root.name}/{split}/{key.rpartition('_')[0]}"
            clouds.append(item["pointclouds"])
    assert len(set(clouds)) == len(clouds)
