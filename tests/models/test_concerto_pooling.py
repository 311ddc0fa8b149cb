"""Pooling between levels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.concerto.clouds import batch_numbers
from models.concerto.pooling import GridPooling, cell_means, group_cells
from models.concerto.serialization import serialize
from tests.models.concerto_cases import fill, read_case


@pytest.mark.parametrize("name", ["pooling_single", "pooling_origin"])
def test_pooling_is_that_of_the_released_code(name: str) -> None:
    description, case = read_case(name)
    tolerance = description["tolerances"]["atol"]
    network = GridPooling(16, 32)
    fill(network)
    offset = case["in.offset"]
    cells = group_cells(case["in.grid_coord"], batch_numbers(offset), len(offset))
    assert torch.equal(cells.inverse, case["out.inverse"])
    assert torch.equal(cells.pointer, case["out.idx_ptr"])
    assert torch.equal(cells.grid_coord, case["out.grid_coord"])
    assert torch.equal(cells.batch, case["out.batch"])
    assert torch.equal(cells.offset, case["out.offset"])
    curves = serialize(cells.grid_coord, cells.batch)
    assert curves.depth == int(case["out.depth"])
    assert torch.equal(curves.order[case["out.order_perm"]], case["out.serialized_order"])
    for key in ("coord", "origin_coord"):
        if f"in.{key}" in case:
            mean = cell_means(case[f"in.{key}"], cells)
            assert (mean - case[f"out.{key}"]).abs().max() < tolerance[f"out.{key}"]
    x = case["in.feat"].clone().requires_grad_()
    out = network(x, cells)
    out.square().sum().backward()
    found = {
        "out.feat": out.detach(),
        "out.grad_feat": x.grad,
        "out.grad_proj_weight": network.proj.weight.grad,
    }
    for key, value in found.items():
        assert value is not None
        assert (value - case[key]).abs().max() < tolerance[key], key


def test_clouds_are_pooled_apart() -> None:
    voxels = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 1], [5, 4, 4]])
    cells = group_cells(voxels, torch.tensor([0, 0, 2, 2]), 3)
    assert cells.inverse.tolist() == [0, 0, 1, 2]
    assert cells.offset.tolist() == [1, 1, 3]
    assert cells.grid_coord.tolist() == [[0, 0, 0], [0, 0, 0], [2, 2, 2]]
    assert torch.equal(cells.by_voxel[cells.places], torch.arange(4))


def test_the_maximum_comes_before_norm_and_gelu() -> None:
    network = GridPooling(3, 4)
    fill(network)
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randint(0, 6, (40, 3), generator=generator)
    x = torch.randn(40, 3, generator=generator)
    cells = group_cells(voxels, torch.zeros(40, dtype=torch.int64), 1)
    rows = network.proj(x)
    largest = torch.stack(
        [rows[cells.inverse == number].amax(0) for number in range(len(cells.grid_coord))]
    )
    expected = F.gelu(network.norm(largest))
    assert torch.allclose(network(x, cells), expected, atol=1e-6)
    means = torch.stack(
        [x[cells.inverse == number].mean(0) for number in range(len(cells.grid_coord))]
    )
    assert torch.allclose(cell_means(x, cells), means, atol=1e-6)
