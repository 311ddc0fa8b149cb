"""The converter's command on folders in nerfstudio's and ScanNet's layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.paired_2d3d.converter import main
from datamodules.paired_2d3d.frame_folders import open_frames
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.scene_writing import ConversionOptions, convert_scene
from datamodules.paired_2d3d.split_files import read_splits
from datamodules.paired_2d3d.tree_checks import check_items
from tests.datamodules.rgbd_captures import captured_frames, write_nerfstudio, write_scannet

WRITERS = {"nerfstudio": write_nerfstudio, "scannet": write_scannet}


@pytest.fixture(params=WRITERS)
def capture(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return WRITERS[request.param](tmp_path / "kitchen", captured_frames())


def test_frames_are_read_as_they_were_written(capture: Path) -> None:
    for read, written in zip(open_frames(capture), captured_frames(), strict=True):
        np.testing.assert_array_equal(read.colour, written.colour)
        np.testing.assert_allclose(read.depth, written.depth, atol=1e-6)
        np.testing.assert_allclose(read.pose, written.pose, atol=1e-12)
        np.testing.assert_allclose(read.intrinsics, written.intrinsics, atol=1e-9)
        np.testing.assert_allclose(read.depth_intrinsics, written.intrinsics, atol=1e-9)


def test_command_writes_the_tree_that_the_frames_give(
    capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "mine"
    main([str(capture), "--root", str(root), "--split", "val", "--grid-size", "0.08"])
    assert "kitchen: 1 items of 3 images" in capsys.readouterr().out
    tree = SceneTree(root)
    items = read_splits(tree, ["val"])
    check_items(tree, items)
    convert_scene(
        captured_frames(), tmp_path / "direct", "val", "kitchen", ConversionOptions(grid_size=0.08)
    )
    for name in ("coord", "color", "normal"):
        one, other = (
            np.load(place / "val" / "kitchen" / f"{name}.npy")
            for place in (root, tmp_path / "direct")
        )
        np.testing.assert_allclose(one, other, atol=1e-4)
    links = sorted((root / "images/val/kitchen/correspondence").iterdir())
    assert len(links) == 3
    assert all(len(np.load(path)) > 200 for path in links)


def test_a_tree_with_depth_is_a_capture_again(capture: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    main([str(capture), "--root", str(root), "--grid-size", "0.08", "--keep-depth"])
    again = list(open_frames(root / "images" / "train" / "kitchen"))
    for read, written in zip(again, captured_frames(), strict=True):
        np.testing.assert_allclose(read.intrinsics, written.intrinsics, atol=1e-9)
        np.testing.assert_allclose(read.depth, written.depth, atol=1e-6)
        np.testing.assert_allclose(read.pose, written.pose, atol=1e-9)


def test_gaps(capture: Path) -> None:
    frames = list(open_frames(capture, gap=2, cloud_gap=3))
    assert [(frame.in_items, frame.in_cloud) for frame in frames] == [(True, True), (True, False)]
    assert len(open_frames(capture, gap=2, cloud_gap=1)) == 3
    with pytest.raises(ValueError, match="gap=0"):
        open_frames(capture, gap=0)


def test_infinite_poses_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_scannet(tmp_path / "kitchen", captured_frames())
    np.savetxt(folder / "pose" / "1.txt", np.full((4, 4), -np.inf))
    frames = open_frames(folder)
    assert [frame.name for frame in frames] == ["0", "2"]
    main([str(folder), "--root", str(tmp_path / "mine"), "--grid-size", "0.1"])
    assert "1 frames without a finite pose" in capsys.readouterr().out


def test_given_cloud_gets_colours_and_normals_from_the_frames(
    capture: Path, tmp_path: Path
) -> None:
    main([str(capture), "--root", str(tmp_path / "one"), "--grid-size", "0.08"])
    scene = tmp_path / "one" / "train" / "kitchen"
    coord = np.load(scene / "coord.npy")
    np.savez(tmp_path / "mesh.npz", coord=coord)
    cloud = str(tmp_path / "mesh.npz")
    main([str(capture), "--root", str(tmp_path / "two"), "--cloud", cloud, "--tolerance", "0.04"])
    other = tmp_path / "two" / "train" / "kitchen"
    np.testing.assert_array_equal(np.load(other / "coord.npy"), coord)
    colours = [np.load(place / "color.npy").astype(float) for place in (scene, other)]
    assert np.abs(colours[0] - colours[1]).mean() < 25
    normals = [np.load(place / "normal.npy") for place in (scene, other)]
    assert np.median((normals[0] * normals[1]).sum(1)) > 0.95


def break_depth(folder: Path) -> None:
    next((folder / "depth").iterdir()).unlink()


def break_size(folder: Path) -> None:
    for path in (folder / "depth").iterdir():
        Image.fromarray(np.ones((48, 20), dtype=np.uint16)).save(path)
    (folder / "intrinsic" / "intrinsic_depth.txt").unlink(missing_ok=True)


def break_kind(folder: Path) -> None:
    for path in (folder / "depth").iterdir():
        Image.fromarray(np.ones((48, 48, 3), dtype=np.uint8)).save(path)


def break_image(folder: Path) -> None:
    (folder / "color" / "1.png").write_bytes(b"no image")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_depth, "depth"),
        (break_size, "20 x 48 pixels do not fit"),
        (break_kind, "expected a depth map of one channel"),
        (break_image, "1.png"),
    ],
)
def test_damage_is_named_in_one_line(
    capture: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(capture)
    with pytest.raises(SystemExit) as stopped:
        main([str(capture), "--root", str(tmp_path / "mine")])
    assert stopped.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "mine" / "train" / "kitchen").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0.1}, "distortion"),
        ({"depth_unit_scale_factor": 0}, "depth_unit_scale_factor"),
        ({"depth_file_path": None}, "no depth_file_path"),
        ({"depth_file_path": "../secret.png"}, "out of the folder"),
        ({"transform_matrix": (np.eye(4) * 2).tolist()}, "no rotation"),
    ],
)
def test_faults_of_transforms(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = write_nerfstudio(tmp_path / "kitchen", captured_frames())
    stated = json.loads((folder / "transforms.json").read_text())
    place = stated["frames"][1] if next(iter(change)) in stated["frames"][1] else stated
    place.update(change)
    (folder / "transforms.json").write_text(json.dumps(stated))
    with pytest.raises(DataError, match=message):
        open_frames(folder)


def test_faults_of_matrices(tmp_path: Path) -> None:
    folder = write_scannet(tmp_path / "kitchen", captured_frames())
    (folder / "pose" / "1.txt").write_text("1 2 3\n")
    with pytest.raises(DataError, match=r"1\.txt"):
        open_frames(folder)
    (folder / "pose" / "1.txt").unlink()
    with pytest.raises(DataError, match="no pose file"):
        open_frames(folder)


def test_pickled_matrix_is_refused(tmp_path: Path) -> None:
    folder = write_scannet(tmp_path / "kitchen", captured_frames())
    (folder / "pose" / "1.txt").unlink()
    np.save(folder / "pose" / "1.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"1\.npy"):
        open_frames(folder)


def test_folder_of_no_layout(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nerfstudio"):
        open_frames(tmp_path)
