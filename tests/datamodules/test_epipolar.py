"""The camera check picture: lines run through what they should, and wrong cameras show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datamodules.multiview.batch import Views
from datamodules.multiview.epipolar import COLOURS, draw_epipolar, draw_epipolar_row, main
from datamodules.multiview.epipolar_lines import (
    Camera,
    distort,
    epipolar_line,
    to_normalised,
    to_pixels,
    undistort,
)
from datamodules.multiview.procedural import ensure_procedural
from datamodules.multiview.procedural_render import (
    pixel_intrinsics,
    render_depths,
    render_views,
)
from datamodules.multiview.procedural_scene import sample_scenes
from datamodules.multiview.procedural_textures import build_atlas

SIZE = 128
LENS = np.array([-0.25, 0.06, 0.004, -0.003])  # of an ordinary wide lens
PINHOLE = np.zeros(4)


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Poses (14, 4, 4), pictures (14, 3, H, W) and depths (14, H, W) of a procedural scene."""
    scenes, poses = sample_scenes(0, "test", [3])
    atlas = build_atlas("test", 0, 32)
    pictures = render_views(scenes, poses, atlas, SIZE)
    return poses[0], pictures[0], render_depths(scenes, poses, SIZE)[0]


def _camera(pose: Any, lens: np.ndarray = PINHOLE, intrinsics: Any = None) -> Camera:  # noqa: ANN401
    used = pixel_intrinsics(SIZE) if intrinsics is None else intrinsics
    return Camera(np.asarray(pose, np.float64), np.asarray(used, np.float64), lens)


def _distance(point: np.ndarray, pieces: list[np.ndarray]) -> float:
    """Distance of a point (2,) from the nearest segment of connected pieces."""
    best = np.inf
    for piece in pieces:
        start, step = piece[:-1], np.diff(piece, axis=0)
        length = np.maximum((step**2).sum(1), 1e-12)
        share = np.clip(((point - start) * step).sum(1) / length, 0, 1)
        foot = start + share[:, None] * step
        best = min(best, np.linalg.norm(foot - point, axis=1).min())
    return float(best)


def _surface_points(
    pose: Tensor, depth: Tensor, pixels: np.ndarray, lens: np.ndarray = PINHOLE
) -> np.ndarray:
    """World points (N, 3) under pixel coordinates at pixel centres, for a pinhole's depths."""
    columns, rows = (pixels - 0.5).astype(int).T
    z = depth[rows, columns].double().numpy()
    normalised = to_normalised(pixels, _camera(pose, lens))
    local = np.concatenate([normalised, np.ones((len(pixels), 1))], 1) * z[:, None]
    matrix = pose.double().numpy()
    return local @ matrix[:3, :3].T + matrix[:3, 3]


def _seen_at(points: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    local = (points - camera.pose[:3, 3]) @ camera.pose[:3, :3]
    return to_pixels(local[:, :2] / local[:, 2:], camera), local[:, 2]


def _grid(step: int = 9) -> np.ndarray:
    places = np.arange(4, SIZE, step) + 0.5
    return np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)


@pytest.mark.parametrize("pair", [(0, 2), (0, 6), (9, 4), (12, 1)])
def test_the_surface_point_under_a_pixel_lies_on_its_line(
    drawn: tuple[Tensor, Tensor, Tensor], pair: tuple[int, int]
) -> None:
    poses, pictures, depths = drawn
    first, second = pair
    pixels = _grid()
    camera_a, camera_b = _camera(poses[first]), _camera(poses[second])
    points = _surface_points(poses[first], depths[first], pixels)
    seen, z = _seen_at(points, camera_b)
    checked, errors = 0, []
    for pixel, place, depth in zip(pixels, seen, z, strict=True):
        if depth <= 0 or (place < 1).any() or (place > SIZE - 1).any():
            continue
        line = epipolar_line(pixel, camera_a, camera_b, SIZE, SIZE)
        assert _distance(place, line) < 0.01
        checked += 1
        column, row = place.astype(int)
        if abs(depths[second, row, column].item() - depth) > 0.02:
            continue  # something else stands before it
        grid = torch.from_numpy(place / SIZE * 2 - 1).float()[None, None, None]
        colour = F.grid_sample(pictures[second : second + 1], grid, align_corners=False)
        column, row = (pixel - 0.5).astype(int)
        errors.append((colour.flatten() - pictures[first, :, row, column]).abs().mean().item())
    assert checked > 40
    assert len(errors) > 30
    assert np.median(errors) < 0.02


def test_an_inverted_pose_puts_the_lines_elsewhere(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    poses, _, depths = drawn
    pixels = _grid(25)
    seen, _ = _seen_at(_surface_points(poses[0], depths[0], pixels), _camera(poses[2]))
    wrong = [_camera(torch.linalg.inv(poses[view])) for view in (0, 2)]
    lines = [epipolar_line(pixel, *wrong, SIZE, SIZE) for pixel in pixels]
    distances = [_distance(place, line) for place, line in zip(seen, lines, strict=True)]
    assert np.median(distances) > 5


def test_with_distortion_the_point_lies_on_the_curve(
    drawn: tuple[Tensor, Tensor, Tensor],
) -> None:
    poses, _, depths = drawn
    pixels = _grid(13)
    camera_a, camera_b = _camera(poses[0], LENS), _camera(poses[2], LENS)
    seen, z = _seen_at(_surface_points(poses[0], depths[0], pixels, LENS), camera_b)
    straight = _camera(poses[2])
    distances, from_straight = [], []
    for pixel, place, depth in zip(pixels, seen, z, strict=True):
        if depth > 0 and (place > 1).all() and (place < SIZE - 1).all():
            line = epipolar_line(pixel, camera_a, camera_b, SIZE, SIZE)
            distances.append(_distance(place, line))
            assert all(((piece >= 0) & (piece <= SIZE)).all() for piece in line)
            ignored = epipolar_line(pixel, camera_a, straight, SIZE, SIZE)
            from_straight.append(_distance(place, ignored))
    assert len(distances) > 20
    assert max(distances) < 0.05
    assert max(from_straight) > 3


def test_undistorting_inverts_distorting() -> None:
    x, y = np.meshgrid(np.linspace(-0.7, 0.7, 9), np.linspace(-0.5, 0.5, 7))
    points = np.stack((x, y), -1).reshape(-1, 2)
    assert np.abs(undistort(distort(points, LENS), LENS) - points).max() < 1e-12
    assert np.array_equal(undistort(points, PINHOLE), points)


def test_distortion_follows_opencvs_formula_at_a_point() -> None:
    x, y = 0.3, -0.2
    k1, k2, p1, p2 = LENS
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2**2
    expected = (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )
    assert distort(np.array([[x, y]]), LENS)[0] == pytest.approx(expected, abs=1e-15)


def _moved(x: float, y: float, z: float) -> Camera:
    pose = np.eye(4)
    pose[:3, 3] = x, y, z
    return _camera(pose)


def test_a_step_to_the_side_gives_level_lines_up_to_the_vanishing_point() -> None:
    line = epipolar_line(np.array([40.0, 30.0]), _moved(0, 0, 0), _moved(1, 0, 0), SIZE, SIZE)
    assert len(line) == 1
    assert line[0] == pytest.approx(np.array([[0.0, 30.0], [40.0, 30.0]]))


def test_a_step_forward_gives_lines_away_from_the_other_cameras_centre() -> None:
    pixel = np.array([96.0, 64.0])  # level with the centre of the picture
    back = epipolar_line(pixel, _moved(0, 0, 0), _moved(0, 0, -2), SIZE, SIZE)
    assert back[0] == pytest.approx(np.array([[64.0, 64.0], [96.0, 64.0]]))
    # From further in front nearer points are behind the camera and farther ones beyond the pixel.
    ahead = epipolar_line(pixel, _moved(0, 0, 0), _moved(0, 0, 2), SIZE, SIZE)
    assert ahead[0] == pytest.approx(np.array([[128.0, 64.0], [96.0, 64.0]]))


def test_a_ray_that_stays_behind_the_camera_is_not_drawn() -> None:
    turned = np.diag([-1.0, 1.0, -1.0, 1.0])
    turned[2, 3] = -1.0  # looks back, from behind view A
    assert epipolar_line(np.array([64.0, 64.0]), _moved(0, 0, 0), _camera(turned), SIZE, SIZE) == []


def test_a_ray_beside_the_picture_is_not_drawn() -> None:
    far_left = np.array([-5000.0, 64.0])
    assert epipolar_line(far_left, _moved(0, 0, 0), _moved(1, 0, 0), SIZE, SIZE) == []


def test_cameras_in_the_same_place_see_a_point() -> None:
    pixel = np.array([40.0, 30.0])
    line = epipolar_line(pixel, _moved(0, 0, 0), _moved(0, 0, 0), SIZE, SIZE)
    assert line[0] == pytest.approx(np.array([pixel, pixel]))


def test_a_picture_shows_dots_and_lines_in_matching_colours() -> None:
    image = torch.full((3, SIZE, SIZE), 0.5)
    poses = [torch.from_numpy(_moved(x, 0, 0).pose) for x in (0, 1)]
    intrinsics = pixel_intrinsics(SIZE)
    points = torch.tensor([[100.5, 30.5], [100.5, 90.5]])
    picture = draw_epipolar(image, image, *poses, intrinsics, intrinsics, points)
    assert picture.size == (2 * 256 + 4, 256)  # enlarged twice
    for colour, (x, y) in zip(COLOURS, points.tolist(), strict=False):
        expected = tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))
        assert picture.getpixel((round(2 * x), round(2 * y))) == expected
        column = [picture.getpixel((256 + 4 + 100, row)) for row in range(256)]
        rows = [row for row, pixel in enumerate(column) if pixel == expected]
        assert rows
        assert np.abs(np.array(rows) + 0.5 - 2 * y).max() <= 1.5
    assert picture.getpixel((256 + 4 + 250, round(2 * 30.5))) == (128, 128, 128)  # beyond infinity


def _views(drawn: tuple[Tensor, Tensor, Tensor], valid: list[bool]) -> Views:
    poses, pictures, _ = drawn
    count = len(valid)
    return {
        "image": pictures[None, :count],
        "pose": poses[None, :count],
        "intrinsics": pixel_intrinsics(SIZE).expand(1, count, 4),
        "distortion": torch.zeros(1, count, 4),
        "frame": torch.arange(count)[None],
        "valid": torch.tensor([valid]),
    }


def test_a_row_shows_the_valid_views_of_a_batch(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    picture = draw_epipolar_row(_views(drawn, [True, True, True, False]))
    assert picture.size == (3 * 256 + 2 * 4, 256)
    plain = _views(drawn, [True])["image"][0, 0].mul(255).round().byte().permute(1, 2, 0)
    first = np.asarray(picture)[:256:2, :256:2]
    assert (first == plain.numpy()).all(-1).mean() > 0.95  # but for the dots


def test_a_single_view_has_nothing_to_be_compared_with(
    drawn: tuple[Tensor, Tensor, Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"1 view\(s\): expected at least 2"):
        draw_epipolar_row(_views(drawn, [True, False]))


def test_the_command_draws_a_scene_of_a_root(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ensure_procedural(tmp_path, 32, 1, 2)
    out = tmp_path / "pictures" / "check.png"
    main(["--root", str(root), "--scene", "procedural-test-000001", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.size == (4 * 256 + 3 * 4, 256)


def test_the_command_names_a_scene_that_does_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ensure_procedural(tmp_path, 32, 1, 1)
    with pytest.raises(SystemExit) as stopped:
        main(["--root", str(root), "--scene", "kitchen", "--out", str(tmp_path / "check.png")])
    assert stopped.value.code == 1
    assert "--scene kitchen: no such scene" in capsys.readouterr().err
