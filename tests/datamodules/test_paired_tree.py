"""Reading of a root: split files, arrays, links; what is hostile or damaged is refused."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.paired_2d3d.correspondence import read_places
from datamodules.paired_2d3d.images import ImageAugmentation, read_image, read_image_size
from datamodules.paired_2d3d.patch_grid import PatchCrop, PatchGrid
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.split_files import image_paths, read_splits, split_names
from tests.datamodules.paired_roots import (
    paired_root,
    room_cameras,
    room_points,
    write_scene,
    write_split,
)


def test_paths_may_start_with_the_data_set_or_lie_in_it(tmp_path: Path) -> None:
    paired_root(tmp_path, train=1, val=0)
    entry = json.loads((tmp_path / "splits/train.json").read_text())["train0_0"]
    plain = json.loads(json.dumps(entry).replace("data/toy/", ""))
    write_split(tmp_path, "plain", {"train0_0": plain})
    tree = SceneTree(tmp_path)
    (item,), (same,) = read_splits(tree, ["train"]), read_splits(tree, ["plain"])
    assert item == same._replace(split="train")
    assert item.cloud == "train/train0"
    assert item.images[1] == "images/train/train0/color/1.png"
    assert split_names(tree) == ("plain", "train", "val")


@pytest.mark.parametrize("folder", ["", "data"])
def test_a_root_may_hold_several_data_sets(tmp_path: Path, folder: str) -> None:
    for name in ("one", "two"):
        (tmp_path / folder / name).mkdir(parents=True)
        paired_root(tmp_path / folder / name, train=1, val=0)
    tree = SceneTree(tmp_path)
    items = read_splits(tree, ["train"])
    assert [item.cloud for item in items] == [
        (Path(folder) / name / "train/train0").as_posix() for name in ("one", "two")
    ]
    assert len(image_paths(items)) == 4
    assert all(len(tree.cloud(item.cloud).coord) == 600 for item in items)


def test_a_key_of_two_splits_gives_two_items(tmp_path: Path) -> None:
    entries = [write_scene(tmp_path, area, "office") for area in ("Area_1", "Area_2")]
    write_split(tmp_path, "Area_1", {"office_0": entries[0]})
    write_split(tmp_path, "Area_2", {"office_0": entries[1]})
    items = read_splits(SceneTree(tmp_path), ["Area_1", "Area_2"])
    assert [item.cloud for item in items] == ["Area_1/office", "Area_2/office"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pointclouds": "../x"}, "leads out of the root"),
        ({"pointclouds": "/etc"}, "leads out of the root"),
        ({"pointclouds": "a\\b"}, "leads out of the root"),
        ({"pointclouds": "data/toy/../../x"}, "leads out of the root"),
        ({"images": []}, "pointclouds must be"),
        ({"pointclouds": "a", "images": ["b"]}, "1 images, but 0 correspondences"),
        ({"pointclouds": "a", "images": "b"}, "images must be a list"),
        ({"pointclouds": "a", "images": [1]}, "images must be a list"),
        (["a"], "expected an object"),
    ],
)
def test_unusable_items_are_named(tmp_path: Path, entry: object, message: str) -> None:
    write_split(tmp_path, "train", {"key7": entry})  # type: ignore[dict-item]
    with pytest.raises(DataError, match=rf"train\.json: item 'key7': .*{message}") as caught:
        read_splits(SceneTree(tmp_path), ["train"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "expected an object"), ("{", "cannot be read"), ('{"a":1,"a":2}', "'a' occurs twice")],
)
def test_unusable_split_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    write_split(tmp_path, "train", {})
    (tmp_path / "splits/train.json").write_text(text)
    with pytest.raises(DataError, match=rf"train\.json.*{message}"):
        read_splits(SceneTree(tmp_path), ["train"])
    with pytest.raises(DataError, match=r"test\.json: no such file"):
        read_splits(SceneTree(tmp_path), ["test"])


def test_a_folder_without_splits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no splits folder"):
        read_splits(SceneTree(tmp_path), ["train"])


def test_links_must_stay_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    paired_root(root, train=1, val=0)
    os.replace(root / "train/train0/coord.npy", tmp_path / "elsewhere/coord.npy")
    (root / "train/train0/coord.npy").symlink_to(tmp_path / "elsewhere/coord.npy")
    with pytest.raises(DataError, match="link that leads out of the root"):
        SceneTree(root).cloud("train/train0")
    # A link to the whole root is the user's own, and allowed.
    (tmp_path / "linked").symlink_to(root)
    assert len(read_splits(SceneTree(tmp_path / "linked"), ["train"])) == 1


def test_missing_modalities_are_zeros(tmp_path: Path) -> None:
    paired_root(tmp_path, train=1, val=0)
    coord, colour, normal = room_points(600)
    cloud = SceneTree(tmp_path).cloud("train/train0")
    np.testing.assert_array_equal(cloud.coord, coord)
    np.testing.assert_allclose(cloud.colour, colour / 255, atol=1e-6)
    np.testing.assert_array_equal(cloud.normal, normal)
    for name in ("color", "normal"):
        (tmp_path / f"train/train0/{name}.npy").unlink()
    cloud = SceneTree(tmp_path).cloud("train/train0")
    assert not cloud.colour.any()
    assert not cloud.normal.any()


def _damage(folder: Path, kind: str) -> None:
    coord = folder / "coord.npy"
    if kind == "truncated":
        coord.write_bytes(coord.read_bytes()[:-40])
    elif kind == "empty":
        coord.write_bytes(b"")
    elif kind == "pickle":
        coord.write_bytes(pickle.dumps([1, 2]))
    elif kind == "objects":
        np.save(coord, np.array([[1, 2, {}]], dtype=object), allow_pickle=True)
    elif kind == "archive":
        with zipfile.ZipFile(coord, "w") as archive:
            archive.writestr("a", "b")
    elif kind == "huge":
        header = "{'descr': '<f4', 'fortran_order': False, 'shape': (900000000000, 3), }"
        header = header.ljust(117) + "\n"
        coord.write_bytes(
            b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
        )
    elif kind == "text":
        np.save(coord, np.array([["a", "b", "c"]]))
    elif kind == "shape":
        np.save(coord, np.zeros((4, 2), dtype=np.float32))
    elif kind == "no points":
        np.save(coord, np.zeros((0, 3), dtype=np.float32))
    elif kind == "nan":
        np.save(coord, np.full((600, 3), np.nan, dtype=np.float32))
    elif kind == "missing":
        coord.unlink()


@pytest.mark.parametrize(
    "kind",
    [
        "truncated", "empty", "pickle", "objects", "archive", "huge", "text", "shape", "no points",
        "nan", "missing",
    ],
)  # fmt: skip
def test_damaged_arrays_are_named_in_one_line(tmp_path: Path, kind: str) -> None:
    paired_root(tmp_path, train=1, val=0)
    _damage(tmp_path / "train/train0", kind)
    with pytest.raises(DataError, match=r"train0/coord\.npy: ") as caught:
        SceneTree(tmp_path).cloud("train/train0")
    assert "\n" not in str(caught.value)


def test_arrays_of_other_lengths_are_named(tmp_path: Path) -> None:
    paired_root(tmp_path, train=1, val=0)
    tree = SceneTree(tmp_path)
    assert tree.labels("train/train0", "segment", 600).max() == 2
    np.save(tmp_path / "train/train0/segment.npy", np.full(600, 0.5))
    with pytest.raises(DataError, match="whole numbers"):
        tree.labels("train/train0", "segment", 600)
    np.save(tmp_path / "train/train0/normal.npy", np.zeros((599, 3), dtype=np.float32))
    with pytest.raises(DataError, match=r"normal\.npy: 599 rows, but coord\.npy has 600"):
        tree.cloud("train/train0")


def test_crop_is_the_centre_in_whole_patches() -> None:
    grid = PatchGrid(37, 37, 14)
    assert grid.size == (518, 518)
    assert grid.crop(480, 640) == PatchCrop(top=18, left=98, side=12)
    assert PatchGrid(4, 8, 14).crop(48, 64) == PatchCrop(top=8, left=0, side=8)
    places = grid.locate(
        np.array([98.0, 97.9, 320.0, 541.9, 542.0], dtype=np.float32),
        np.array([18.0, 50.0, 240.0, 461.9, 100.0], dtype=np.float32),
        480,
        640,
    )
    np.testing.assert_allclose(
        places, [[0, 0], [-1, -1], [18.5, 18.5], [36.99167, 36.99167], [-1, -1]], atol=1e-4
    )
    with pytest.raises(ValueError, match=r"^64 x 30 pixels: fewer than the 37 x 37 patches"):
        grid.crop(30, 64)


def test_links_point_at_the_pixels_that_show_the_points(tmp_path: Path) -> None:
    sizes = ((48, 64), (60, 80))  # each must be cropped and scaled by its own size
    write_split(tmp_path, "train", {"a": write_scene(tmp_path, "train", "a", sizes=sizes)})
    tree, grid = SceneTree(tmp_path), PatchGrid(4, 4, 12)
    (item,) = read_splits(tree, ["train"])
    coord = tree.cloud(item.cloud).coord
    rows = np.random.default_rng(0).permutation(600)[:400]
    cameras = room_cameras(sizes)
    for camera, image_path, links in zip(cameras, item.images, item.correspondences, strict=True):
        image, size = read_image(tree, image_path, grid)
        assert size == read_image_size(tree, image_path) == (camera.height, camera.width)
        places = read_places(tree, links, size, grid, rows, 600)
        column, row, _ = camera.project(coord[rows]).T
        side = size[0] / 4  # the images are wider than high
        expected = np.stack((row, column - (size[1] - size[0]) / 2), axis=1) / side
        seen = places[:, 0] >= 0
        inside = ((expected >= 0) & (expected < 4)).all(axis=1)
        assert (seen == inside).mean() > 0.98  # links were rounded down to pixels
        assert 50 < seen.sum() < 390
        assert ((places >= 0).all(axis=1) | (places == -1).all(axis=1)).all()
        np.testing.assert_allclose(places[seen & inside], expected[seen & inside], atol=1 / side)
        # The pixels hold their own row and column in the stored image.
        pixel = (places[seen] * 12).astype(int)
        shown = image[:2, pixel[:, 0], pixel[:, 1]].numpy().T * 255 / [4, 3]
        stored = places[seen] * side + [0, (size[1] - size[0]) / 2]
        np.testing.assert_allclose(shown, stored, atol=1.3)


def test_the_last_link_of_a_point_counts(tmp_path: Path) -> None:
    tree, grid = SceneTree(tmp_path), PatchGrid(4, 4, 1)
    np.save(tmp_path / "a.npy", np.array([[1, 1, 5], [7, 1, 5], [-1, -1, -1], [3, 6, 2]], float))
    places = read_places(tree, "a.npy", (8, 8), grid, np.array([2, 5, 6]), 7)
    np.testing.assert_array_equal(places, [[3, 1.5], [0.5, 3.5], [-1, -1]])
    np.save(tmp_path / "none.npy", np.array([[-1, -1, -1]]))
    assert (read_places(tree, "none.npy", (8, 8), grid, np.arange(7), 7) == -1).all()
    np.save(tmp_path / "zero.npy", np.zeros((0, 3)))
    assert (read_places(tree, "zero.npy", (8, 8), grid, np.arange(7), 7) == -1).all()


@pytest.mark.parametrize("point", [7, 1e30, np.inf, np.nan])
def test_links_to_points_that_do_not_exist_are_an_error(tmp_path: Path, point: float) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 1, point], [1, 1, 0]]))
    with pytest.raises(DataError, match=r"a\.npy: names point .* of a cloud of 7"):
        read_places(SceneTree(tmp_path), "a.npy", (8, 8), PatchGrid(4, 4, 1), np.arange(7), 7)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    tree, grid = SceneTree(tmp_path), PatchGrid(4, 4, 1)
    for read in (lambda: read_image(tree, "a.png", grid), lambda: read_image_size(tree, "a.png")):
        with pytest.raises(DataError, match=r"a\.png: cannot"):
            read()
    with pytest.raises(DataError, match=r"b\.png: cannot be read"):
        read_image(tree, "b.png", grid)


def test_images_are_changed_together_and_only_if_asked_for(tmp_path: Path) -> None:
    import torch

    image = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    off = ImageAugmentation()
    assert not off.is_on
    assert torch.equal(off.apply(image, np.random.default_rng(0)), image)
    shift = ImageAugmentation(offset_chance=1.0).apply(image, np.random.default_rng(0)) - image
    shift = torch.where(image > 0.94, torch.nan, shift).flatten(2).nanmean(dim=2)
    torch.testing.assert_close(shift, shift[:1].expand(3, 3), atol=1e-6, rtol=0)
    assert shift.min() >= 0
    assert shift.max() <= 0.05
    blurred = ImageAugmentation(blur_chance=1.0).apply(image, np.random.default_rng(1))
    assert blurred.std() < image.std()
    with pytest.raises(ValueError, match=r"^blur_chance=2"):
        ImageAugmentation(blur_chance=2)
