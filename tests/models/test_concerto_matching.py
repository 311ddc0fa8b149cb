"""Nearest neighbours between views: the released pairs, by tree and by distances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.concerto import matching
from models.concerto.matching import match_nearest
from tests.models.concerto_cases import read_case


@pytest.mark.parametrize("tree", [0, 1 << 40])
def test_pairs_are_the_released_ones(tree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_TREE", tree)
    description, case = read_case("losses_match")
    views = [case[f"in.view{n}_{part}"] for n in (1, 2) for part in ("coord", "offset")]
    pairs = match_nearest(*views, description["config"]["match_max_r"])
    assert torch.equal(pairs, case["out.match_index"])
    distance = (views[0][pairs[:, 0]] - views[2][pairs[:, 1]]).norm(dim=1)
    torch.testing.assert_close(distance, case["out.distance"][pairs[:, 0]], atol=1e-5, rtol=0)


def clouds(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sum(sizes), 3, generator=generator), torch.tensor(sizes).cumsum(0)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_chunks_and_tree_agree(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = clouds(0, [300, 20]), clouds(1, [200, 30])
    monkeypatch.setattr(matching, "_TREE", 0)
    expected = match_nearest(*first, *second, 0.1)
    monkeypatch.setattr(matching, "_TREE", 1 << 40)
    monkeypatch.setattr(matching, "_CHUNK", chunk)
    assert torch.equal(match_nearest(*first, *second, 0.1), expected)
    assert 0 < len(expected) < 320


def test_neighbours_are_of_the_same_cloud() -> None:
    coord = torch.tensor([[0.0, 0, 0], [5.0, 0, 0]])
    own, other = torch.tensor([1, 2]), torch.tensor([1, 2])
    swapped = coord.flip(0)
    assert match_nearest(coord, own, swapped, other, 1.0).shape == (0, 2)
    assert match_nearest(coord, own, coord, other, 1.0).tolist() == [[0, 0], [1, 1]]


def test_radius_itself_is_too_far() -> None:
    one, offset = torch.zeros(1, 3), torch.tensor([1])
    other = torch.tensor([[0.5, 0.0, 0.0]])
    assert len(match_nearest(one, offset, other, offset, 0.5)) == 0
    assert len(match_nearest(one, offset, other, offset, 0.5001)) == 1


def test_empty_clouds_have_no_pairs() -> None:
    coord = torch.zeros(2, 3)
    pairs = match_nearest(coord, torch.tensor([0, 2, 2]), coord, torch.tensor([1, 1, 2]), 1.0)
    assert pairs.shape == (0, 2)
    assert pairs.dtype == torch.int64
    pairs = match_nearest(coord, torch.tensor([0, 2]), coord, torch.tensor([1, 2]), 1.0)
    assert pairs.tolist() == [[0, 1], [1, 1]]


def test_views_of_other_numbers_of_clouds_are_refused() -> None:
    coord = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="views of 1 and 2 clouds"):
        match_nearest(coord, torch.tensor([2]), coord, torch.tensor([1, 2]), 1.0)
