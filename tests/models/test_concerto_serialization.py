"""Curves and stable sorting."""

from __future__ import annotations

import pytest
import torch

from models.concerto.clouds import batch_numbers, batch_offset, grid_coordinates
from models.concerto.ordering import group_rows, invert_order, permute_rows, sort_stably
from models.concerto.serialization import curve_codes, draw_orders, serialize
from tests.models.concerto_cases import read_case

POINTS = torch.tensor(
    [
        [0, 0, 0],
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
        [1, 2, 3],
        [5, 3, 6],
        [7, 7, 7],
        [100, 37, 211],
    ]
)
CODES = (
    (0, 4, 2, 1, 29, 350, 511, 3608971),
    (0, 2, 4, 1, 43, 238, 511, 3084685),
    (0, 3, 1, 7, 22, 166, 365, 2783548),
    (0, 1, 3, 7, 50, 294, 365, 3691564),
)


def cube(depth: int) -> torch.Tensor:
    """All voxels (8**depth, 3) of a cube."""
    side = torch.arange(2**depth)
    return torch.cartesian_prod(side, side, side)


def one_cloud(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def test_codes_are_those_of_the_released_code() -> None:
    assert curve_codes(POINTS, one_cloud(8), 8).tolist() == [list(row) for row in CODES]
    short = curve_codes(POINTS[:7], one_cloud(7), 3)
    assert short[2].tolist() == [0, 1, 7, 3, 48, 400, 365]
    assert int(curve_codes(POINTS[4:5], torch.tensor([2]), 8)[0, 0]) == 33554461


@pytest.mark.parametrize("name", ["serialization_batch2", "serialization_depth10"])
def test_orders_are_those_of_the_released_code(name: str) -> None:
    _, case = read_case(name)
    found = serialize(case["in.grid_coord"], batch_numbers(case["in.offset"]))
    assert found.depth == int(case["out.depth"])
    assert torch.equal(found.code, case["out.code"])
    assert torch.equal(found.order, case["out.order"])
    assert torch.equal(found.inverse, case["out.inverse"])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_curves_visit_every_voxel_once_and_hilbert_goes_to_a_neighbour(depth: int) -> None:
    voxels = cube(depth)
    codes = curve_codes(voxels, one_cloud(len(voxels)), depth)
    assert torch.equal(codes.sort(dim=1).values, torch.arange(8**depth).expand(4, -1))
    for code in codes[2:]:
        steps = voxels[code.argsort()].diff(dim=0).abs().sum(1)
        assert bool((steps == 1).all())


def test_deepest_codes_do_not_overlap() -> None:
    corner = 2**16 - 2
    voxels = torch.tensor([[corner, 0, corner], [corner, corner, corner], [0, 0, 0]])
    found = serialize(voxels, torch.tensor([0, 0, 1]))
    assert found.depth == 16
    assert found.code[:, 2].tolist() == [2**48] * 4
    assert bool((found.code[:, :2] < 2**48).all())
    assert bool((found.code >= 0).all())


def test_rows_of_one_voxel_keep_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randint(0, 3, (300, 3), generator=generator)
    found = serialize(voxels, one_cloud(300))
    for code, order in zip(found.code, found.order, strict=True):
        same = code[order].diff() == 0
        assert same.sum() > 200
        assert bool((order.diff()[same] > 0).all())


def test_clouds_follow_one_another_and_a_given_depth_makes_orders_their_own() -> None:
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(0, 6, (40, 3), generator=generator)
    large = torch.randint(0, 30, (50, 3), generator=generator)
    batch = batch_numbers(torch.tensor([40, 90]))
    both = torch.cat([small, large])
    for depth, equal in ((7, True), (None, False)):
        joined = serialize(both, batch, depth).order
        assert torch.equal(joined[:, :40].sort(dim=1).values, torch.arange(40).expand(4, -1))
        alone = serialize(small, one_cloud(40), depth).order
        assert torch.equal(joined[2:, :40], alone[2:]) is equal
        assert torch.equal(joined[:2, :40], alone[:2])


@pytest.mark.parametrize(
    ("voxels", "depth", "message"),
    [
        ([[0, 0, -1]], None, "grid_coord from -1"),
        ([[0, 0, 2**16 - 1]], None, "larger grid_size"),
        ([[0, 0, 8]], 3, "depth=3: the voxels of this batch need 4"),
        ([[0, 0, 0]], 17, "depth=17"),
    ],
)
def test_voxels_that_do_not_fit_are_refused(
    voxels: list[list[int]], depth: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        serialize(torch.tensor(voxels), one_cloud(1), depth)


def test_a_given_depth_may_be_the_smallest_that_holds_the_voxels() -> None:
    assert serialize(torch.tensor([[0, 0, 7]]), one_cloud(1), 3).depth == 3
    assert serialize(torch.tensor([[0, 0, 7]]), one_cloud(1)).depth == 4


def test_orders_are_drawn_from_the_generator_alone() -> None:
    drawn = draw_orders(5, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, draw_orders(5, torch.Generator().manual_seed(3)))
    assert not torch.equal(drawn, draw_orders(5, torch.Generator().manual_seed(4)))
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(4).expand(5, -1))


@pytest.mark.parametrize("top", [5, 2**40, 2**62])
def test_stable_sort_equals_torch_for_small_and_for_full_words(top: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(0, 6, (3, 200), generator=generator) * (top // 5)
    values, places = sort_stably(keys)
    expected = keys.sort(dim=-1, stable=True)
    assert torch.equal(values, expected.values)
    assert torch.equal(places, expected.indices)
    assert torch.equal(invert_order(places).gather(1, places), torch.arange(200).expand(3, -1))


def test_groups_are_those_of_unique() -> None:
    keys = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(0))
    found = group_rows(keys)
    unique, inverse, counts = keys.unique(return_inverse=True, return_counts=True)
    assert torch.equal(found.keys, unique)
    assert torch.equal(found.group, inverse)
    assert torch.equal(found.starts, counts.cumsum(0) - counts)
    assert torch.equal(keys[found.rows], keys.sort().values)


def test_permuted_rows_have_the_gradient_of_an_index() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    factor = torch.arange(60.0).view(20, 3)
    (permute_rows(x, order, invert_order(order)) * factor).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[order], factor)


def test_offsets_and_cloud_numbers_belong_together() -> None:
    offset = torch.tensor([3, 3, 7])
    assert batch_numbers(offset).tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert torch.equal(batch_offset(batch_numbers(offset), 3), offset)


def test_voxels_count_from_the_lowest_corner_of_the_batch() -> None:
    coord = torch.tensor([[-1.0, 0.0, 2.0], [-0.95, 0.03, 2.01], [-1.0, 0.5, 2.5]])
    assert grid_coordinates(coord, 0.02).tolist() == [[0, 0, 0], [2, 1, 0], [0, 25, 25]]
    assert grid_coordinates(coord[:0], 0.02).shape == (0, 3)
    with pytest.raises(ValueError, match="grid_size=0"):
        grid_coordinates(coord, 0)
