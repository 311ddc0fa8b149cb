"""COLMAP sparse models, through pycolmap where it is installed and a stand-in where not."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from datamodules.errors import DataError, SampleError
from datamodules.multiview.readers.colmap import open_colmap
from datamodules.multiview.readers.detection import detect
from tests.datamodules.scene_roots import picture, pose


def capture(root: Path, frames: int = 4) -> Path:
    (root / "sparse/0").mkdir(parents=True)
    (root / "sparse/0/images.bin").write_bytes(b"model")
    (root / "images").mkdir()
    for frame in range(frames):
        (root / f"images/{frame}.png").write_bytes(picture(0, frame))
    return root


def stand_in(model: str, params: list[float], *, as_method: bool = True) -> Any:  # noqa: ANN401
    """What the reader uses of pycolmap, for four images in reverse order."""

    def image(frame: int) -> SimpleNamespace:
        motion = SimpleNamespace(matrix=lambda: np.linalg.inv(pose(frame))[:3])
        stored: Any = (lambda: motion) if as_method else motion
        return SimpleNamespace(
            name=f"{frame}.png", camera_id=1, has_pose=frame != 2, cam_from_world=stored
        )

    camera = SimpleNamespace(
        model=SimpleNamespace(name=model), width=8, height=6, params=np.array(params)
    )
    images = {number: image(3 - number) for number in range(4)}
    reconstruction = SimpleNamespace(images=images, cameras={1: camera})
    return SimpleNamespace(Reconstruction=lambda _: reconstruction)


@pytest.mark.parametrize(
    ("model", "params", "distortion"),
    [
        ("SIMPLE_PINHOLE", [4, 3, 2], (0, 0, 0, 0)),
        ("PINHOLE", [4, 4, 3, 2], (0, 0, 0, 0)),
        ("SIMPLE_RADIAL", [4, 3, 2, 0.1], (0.1, 0, 0, 0)),
        ("RADIAL", [4, 3, 2, 0.1, 0.2], (0.1, 0.2, 0, 0)),
        ("OPENCV", [4, 4, 3, 2, 0.1, 0.2, 0.3, 0.4], (0.1, 0.2, 0.3, 0.4)),
    ],
)
@pytest.mark.parametrize("as_method", [True, False])
def test_registered_images_come_in_order_with_their_cameras(
    model: str,
    params: list[float],
    distortion: tuple[float, ...],
    as_method: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pycolmap", stand_in(model, params, as_method=as_method))
    assert detect(capture(tmp_path)) == "colmap"
    reader = open_colmap(tmp_path)["all"]
    assert [reader.image(0, frame) for frame in range(3)] == [picture(0, f) for f in (0, 1, 3)]
    cameras = reader.cameras(0)
    np.testing.assert_allclose(cameras.pose, [pose(frame) for frame in (0, 1, 3)], atol=1e-9)
    np.testing.assert_allclose(cameras.intrinsics, [(4 / 8, 4 / 6, 3 / 8, 2 / 6)] * 3)
    np.testing.assert_allclose(cameras.distortion, [distortion] * 3)
    assert cameras.size.tolist() == [[6, 8]] * 3


def test_fisheye_cameras_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycolmap", stand_in("OPENCV_FISHEYE", [1] * 8))
    reader = open_colmap(capture(tmp_path))["all"]
    with pytest.raises(SampleError, match="camera model OPENCV_FISHEYE is not supported, only"):
        reader.cameras(0)


def test_without_pycolmap_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(DataError, match=r"needs pycolmap, .*run 'pip install pycolmap'"):
        open_colmap(capture(tmp_path))


def test_models_written_by_pycolmap_are_read(tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    capture(tmp_path)
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera(
        camera_id=1, model="OPENCV", width=8, height=6, params=[4, 5, 3, 2, 0.1, 0.2, 0.3, 0.4]
    )
    model.add_camera_with_trivial_rig(camera)
    for frame in range(4):
        matrix = np.linalg.inv(pose(frame))[:3]
        image = pycolmap.Image(image_id=frame + 1, camera_id=1, name=f"{frame}.png")
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(matrix))
    model.write(str(tmp_path / "sparse/0"))
    cameras = open_colmap(tmp_path)["all"].cameras(0)
    np.testing.assert_allclose(cameras.pose, [pose(frame) for frame in range(4)], atol=1e-9)
    np.testing.assert_allclose(cameras.intrinsics, [(4 / 8, 5 / 6, 3 / 8, 2 / 6)] * 4)
    np.testing.assert_allclose(cameras.distortion, [(0.1, 0.2, 0.3, 0.4)] * 4)


def test_a_model_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pycolmap")
    with pytest.raises(SampleError, match=r"sparse/0: pycolmap cannot read the model \("):
        open_colmap(capture(tmp_path))["all"].cameras(0)
