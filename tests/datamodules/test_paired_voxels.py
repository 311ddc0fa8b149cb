"""One point per voxel, the way back, and the choice of nearest points."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.paired_2d3d.views import nearest_rows
from datamodules.paired_2d3d.voxel_sampling import sample_voxels, voxel_cells, voxel_inverse


@given(seed=st.integers(0, 1000), points=st.integers(1, 200), grid=st.floats(0.05, 2.0))
@settings(deadline=None, max_examples=40)
def test_each_voxel_gives_one_point_and_the_inverse_finds_it(
    seed: int, points: int, grid: float
) -> None:
    generator = np.random.default_rng(seed)
    coord = (generator.random((points, 3)) * 3 - 1.5).astype(np.float32)
    cells = voxel_cells(coord, grid)
    for draw in (None, generator):
        rows = sample_voxels(coord, grid, draw)
        assert len(rows) == len(np.unique(cells, axis=0))
        np.testing.assert_array_equal(cells[rows][voxel_inverse(coord, grid)], cells)


def test_without_generator_the_first_point_of_a_voxel_is_taken() -> None:
    coord = np.array([[0.9, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.95, 0, 0]], dtype=np.float32)
    assert sample_voxels(coord, 0.5, None).tolist() == [1, 0]


def test_every_point_of_a_voxel_is_drawn_equally_often() -> None:
    coord = np.zeros((4, 3), dtype=np.float32)
    generator = np.random.default_rng(0)
    drawn = [int(sample_voxels(coord, 0.1, generator)[0]) for _ in range(4000)]
    assert np.bincount(drawn).min() > 900


def test_a_cloud_too_wide_to_number_is_an_error() -> None:
    coord = np.array([[0, 0, 0], [1e8, 1e8, 1e8]], dtype=np.float32)
    with pytest.raises(ValueError, match=r"^grid_size=0.01: .*stray points"):
        voxel_cells(coord, 0.01)


def test_no_points_give_no_voxels() -> None:
    coord = np.zeros((0, 3), dtype=np.float32)
    assert len(sample_voxels(coord, 0.1, None)) == len(voxel_inverse(coord, 0.1)) == 0


@given(seed=st.integers(0, 1000), count=st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_nearest_rows_are_the_nearest(seed: int, count: int) -> None:
    generator = np.random.default_rng(seed)
    # Few different coordinates, so that there are ties.
    coord = generator.integers(0, 4, (50, 3)).astype(np.float32)
    centre = coord[0]
    rows = nearest_rows(coord, centre, count)
    order = np.argsort(((coord - centre) ** 2).sum(axis=1), kind="stable")[:count]
    np.testing.assert_array_equal(rows, np.sort(order))
