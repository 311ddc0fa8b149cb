"""Captures with transforms.json, in the variants of nerfstudio, instant-ngp, DL3DV and Blender."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import SampleError
from datamodules.multiview.image_fit import ImageFit
from datamodules.multiview.readers.detection import detect
from datamodules.multiview.readers.protocol import SceneReader
from datamodules.multiview.readers.transforms import open_transforms
from datamodules.multiview.view_source import ViewSource
from tests.datamodules.scene_roots import OPENGL, picture, pose, write_capture


def opened(root: Path) -> SceneReader:
    return open_transforms(root)["all"]


def edit(folder: Path, **top: Any) -> None:  # noqa: ANN401
    """Change entries at the top of the file; None removes one."""
    file = folder / "transforms.json"
    stated = {**json.loads(file.read_text()), **top}
    kept = {key: value for key, value in stated.items() if value is not None}
    file.write_text(json.dumps(kept))


def test_frames_are_sorted_by_number_together_with_their_images(tmp_path: Path) -> None:
    reader = opened(write_capture(tmp_path / "room", 12))
    assert reader.names == ("room",)
    assert [reader.image(0, frame) for frame in range(12)] == [
        picture(0, frame) for frame in range(12)
    ]
    cameras = reader.cameras(0)
    np.testing.assert_allclose(cameras.pose, [pose(frame) for frame in range(12)], atol=1e-12)
    np.testing.assert_allclose(cameras.intrinsics, [(0.9, 1.2, 0.5, 0.5)] * 12)
    assert detect(tmp_path / "room") == "transforms"


def test_intrinsics_of_a_frame_win_over_the_files(tmp_path: Path) -> None:
    folder = write_capture(tmp_path, per_frame={"fl_x": 4.0, "cy": 2.0, "k1": 0.3}, k2=-0.1)
    cameras = opened(folder).cameras(0)
    np.testing.assert_allclose(cameras.intrinsics[0], (0.5, 1.2, 0.5, 1 / 3))
    np.testing.assert_allclose(cameras.distortion, [(0.3, -0.1, 0, 0)] * 6)


def test_blenders_angle_of_view(tmp_path: Path) -> None:
    folder = write_capture(tmp_path)
    absent = dict.fromkeys(("w", "h", "fl_x", "fl_y", "cx", "cy"))
    edit(folder, **absent, camera_angle_x=2 * math.atan(0.5))
    cameras = opened(folder).cameras(0)
    np.testing.assert_allclose(cameras.intrinsics[0], (1, 8 / 6, 0.5, 0.5))
    edit(folder, camera_angle_y=2 * math.atan(0.25))
    np.testing.assert_allclose(opened(folder).cameras(0).intrinsics[0], (1, 2, 0.5, 0.5))


def test_blenders_split_files_hold_out_the_test_frames(tmp_path: Path) -> None:
    for split, frames in (("train", 3), ("test", 2), ("val", 4)):
        (tmp_path / split).mkdir()
        entries = []
        for frame in range(frames):
            (tmp_path / split / f"r_{frame}.png").write_bytes(picture(len(split), frame))
            matrix = (pose(frame) @ OPENGL).tolist()
            entries.append({"file_path": f"./{split}/r_{frame}", "transform_matrix": matrix})
        text = json.dumps({"camera_angle_x": 0.7, "frames": entries})
        (tmp_path / f"transforms_{split}.json").write_text(text)
    reader = opened(tmp_path)
    assert reader.cameras(0).held_out.tolist() == [False, False, False, True, True]
    assert reader.image(0, 3) == picture(4, 0)
    assert reader.frame_id(0, 4).endswith("test/r_1.png")


def test_distortion_passes_through_resize_and_crop(tmp_path: Path) -> None:
    folder = write_capture(tmp_path, k1=0.1, k2=-0.02, p1=0.003, p2=-0.004)
    source = ViewSource(opened(folder), ImageFit(4, 4), cache_bytes=0)
    views = source.views(0, (1, 4), source.cameras(0))
    np.testing.assert_allclose(views.distortion, [(0.1, -0.02, 0.003, -0.004)] * 2)
    # 8 x 6 is scaled to 5 x 4, then cropped to columns 0 .. 3.
    np.testing.assert_allclose(views.intrinsics, [(0.9 * 5, 1.2 * 4, 2.5, 2)] * 2)


def test_smaller_copies_are_taken_with_scaled_intrinsics(tmp_path: Path) -> None:
    folder = write_capture(
        tmp_path, images="images_8", w=65, h=48, fl_x=57.6, fl_y=57.6, cx=32.5, cy=24
    )
    source = ViewSource(opened(folder), ImageFit(6, 8), cache_bytes=0)
    views = source.views(0, (0,), source.cameras(0))
    np.testing.assert_allclose(views.intrinsics[0], (57.6 / 65 * 8, 57.6 / 48 * 6, 4, 3))


def test_images_of_another_aspect_are_refused(tmp_path: Path) -> None:
    folder = write_capture(tmp_path, w=16, h=9)
    source = ViewSource(opened(folder), ImageFit(6, 8), cache_bytes=0)
    message = r"frame_2\.png: 8 x 6 pixels, but its camera was stated for 16 x 9; use the images"
    with pytest.raises(SampleError, match=message):
        source.views(0, (2,), source.cameras(0))


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    folder = write_capture(tmp_path)
    for frame in (1, 3):
        (folder / f"images/frame_{frame}.png").unlink()
    message = r"2 of 6 images are missing: images/frame_1\.png, images/frame_3\.png; add them"
    with pytest.raises(SampleError, match=message):
        opened(folder).cameras(0)


def test_damaged_images_are_named(tmp_path: Path) -> None:
    folder = write_capture(tmp_path)
    (folder / "images/frame_2.png").write_bytes(picture()[:40])
    with pytest.raises(SampleError, match=r"frame_2\.png: cannot decode the image"):
        ViewSource(opened(folder), ImageFit(6, 8), cache_bytes=2**20)


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/secret.png", "images/../../secret.png", "..\\secret.png"]
)
def test_paths_out_of_the_scene_are_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    folder = write_capture(tmp_path / "room", per_frame={"file_path": path})
    with pytest.raises(SampleError, match="leads out of the scene's folder"):
        opened(folder).cameras(0)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"camera_model": "OPENCV_FISHEYE"}, "camera_model OPENCV_FISHEYE is not supported"),
        ({"camera_model": "EQUIRECTANGULAR"}, "camera_model EQUIRECTANGULAR is not supported"),
        ({"is_fisheye": True}, "camera_model fisheye is not supported; undistort"),
        ({"k3": 0.01}, r"distortion k3=0\.01 is not supported, only k1, k2, p1, p2; undistort"),
        ({"fl_x": None}, "no 'fl_x or camera_angle_x'"),
        ({"w": 0}, "size 0 x 6; expected w and h in pixels"),
        ({"fl_x": "wide"}, "could not convert"),
        ({"w": math.inf}, "cannot convert float infinity"),
        ({"fl_x": None, "camera_angle_x": 0}, "division by zero"),
        ({"fl_x": -4.0}, "focal length that is not positive"),
        ({"frames": []}, "no frames"),
        ({"frames": [{"file_path": "images/frame_1.png"}]}, "no 'transform_matrix'"),
        ({"frames": [{"transform_matrix": 1}]}, "expected frames with file_path"),
        ({"frames": 3}, "expected frames with file_path"),
    ],
)
def test_unusable_files_are_named(top: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_capture(tmp_path)
    edit(folder, **top)
    with pytest.raises(SampleError, match=rf"transforms\.json: .*{message}"):
        opened(folder).cameras(0)


@pytest.mark.parametrize(
    "matrix", [np.diag([1, 1, -1, 1.0]), 2 * np.eye(4), np.eye(3), np.full((4, 4), np.nan), [1]]
)
def test_matrices_that_are_no_poses_are_named(matrix: Any, tmp_path: Path) -> None:  # noqa: ANN401
    folder = write_capture(tmp_path, per_frame={"transform_matrix": np.array(matrix).tolist()})
    with pytest.raises(SampleError, match=r"transforms\.json: .*frame"):
        opened(folder).cameras(0)


@pytest.mark.parametrize("text", ["{", "[" * 10**5])
def test_text_that_is_no_json_is_named(text: str, tmp_path: Path) -> None:
    (write_capture(tmp_path) / "transforms.json").write_text(text)
    with pytest.raises(SampleError, match=r"transforms\.json: cannot be read as JSON"):
        opened(tmp_path).num_frames(0)


def test_scenes_are_found_below_folders_and_splits(tmp_path: Path) -> None:
    for name in ("1K/b", "1K/a", "2K/c"):
        write_capture(tmp_path / "deep" / name)
    assert opened(tmp_path / "deep").names == ("a", "b", "c")
    write_capture(tmp_path / "deep/2K/a")
    assert opened(tmp_path / "deep").names == ("1K/a", "1K/b", "2K/a", "2K/c")
    write_capture(tmp_path / "split/train/x")
    write_capture(tmp_path / "split/test/y")
    found = open_transforms(tmp_path / "split")
    assert {split: reader.names for split, reader in found.items()} == {
        "train": ("x",),
        "test": ("y",),
    }


def test_upper_case_endings_are_found(tmp_path: Path) -> None:
    folder = write_capture(tmp_path, 1, per_frame={"file_path": "images/frame_0"})
    (folder / "images/frame_0.png").unlink()
    Image.new("RGB", (8, 6)).save(folder / "images/frame_0.JPG", "JPEG")
    assert opened(folder).frame_id(0, 0).endswith("frame_0.JPG")
