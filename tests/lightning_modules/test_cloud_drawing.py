"""Colours and pictures of clouds."""

import numpy as np
import pytest
import torch

from lightning_modules.cloud_drawing import (
    CloudView,
    class_colours,
    draw_cloud,
    label_colours,
    pca_colours,
)

RED, BLUE = (200, 0, 0), (0, 0, 200)


def plane(height: float, colour: tuple[int, int, int], half: float = 1.0) -> tuple[np.ndarray, ...]:
    side = np.linspace(-half, half, 60)
    x, y = (axis.ravel() for axis in np.meshgrid(side, side))
    coord = np.stack([x, y, np.full_like(x, height)], 1)
    return coord, np.tile(np.array(colour, dtype=np.uint8), (len(coord), 1))


@pytest.mark.parametrize("perspective", [False, True])
def test_the_nearer_plane_hides_the_other(perspective: bool) -> None:
    low, high = plane(0, RED, half=1.0), plane(1, BLUE, half=0.5)
    view = CloudView(elevation=90, perspective=perspective, shading=0)
    for order in ((low, high), (high, low)):
        coord = np.concatenate([order[0][0], order[1][0]])
        colour = np.concatenate([order[0][1], order[1][1]])
        image = draw_cloud(coord, colour, (120, 90), view)
        assert image.shape == (90, 120, 3)
        assert image.dtype == np.uint8
        assert tuple(image[45, 60]) == BLUE
        assert tuple(image[45, 25]) == RED
        assert tuple(image[2, 2]) == (255, 255, 255)


def test_nearer_things_are_larger_in_perspective_alone() -> None:
    near, far = plane(1, BLUE, half=0.5), plane(-1, RED, half=0.5)
    coord = np.concatenate([near[0] + [1, 0, 0], far[0] - [1, 0, 0]])
    colour = np.concatenate([near[1], far[1]])
    areas = []
    for perspective in (False, True):
        image = draw_cloud(coord, colour, (200, 120), CloudView(0, 90, perspective, 0)).astype(int)
        blue, red = (int((np.abs(image - c).sum(2) < 30).sum()) for c in (BLUE, RED))
        areas.append(blue / red)
    assert 0.9 < areas[0] < 1.1
    assert areas[1] > 1.3


def test_up_is_up_and_right_is_right() -> None:
    """Seen from +x, y grows to the right and z upwards."""
    coord = np.array([[0, 1, 0], [0, -1, 0], [0, -1, 1.0]])
    colour = np.array([RED, BLUE, (0, 200, 0)], dtype=np.uint8)
    image = draw_cloud(coord, colour, (80, 60), CloudView(0, 0, False, 0)).astype(int)
    places = {}
    for name, value in zip("rbg", colour.astype(int), strict=True):
        places[name] = np.argwhere(np.abs(image - value).sum(2) < 60).mean(0)  # row, column
    assert places["r"][1] > places["b"][1]
    assert places["g"][0] < places["b"][0]


@pytest.mark.parametrize("turn", [0, 70, 200])
def test_a_room_is_seen_from_its_open_side(turn: float) -> None:
    """Two walls around a blue floor must not hide it, wherever they stand."""
    floor, colour = plane(0, BLUE)
    wall = floor[:, [2, 0, 1]] + [-1, 0, 1]
    other = wall[:, [1, 0, 2]]
    coord = np.concatenate([floor, wall, other])
    angle = np.radians(turn)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    coord[:, :2] = coord[:, :2] @ matrix.T
    red = np.tile(np.array(RED, dtype=np.uint8), (len(wall) * 2, 1))
    image = draw_cloud(coord, np.concatenate([colour, red]), (80, 60), CloudView(shading=0))
    shares = [(np.abs(image.astype(int) - c).sum(2) < 30).mean() for c in (BLUE, RED)]
    behind = CloudView(np.degrees(angle) + 225, shading=0)
    image = draw_cloud(coord, np.concatenate([colour, red]), (80, 60), behind)
    hidden = (np.abs(image.astype(int) - BLUE).sum(2) < 30).mean()
    assert shares[0] > 2 * hidden
    assert shares[1] > 0.1


def test_equal_features_have_equal_colours_and_different_ones_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 24, generator=generator)
    features = kinds[torch.arange(300) % 3]
    colours = pca_colours(features)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == 3
    moved = pca_colours(-3 * features + 5)
    assert len(np.unique(moved, axis=0)) == 3
    assert np.array_equal(pca_colours(features * 2 + 1), colours)


def test_colours_need_neither_three_channels_nor_spread() -> None:
    assert pca_colours(torch.arange(10.0)[:, None]).shape == (10, 3)
    assert len(np.unique(pca_colours(torch.ones(10, 5)), axis=0)) == 1


def test_classes_have_colours_of_their_own_and_no_class_is_grey() -> None:
    palette = class_colours(20).astype(int)
    distance = np.abs(palette[:, None] - palette[None]).sum(2) + 999 * np.eye(20, dtype=int)
    assert distance.min() > 20
    coloured = label_colours(np.array([2, -1, 0]), 20)
    assert np.array_equal(coloured[0], palette[2])
    assert len(set(coloured[1].tolist())) == 1


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match=r"coord \(0, 3\)"):
        draw_cloud(np.zeros((0, 3)), np.zeros((0, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"colour \(1, 3\)"):
        draw_cloud(np.zeros((2, 3)), np.zeros((1, 3), dtype=np.uint8))
    one = draw_cloud(np.zeros((1, 3)), np.array([RED], dtype=np.uint8), (40, 30))
    assert (one != 255).any()
