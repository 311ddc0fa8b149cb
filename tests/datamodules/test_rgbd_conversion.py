"""Normals, fusion and visibility of posed RGB-D frames on surfaces that are known exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import DataError
from datamodules.paired_2d3d.cloud_fusion import CloudFusion
from datamodules.paired_2d3d.normals import depth_normals, neighbour_normals
from datamodules.paired_2d3d.rgbd_frames import RgbdFrame, back_project, project
from datamodules.paired_2d3d.scene_writing import ConversionOptions, convert_scene, write_split
from datamodules.paired_2d3d.visibility import find_visible
from tests.datamodules.rgbd_captures import captured_frames

INTRINSICS = np.array([[30.0, 0, 20], [0, 30, 15], [0, 0, 1]])
HEIGHT, WIDTH = 30, 40


def plane_depth(normal: np.ndarray, distance: float) -> np.ndarray:
    """Depth map of the plane n.X = distance."""
    rays = back_project(np.ones((HEIGHT, WIDTH), dtype=np.float32), INTRINSICS)
    return (distance / (rays @ normal)).astype(np.float32)


def frame_of(depth: np.ndarray, **changes: object) -> RgbdFrame:
    colour = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colour[..., 0] = np.arange(WIDTH)
    colour[..., 1] = np.arange(HEIGHT)[:, None]
    frame = RgbdFrame("a", colour, depth, np.eye(4), INTRINSICS, INTRINSICS)
    return replace(frame, **changes)  # type: ignore[arg-type]


def test_projection_undoes_back_projection() -> None:
    depth = np.random.default_rng(0).uniform(1, 3, (HEIGHT, WIDTH)).astype(np.float32)
    place, found = project(back_project(depth, INTRINSICS).reshape(-1, 3), np.eye(4), INTRINSICS)
    np.testing.assert_allclose(found, depth.ravel(), rtol=1e-6)
    columns, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    np.testing.assert_allclose(place, np.stack((columns.ravel(), rows.ravel()), 1), atol=1e-4)


def test_points_behind_the_camera_are_nowhere() -> None:
    place, _ = project(np.array([[0.0, 0, -1]]), np.eye(4), INTRINSICS)
    assert np.isnan(place).all()


def test_normals_of_planes_are_exact_up_to_their_edge() -> None:
    left, right = np.array([0.2, 0.1, 0.97]), np.array([-0.4, 0.3, 0.87])
    left, right = left / np.linalg.norm(left), right / np.linalg.norm(right)
    depth = plane_depth(left, 2.0)
    depth[:, 18:] = plane_depth(right, 3.0)[:, 18:]
    depth[4, 5] = 0
    normal = depth_normals(depth, INTRINSICS)
    expected = np.where(np.arange(WIDTH)[None, :, None] < 18, -left, -right)
    known = np.ones((HEIGHT, WIDTH), dtype=bool)
    known[4, 5] = False
    np.testing.assert_allclose(
        normal[known], np.broadcast_to(expected, normal.shape)[known], atol=2e-3
    )
    assert (normal[~known] == 0).all()


def test_neighbour_normals_of_a_sphere() -> None:
    outward = np.random.default_rng(0).normal(size=(3000, 3))
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    normal = neighbour_normals(outward, outward)
    assert (normal * outward).sum(1).min() > 0.97


def test_one_point_a_cell_on_the_surface_with_majority_labels() -> None:
    depth = plane_depth(np.array([0.0, 0, 1]), 2.0)
    segment = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    segment[:, 20:] = 3
    fusion = CloudFusion(0.2)
    frame = frame_of(depth, segment=segment)
    fusion.add(frame)
    once = fusion.finish()
    np.testing.assert_allclose(once.coord[:, 2], 2.0, rtol=1e-6)
    np.testing.assert_allclose(once.normal, np.tile([0, 0, -1], (len(once.coord), 1)), atol=1e-6)
    cells = np.floor(once.coord.astype(np.float64) / 0.2 + 1e-6)
    assert len(np.unique(cells, axis=0)) == len(cells)
    assert once.segment is not None
    np.testing.assert_array_equal(once.segment, np.where(once.coord[:, 0] < 0, 0, 3))
    assert once.instance is None

    # Twice as many votes of other frames win; colours are means.
    other = frame_of(depth, segment=np.full_like(segment, 5), colour=np.full_like(frame.colour, 90))
    fusion.add(other)
    fusion.add(other)
    thrice = fusion.finish()
    np.testing.assert_array_equal(thrice.coord, once.coord)
    assert thrice.segment is not None
    assert (thrice.segment == 5).all()
    expected = (once.color.astype(float) + 180) / 3
    assert np.abs(thrice.color - expected).max() <= 1


def test_fusion_in_steps_equals_fusion_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = captured_frames(3, 2)
    clouds = []
    for rows, table in ((1 << 21, 1 << 22), (1, 0)):
        monkeypatch.setattr("datamodules.paired_2d3d.cloud_fusion._MERGE_ROWS", rows)
        monkeypatch.setattr("datamodules.paired_2d3d.cloud_fusion._TABLE", table)
        fusion = CloudFusion(0.1)
        for frame in frames:
            fusion.add(frame)
        clouds.append(fusion.finish())
    for one, other in zip(*clouds, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_depth_test_catches_what_is_hidden() -> None:
    wall = plane_depth(np.array([0.0, 0, 1]), 3.0)
    hidden = wall.copy()
    hidden[10:20, 15:25] = 1.5  # a board in front of the wall
    points = back_project(wall, INTRINSICS).reshape(-1, 3)
    seen = np.zeros(HEIGHT * WIDTH, dtype=bool)
    sightings = find_visible(points, frame_of(hidden), 0.01)
    seen[sightings.point] = True
    expected = np.ones((HEIGHT, WIDTH), dtype=bool)
    expected[10:20, 15:25] = False
    np.testing.assert_array_equal(seen.reshape(HEIGHT, WIDTH), expected)
    row, column = np.divmod(sightings.point, WIDTH)
    np.testing.assert_array_equal(sightings.pixel, np.stack((column, row), 1))


def test_slanted_surface_is_seen_between_pixel_centres() -> None:
    normal = np.array([0.85, 0.0, 0.53])
    depth = plane_depth(normal / np.linalg.norm(normal), 2.0)
    generator = np.random.default_rng(0)
    place = generator.uniform((2, 2), (WIDTH - 2, HEIGHT - 2), (500, 2))
    rays = np.column_stack(((place - INTRINSICS[:2, 2]) / 30, np.ones(500)))
    points = rays * (2.0 / (rays @ (normal / np.linalg.norm(normal))))[:, None]
    steps = np.abs(np.diff(depth, axis=1)).max()
    assert steps > 0.1  # far more than the tolerance from pixel to pixel
    assert len(find_visible(points, frame_of(depth), 0.01).point) == 500


def test_depth_map_of_another_size_than_the_image() -> None:
    depth = plane_depth(np.array([0.0, 0.2, 0.98]), 2.0)
    colour = np.repeat(np.repeat(frame_of(depth).colour, 2, 0), 2, 1)
    intrinsics = INTRINSICS * [[2], [2], [1]]
    large = frame_of(depth, colour=colour, intrinsics=intrinsics)
    options = ConversionOptions(grid_size=0.05)
    clouds = []
    for frame in (frame_of(depth), large):
        fusion = CloudFusion(options.grid_size)
        fusion.add(frame)
        clouds.append(fusion.finish())
    for one, other in zip(clouds[0][:3], clouds[1][:3], strict=True):
        np.testing.assert_array_equal(one, other)
    points = back_project(depth, INTRINSICS).reshape(-1, 3)
    small, twice = (find_visible(points, frame, 0.01) for frame in (frame_of(depth), large))
    np.testing.assert_array_equal(twice.point, small.point)
    np.testing.assert_array_equal(twice.pixel // 2, small.pixel)


def test_items_hold_up_to_four_images(tmp_path: Path) -> None:
    frames = captured_frames(6)
    items = convert_scene(frames, tmp_path, "val", "kitchen", ConversionOptions(grid_size=0.1))
    assert [len(item["images"]) for item in items.values()] == [4, 2]
    assert list(items) == ["kitchen_0", "kitchen_1"]
    write_split(tmp_path, "val", items)
    write_split(tmp_path, "val", {"office_0": items["kitchen_0"] | {"pointclouds": "x"}})
    assert "office_0" in (tmp_path / "splits" / "val.json").read_text()
    assert "kitchen_1" in (tmp_path / "splits" / "val.json").read_text()


def test_image_without_points_keeps_a_row_of_minus_one(tmp_path: Path) -> None:
    frame = captured_frames(1)[0]
    away = replace(frame, name="away", depth=np.zeros_like(frame.depth))
    convert_scene([frame, away], tmp_path, "train", "a", ConversionOptions(grid_size=0.1))
    links = np.load(tmp_path / "images/train/a/correspondence/away.npy")
    np.testing.assert_array_equal(links, [[-1, -1, -1]])


def test_failed_scene_leaves_nothing_and_an_old_one_stays(tmp_path: Path) -> None:
    frame = captured_frames(1)[0]
    options = ConversionOptions(grid_size=0.1)
    with pytest.raises(DataError, match="no name of its own"):
        convert_scene([frame, frame], tmp_path, "train", "a", options)
    assert not (tmp_path / "train" / "a").exists()
    convert_scene([frame], tmp_path, "train", "a", options)
    with pytest.raises(DataError, match="exists already"):
        convert_scene([frame], tmp_path, "train", "a", options)
    assert (tmp_path / "train" / "a" / "coord.npy").is_file()
    with pytest.raises(DataError, match="scene="):
        convert_scene([frame], tmp_path, "train", "../a", options)


def test_world_too_large_for_the_grid() -> None:
    pose = np.eye(4)
    pose[0, 3] = 1e6
    with pytest.raises(DataError, match="depth unit"):
        CloudFusion(0.02).add(frame_of(plane_depth(np.array([0.0, 0, 1]), 2.0), pose=pose))


def test_no_depth_anywhere() -> None:
    fusion = CloudFusion(0.02)
    fusion.add(frame_of(np.zeros((HEIGHT, WIDTH), dtype=np.float32)))
    with pytest.raises(DataError, match="no pixel"):
        fusion.finish()


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid_size": 0.0},
        {"tolerance": 0.0},
        {"depth_range": (2.0, 1.0)},
        {"images_per_item": 0},
        {"normal_neighbours": 2},
    ],
)
def test_options_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ConversionOptions(**arguments)  # type: ignore[arg-type]


def test_tolerance_follows_the_grid() -> None:
    assert ConversionOptions().depth_tolerance == pytest.approx(0.01)
    assert ConversionOptions(grid_size=0.06).depth_tolerance == pytest.approx(0.03)
    assert ConversionOptions(grid_size=0.06, tolerance=0.02).depth_tolerance == 0.02
