"""Masks of cells: counted, of each cloud's own cells, and a jitter of masked points alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.concerto.masking import cell_numbers, jitter_masked, mask_cells
from tests.models.concerto_cases import random_cloud, read_case


@pytest.fixture(scope="module")
def step() -> dict[str, Tensor]:
    return read_case("losses_full_step")[1]


def test_mask_and_cells_are_the_released_ones(step: dict[str, Tensor]) -> None:
    coord, offset = step["in.global_coord"], step["in.global_offset"]
    cells, count = cell_numbers(coord, offset, 0.2)
    assert torch.equal(cells, step["out.mask_cell"])
    assert count == len(step["in.mask_perm"])
    mask = mask_cells(coord, offset, 0.2, 0.5, step["in.mask_perm"])
    assert torch.equal(mask.long(), step["out.mask"])


def test_moved_coordinates_are_the_released_ones(step: dict[str, Tensor]) -> None:
    mask = step["out.mask"].bool()
    moved = jitter_masked(step["in.global_coord"], mask, 0.01, step["in.mask_noise"])
    torch.testing.assert_close(moved, step["out.masked_coord"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [0.1, 0.4])
def test_share_of_cells_is_masked_whole(ratio: float, size: float) -> None:
    cloud = random_cloud(3, 200)
    generator = torch.Generator().manual_seed(5)
    mask = mask_cells(cloud.coord, cloud.offset, size, ratio, generator)
    cells, count = cell_numbers(cloud.coord, cloud.offset, size)
    masked = torch.unique(cells[mask])
    assert len(masked) == int(count * ratio)
    assert mask[torch.isin(cells, masked)].all()  # no cell is masked in part


def test_cells_start_at_each_clouds_own_corner() -> None:
    cloud = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    both = torch.cat([cloud, cloud + torch.tensor([0.25, 4.0, -3.0])])
    offset = torch.tensor([40, 80])
    cells, count = cell_numbers(both, offset, 0.3)
    alone, single = cell_numbers(cloud, offset[:1], 0.3)
    assert count == 2 * single
    assert torch.equal(cells[:40], alone)
    assert torch.unique(torch.stack([cells[40:], alone]), dim=1).shape[1] == single


def test_cells_are_numbered_by_cloud_then_coordinates() -> None:
    coord = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [7.0, 7, 7]])
    cells, count = cell_numbers(coord, torch.tensor([4, 5]), 0.5)
    assert cells.tolist() == [0, 3, 2, 1, 4]
    assert count == 5
    assert cell_numbers(coord[:0], torch.tensor([0, 0]), 0.5)[1] == 0


def test_generator_decides_the_mask_and_nothing_else() -> None:
    cloud = random_cloud(2, 150)

    def masks(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return mask_cells(cloud.coord, cloud.offset, 0.2, 0.5, generator)

    before = torch.get_rng_state()
    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))
    assert torch.equal(before, torch.get_rng_state())


def test_jitter_moves_masked_points_and_is_cut_above() -> None:
    coord = torch.zeros(30_000, 3)
    mask = torch.arange(len(coord)) % 3 == 0
    moved = jitter_masked(coord, mask, 0.01, torch.Generator().manual_seed(0))
    assert moved[~mask].abs().max() == 0
    assert float(moved[mask].max()) == pytest.approx(0.02)
    assert moved[mask].min() < -0.03
    assert float(moved[mask].std()) == pytest.approx(0.01, rel=0.05)
    assert coord.abs().max() == 0


def test_wrong_arguments_are_named() -> None:
    cloud = random_cloud(1, 20)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="mask_size=0, mask_ratio="):
        mask_cells(cloud.coord, cloud.offset, 0, 0.5, generator)
    with pytest.raises(ValueError, match=r"mask_ratio=1\.5"):
        mask_cells(cloud.coord, cloud.offset, 0.1, 1.5, generator)
    with pytest.raises(ValueError, match="permutation of 3: there are"):
        mask_cells(cloud.coord, cloud.offset, 0.1, 0.5, torch.arange(3))
