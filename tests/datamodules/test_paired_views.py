"""Which points the views of an item hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from datamodules.paired_2d3d.view_options import ViewOptions
from datamodules.paired_2d3d.views import ChosenRows, Cloud, choose_rows, make_views


def plane(count: int = 1000) -> NDArray[np.float32]:
    generator = np.random.default_rng(1)
    coord = np.zeros((count, 3), dtype=np.float32)
    coord[:, :2] = generator.random((count, 2)) * 4
    return coord


def choose(
    coord: NDArray[np.float32],
    visible: NDArray[np.bool_],
    seed: int = 0,
    options: ViewOptions = ViewOptions(),  # noqa: B008 - frozen
    max_points: int = 300,
) -> ChosenRows:
    return choose_rows(coord, visible, options, max_points, np.random.default_rng(seed))


def test_principal_view_lies_around_what_all_images_saw() -> None:
    coord = plane()
    visible = np.stack((coord[:, 0] < 1.5, coord[:, 1] < 1.5), axis=1)
    centre = coord[visible.all(axis=1)].mean(axis=0)
    chosen = choose(coord, visible)
    distance = np.linalg.norm(coord - centre, axis=1)
    np.testing.assert_array_equal(chosen.global_[0], np.sort(np.argsort(distance)[:300]))
    assert chosen.images.tolist() == [0, 1]


def test_images_that_saw_nothing_of_the_principal_view_are_left_out() -> None:
    coord = plane()
    near = np.linalg.norm(coord[:, :2] - 0.5, axis=1) < 0.3
    far = np.linalg.norm(coord[:, :2] - 3.5, axis=1) < 0.3
    # No point is in all three, so the centre is a random point; the view is small.
    counts = [
        choose(coord, np.stack((near, far, near), axis=1), seed, max_points=100).images.tolist()
        for seed in range(40)
    ]
    assert {tuple(images) for images in counts} == {(), (0, 2), (1,)}


@pytest.mark.parametrize("seed", range(5))
def test_sizes_of_views(seed: int) -> None:
    coord = plane()
    chosen = choose(coord, np.zeros((1000, 0), dtype=bool), seed)
    assert len(chosen.global_[0]) == 300
    assert 120 <= len(chosen.global_[1]) <= 300
    assert len(chosen.local) == 4
    assert all(30 <= len(rows) <= 120 for rows in chosen.local)
    assert chosen.images.tolist() == []


def test_local_views_start_where_no_earlier_one_lies() -> None:
    # Views of a single point hold nothing but their centre.
    options = replace(ViewOptions(), local_share=(0.25, 0.25), local_views=4)
    for seed in range(20):
        chosen = choose(plane(4), np.ones((4, 1), dtype=bool), seed, options)
        assert sorted(rows.item() for rows in chosen.local) == [0, 1, 2, 3]


def test_local_views_go_on_when_all_is_covered() -> None:
    options = replace(ViewOptions(), local_share=(1.0, 1.0), local_views=3)
    chosen = choose(plane(), np.ones((1000, 1), dtype=bool), 0, options)
    assert [len(rows) for rows in chosen.local] == [300] * 3


def test_small_clouds_are_taken_whole() -> None:
    coord = plane(5)
    chosen = choose(coord, np.ones((5, 1), dtype=bool))
    assert chosen.global_[0].tolist() == [0, 1, 2, 3, 4]
    assert all(len(rows) >= 1 for rows in (*chosen.global_, *chosen.local))


def test_views_share_colours_only_where_they_should() -> None:
    coord = plane()
    generator = np.random.default_rng(0)
    colour = generator.random((1000, 3), dtype=np.float32)
    cloud = Cloud(coord, colour, np.zeros_like(coord))
    chosen = choose(coord, np.ones((1000, 1), dtype=bool))
    views, local_views = make_views(cloud, chosen, ViewOptions(colour_jitter_chance=1), generator)
    common, first, second = np.intersect1d(views[0].rows, views[1].rows, return_indices=True)
    assert len(common)
    np.testing.assert_array_equal(views[0].colour[first], views[1].colour[second])
    # Each local view is jittered on its own, so equal points get different colours.
    even = cloud._replace(colour=np.full_like(colour, 0.3) * np.float32([1, 1.2, 1.5]))
    views, local_views = make_views(even, chosen, ViewOptions(colour_jitter_chance=1), generator)
    changes = {tuple(view.colour.mean(axis=0).round(4)) for view in (views[0], *local_views)}
    assert len(changes) == 5
    for view in (*views, *local_views):
        np.testing.assert_array_equal(view.origin_coord, coord[view.rows])
        assert (view.normal == 0).all()  # unknown normals stay unknown
