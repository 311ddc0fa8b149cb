"""The real stereo pair: its calibration links both photographs with the measured cloud."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataError
from datamodules.paired_2d3d import motorcycle
from datamodules.paired_2d3d.motorcycle import motorcycle_frames, motorcycle_tree
from datamodules.paired_2d3d.scene_tree import SceneTree
from datamodules.paired_2d3d.split_files import read_splits
from datamodules.paired_2d3d.tree_checks import check_items
from datamodules.paired_2d3d.visibility import find_visible


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("skimage")
    return motorcycle_tree(tmp_path_factory.mktemp("motorcycle"), scale=0.5)


def colour_errors(root: Path, name: str) -> tuple[float, float]:
    """Mean colour difference of points and their pixels, and of shuffled ones, 0 .. 255."""
    images = root / "images" / "train" / "motorcycle"
    column, row, point = np.load(images / "correspondence" / f"{name}.npy").astype(int).T
    pixels = np.asarray(Image.open(images / "color" / f"{name}.png"))[row, column].astype(float)
    colours = np.load(root / "train" / "motorcycle" / "color.npy")[point]
    shuffled = np.random.default_rng(0).permutation(len(colours))
    return np.abs(pixels - colours).mean(), np.abs(pixels - colours[shuffled]).mean()


def test_tree_is_complete(root: Path) -> None:
    tree = SceneTree(root)
    (item,) = read_splits(tree, ["train"])
    check_items(tree, [item])
    cloud = tree.cloud(item.cloud)
    assert len(cloud.coord) == pytest.approx(343_274 / 4, rel=0.01)
    assert len(item.images) == 2
    # Metres of the garage: the bicycle stands 2.1 m in front of the camera, the wall 5 m.
    assert cloud.coord[:, 1].min() == pytest.approx(2.11, abs=0.02)
    assert cloud.coord[:, 1].max() == pytest.approx(5.01, abs=0.02)
    # Normals look at the left camera, which is the origin.
    assert ((cloud.normal * cloud.coord).sum(1) < 0).all()


def test_points_land_on_pixels_of_their_own_colour(root: Path) -> None:
    error, chance = colour_errors(root, "left")
    assert error == 0
    error, chance = colour_errors(root, "right")
    assert error < 8
    assert chance > 50


def test_right_photograph_misses_what_is_hidden_from_it(root: Path) -> None:
    images = root / "images" / "train" / "motorcycle" / "correspondence"
    left, right = (np.load(images / f"{name}.npy") for name in ("left", "right"))
    assert 0.8 < len(right) / len(left) < 0.95
    # Without the depth test hidden points would be linked with the wrong pixels.
    frame = motorcycle_frames(0.5)[1]
    pixels = np.asarray(frame.colour, dtype=float)
    coord = np.load(root / "train" / "motorcycle" / "coord.npy").astype(np.float64)
    colours = np.load(root / "train" / "motorcycle" / "color.npy").astype(float)
    everything = find_visible(coord, frame, tolerance=100.0)
    seen = np.isin(everything.point, right[:, 2].astype(int))
    column, row = everything.pixel.T
    error = np.abs(pixels[row, column] - colours[everything.point]).mean(1)
    assert error[~seen].mean() > 3 * error[seen].mean()


def test_coarser_cloud(root: Path) -> None:
    coarse = motorcycle_tree(root.parent, scale=0.5, grid_size=0.05)
    coord = np.load(coarse / "train" / "motorcycle" / "coord.npy")
    assert 1000 < len(coord) < 20_000


def test_missing_package_and_wrong_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="scale=2"):
        motorcycle_tree(tmp_path, scale=2)
    monkeypatch.setattr(motorcycle, "find_spec", lambda _: None)
    with pytest.raises(DataError, match="scenes"):
        motorcycle_tree(tmp_path)
