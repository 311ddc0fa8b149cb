"""What happens to the colours and the geometry of views."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from datamodules.paired_2d3d.colour_augmentation import (
    augment_colour,
    drop_rows,
    scale_brightness,
    scale_contrast,
    scale_saturation,
    turn_hue,
)
from datamodules.paired_2d3d.elastic import elastic_distortion, interpolate_nodes
from datamodules.paired_2d3d.geometry_augmentation import augment_geometry, axis_turn, draw_turn
from datamodules.paired_2d3d.view_options import ViewOptions

PLAIN = ViewOptions(
    drop_colour=0,
    drop_normal=0,
    drop_some=0,
    colour_jitter_chance=0,
    colour_shift_chance=0,
    centre=False,
    scale=(1, 1),
    rotate_chance=0,
    flip_chance=0,
    jitter=0,
    elastic_chance=0,
)


def colours(count: int = 200) -> NDArray[np.float32]:
    return np.random.default_rng(3).random((count, 3), dtype=np.float32)


def points(count: int = 500) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    generator = np.random.default_rng(4)
    normal = generator.standard_normal((count, 3))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return (3 * generator.random((count, 3))).astype(np.float32), normal.astype(np.float32)


def test_everything_can_be_switched_off() -> None:
    colour, (coord, normal) = colours(), points()
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(augment_colour(colour, PLAIN, generator), colour)
    moved, turned = augment_geometry(coord, normal, PLAIN, generator)
    np.testing.assert_array_equal(moved, coord)
    np.testing.assert_array_equal(turned, normal)
    assert drop_rows(colour, PLAIN, 0, generator) is colour


@pytest.mark.parametrize("turn", [-0.3, -0.02, 0.02, 0.4])
def test_hue_is_turned_as_in_hsv(turn: float) -> None:
    colour = np.concatenate((colours(), np.eye(3), np.ones((1, 3)), np.zeros((1, 3))))
    planes = colour.T.astype(np.float32)
    turn_hue(planes, np.float32(turn))
    for before, after in zip(colour, planes.T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(after, expected, atol=2e-6)


def test_blends_keep_what_they_should() -> None:
    luma = np.array([0.2989, 0.587, 0.114])
    planes = colours().T * 0.5 + 0.2
    grey = luma @ planes
    for factor in (0.7, 1.2):
        changed = planes.copy()
        scale_saturation(changed, np.float32(factor))
        kept = factor + (1 - factor) * luma.sum()
        np.testing.assert_allclose(luma @ changed, kept * grey, atol=1e-5)
        np.testing.assert_allclose(changed - grey, factor * (planes - grey), atol=1e-5)
        changed = planes.copy()
        scale_contrast(changed, np.float32(factor))
        np.testing.assert_allclose(
            changed - grey.mean(), factor * (planes - grey.mean()), atol=1e-5
        )
        changed = planes.copy()
        scale_brightness(changed, np.float32(factor))
        np.testing.assert_allclose(changed, factor * planes, atol=1e-6)


def test_colours_stay_in_range_and_change() -> None:
    colour = colours()
    before = colour.copy()
    results = [augment_colour(colour, ViewOptions(), np.random.default_rng(n)) for n in range(20)]
    np.testing.assert_array_equal(colour, before)
    assert all(result.min() >= 0 and result.max() <= 1 for result in results)
    assert all(np.abs(result - colour).max() > 0.01 for result in results)


def test_dropped_rows_are_counted() -> None:
    options = replace(PLAIN, drop_some=1.0, drop_some_share=0.2)
    kept = drop_rows(colours(), options, 0.0, np.random.default_rng(0))
    assert (kept == 0).all(axis=1).sum() == 40
    assert (drop_rows(colours(), options, 1.0, np.random.default_rng(0)) == 0).all()
    outcomes = [
        (drop_rows(colours(), ViewOptions(), 0.2, np.random.default_rng(n)) == 0).all(axis=1).mean()
        for n in range(500)
    ]
    assert abs(outcomes.count(1.0) / 500 - 0.2) < 0.06
    assert abs(outcomes.count(0.2) / 500 - 0.4) < 0.08


def test_geometry_is_a_similarity_that_normals_follow() -> None:
    coord, normal = points()
    options = replace(PLAIN, centre=True, scale=(0.9, 1.1), rotate_chance=1, flip_chance=0.5)
    moved, turned = augment_geometry(coord, normal, options, np.random.default_rng(2))
    scale = np.linalg.norm(moved[0] - moved[1]) / np.linalg.norm(coord[0] - coord[1])
    assert 0.9 <= scale <= 1.1
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), 1, atol=1e-5)
    # A point a step along its normal is moved to a step along the turned normal.
    step, _ = augment_geometry(
        np.concatenate((coord, coord + 1e-2 * normal)),
        np.concatenate((normal, normal)),
        replace(options, centre=False),
        np.random.default_rng(2),
    )
    np.testing.assert_allclose((step[500:] - step[:500]) / (1e-2 * scale), turned, atol=2e-3)


def test_centre_is_the_middle_of_the_floor() -> None:
    coord, normal = points()
    moved, _ = augment_geometry(
        coord, normal, replace(PLAIN, centre=True), np.random.default_rng(0)
    )
    np.testing.assert_allclose(moved.min(axis=0)[:2], -moved.max(axis=0)[:2], atol=1e-6)
    assert moved[:, 2].min() == 0


def test_turns_and_mirrors_are_as_often_as_said() -> None:
    np.testing.assert_allclose(axis_turn(2, np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(axis_turn(0, np.pi / 2) @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    generator = np.random.default_rng(0)
    turns = np.stack([draw_turn(ViewOptions(), generator) for _ in range(1000)])
    np.testing.assert_allclose(
        turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (1000, 1, 1)), atol=1e-12
    )
    assert abs((np.linalg.det(turns) < 0).mean() - 0.5) < 0.06
    # z is only tilted, by two small angles.
    assert turns[:, 2, 2].min() >= np.cos(np.pi / 64) ** 2 - 1e-12
    plain = (np.abs(np.abs(turns[:, 0, 0]) - 1) < 1e-3).mean()
    assert plain > 0.15  # no turn about z in a fifth of the cases


def test_jitter_is_clipped() -> None:
    coord, normal = points(4000)
    moved, _ = augment_geometry(
        coord, normal, replace(PLAIN, jitter=0.01, jitter_clip=0.015), np.random.default_rng(0)
    )
    noise = moved - coord
    assert 0.0149 < np.abs(noise).max() < 0.0151
    assert abs(noise.std() - 0.0085) < 5e-4


def test_interpolation_is_exact_on_linear_fields() -> None:
    nodes = np.stack(np.meshgrid(*(np.arange(n) for n in (4, 5, 6)), indexing="ij"), axis=-1)
    position = (np.random.default_rng(0).random((100, 3)) * [2.9, 3.9, 4.9]).astype(np.float32)
    found = interpolate_nodes(nodes.astype(np.float32), position)
    np.testing.assert_allclose(found, position, atol=1e-5)


def test_elastic_distortion_is_smooth_and_of_the_stated_size() -> None:
    generator = np.random.default_rng(0)
    coord = (generator.random((2000, 3)) * 6).astype(np.float32)
    near = coord + np.float32(0.01)
    both = np.concatenate((coord, near))
    moved = elastic_distortion(both, 0.8, 1.6, generator) - both
    inner = ((coord > 1.5) & (coord < 4.5)).all(axis=1)
    assert 0.05 < moved[:2000][inner].std() < 0.2
    assert np.abs(moved[:2000] - moved[2000:]).max() < 0.05


def test_elastic_distortion_of_a_stray_point_is_an_error() -> None:
    coord = np.array([[0, 0, 0], [1e3, 1e3, 1e3]], dtype=np.float32)
    with pytest.raises(ValueError, match="stray points"):
        elastic_distortion(coord, 0.2, 0.4, np.random.default_rng(0))


def test_a_single_point_can_be_augmented() -> None:
    coord, normal = points(1)
    moved, turned = augment_geometry(coord, normal, ViewOptions(), np.random.default_rng(0))
    assert np.isfinite(moved).all()
    assert turned.shape == (1, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("drop_colour", 1.1),
        ("brightness", -0.1),
        ("global_share", (0.5, 0.4)),
        ("local_share", (0.0, 0.4)),
        ("scale", (0.0, 1.0)),
        ("local_views", -1),
        ("hue", 0.6),
        ("jitter_clip", 0.0),
        ("elastic", ((0.0, 1.0),)),
    ],
)
def test_options_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*data\.init_args\.views\.{name}"):
        ViewOptions(**{name: value})
