"""Baselines of token reduction: against slow oracles, and what holds for all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.token_reduction.baselines import (
    BASELINES,
    BaselineInput,
    Reduced,
    average_pooling,
    bipartite_merging,
    class_attention,
    farthest_points,
    k_medoids,
    largest_norm,
    random_tokens,
    uniform_grid,
)

GRID = (4, 5)
LENGTH = 20
AVERAGING = ("pooling", "merging")


def _inputs(batch: int = 3, grid: tuple[int, int] = GRID, channels: int = 6) -> BaselineInput:
    source = torch.Generator().manual_seed(batch * 100 + grid[0])
    length = grid[0] * grid[1]
    tokens = torch.randn(batch, length, channels, generator=source)
    return BaselineInput(tokens, grid, torch.rand(batch, length, generator=source))


def _run(name: str, inputs: BaselineInput, count: int) -> Reduced:
    return BASELINES[name](inputs, count, torch.Generator().manual_seed(5))


def _places(grid: tuple[int, int]) -> Tensor:
    return torch.tensor(list(itertools.product(range(grid[0]), range(grid[1]))), dtype=torch.float)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("grid", [(4, 5), (1, 7), (6, 1), (3, 3), (1, 1)])
def test_every_count_gives_that_many_tokens_in_order(name: str, grid: tuple[int, int]) -> None:
    inputs = _inputs(grid=grid)
    for count in range(1, grid[0] * grid[1] + 1):
        reduced = _run(name, inputs, count)
        assert reduced.tokens.shape == (3, count, 6)
        assert reduced.positions.shape == (3, count, 2)
        for row in reduced.assignment:
            assert set(row[row >= 0].tolist()) == set(range(count))  # no output stands for nothing
            first = [row.tolist().index(n) for n in range(count)]
            if name != "medoids":  # of which only the medoids themselves are in order
                assert first == sorted(first)


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - set(AVERAGING)))
@pytest.mark.parametrize("count", [1, 7, 20])
def test_kept_tokens_are_the_encoders_own(name: str, count: int) -> None:
    inputs = _inputs()
    reduced = _run(name, inputs, count)
    assert reduced.indices is not None
    assert reduced.mask is not None
    assert (reduced.indices.diff(dim=1) > 0).all()
    for image in range(3):
        chosen = reduced.indices[image]
        assert torch.equal(reduced.tokens[image], inputs.tokens[image, chosen])
        assert torch.equal(reduced.positions[image], _places(GRID)[chosen])
        assert reduced.mask[image].nonzero()[:, 0].tolist() == chosen.tolist()
        assert reduced.assignment[image, chosen].tolist() == list(range(count))


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("count", [1, 7, 13, 20])
def test_averaged_tokens_are_means_of_what_they_stand_for(name: str, count: int) -> None:
    inputs = _inputs()
    reduced = _run(name, inputs, count)
    assert reduced.indices is None
    assert reduced.mask is None
    assert (reduced.assignment >= 0).all()
    for image, slot in itertools.product(range(3), range(count)):
        members = reduced.assignment[image] == slot
        mean = inputs.tokens[image, members].mean(0)
        assert torch.allclose(reduced.tokens[image, slot], mean, atol=1e-6)
        centre = _places(GRID)[members].mean(0)
        assert torch.allclose(reduced.positions[image, slot], centre, atol=1e-5)
    sizes = F.one_hot(reduced.assignment, count).sum(1)  # (B, K)
    total = (reduced.tokens * sizes[..., None]).sum(1)
    assert torch.allclose(total, inputs.tokens.sum(1), atol=1e-4)


@pytest.mark.parametrize("name", BASELINES)
def test_all_tokens_are_returned_unchanged_when_all_are_kept(name: str) -> None:
    inputs = _inputs()
    reduced = _run(name, inputs, LENGTH)
    assert torch.equal(reduced.tokens, inputs.tokens)
    assert torch.equal(reduced.assignment, torch.arange(LENGTH).expand(3, -1))


@pytest.mark.parametrize("name", sorted(BASELINES.keys() - {"random"}))
def test_an_image_alone_is_reduced_as_in_a_batch(name: str) -> None:
    inputs = _inputs(batch=5, grid=(8, 8), channels=32)
    whole = _run(name, inputs, 13)
    assert inputs.cls_attention is not None
    for n in range(5):
        part = BaselineInput(inputs.tokens[n : n + 1], (8, 8), inputs.cls_attention[n : n + 1])
        alone = _run(name, part, 13)
        assert torch.equal(alone.assignment[0], whole.assignment[n])
        assert torch.allclose(alone.tokens[0], whole.tokens[n], atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_stays_and_autocast_changes_nothing(name: str) -> None:
    inputs = _inputs(channels=32)
    halves = inputs._replace(tokens=inputs.tokens.bfloat16())
    reduced = _run(name, halves, 7)
    assert reduced.tokens.dtype == torch.bfloat16
    plain = _run(name, inputs._replace(tokens=halves.tokens.float()), 7)
    assert torch.equal(reduced.assignment, plain.assignment)
    assert torch.equal(reduced.tokens, plain.tokens.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = _run(name, inputs, 7)
    assert torch.equal(cast.tokens, _run(name, inputs, 7).tokens)


@pytest.mark.parametrize("name", BASELINES)
def test_equal_tokens_and_zeros_do_no_harm(name: str) -> None:
    tokens = torch.zeros(1, LENGTH, 4)
    tokens[0, 3:9] = 1.0
    reduced = _run(name, BaselineInput(tokens, GRID, torch.zeros(1, LENGTH)), 11)
    assert reduced.tokens.isfinite().all()
    assert set(reduced.assignment[0].tolist()) - {-1} == set(range(11))


def test_gradients_reach_the_tokens_that_stand_in_the_output() -> None:
    for name in BASELINES:
        inputs = _inputs()
        tokens = inputs.tokens.clone().requires_grad_()
        reduced = _run(name, inputs._replace(tokens=tokens), 6)
        reduced.tokens.sum().backward()
        assert tokens.grad is not None
        used = reduced.assignment >= 0 if reduced.mask is None else reduced.mask
        assert torch.equal(tokens.grad.abs().sum(-1) > 0, used)


def test_random_tokens_follow_the_generator_and_are_even() -> None:
    inputs = _inputs(batch=400)
    first, again = (random_tokens(inputs, 5, torch.Generator().manual_seed(1)) for _ in range(2))
    other = random_tokens(inputs, 5, torch.Generator().manual_seed(2))
    assert torch.equal(first.assignment, again.assignment)
    assert not torch.equal(first.assignment, other.assignment)
    assert first.mask is not None
    share = first.mask.float().mean(0)  # 5 of 20; a deviation of .022
    assert (share - 0.25).abs().max() < 0.09


def test_the_uniform_grid_is_a_stride_where_the_count_allows() -> None:
    inputs = BaselineInput(torch.randn(1, 96, 2), (8, 12))
    reduced = uniform_grid(inputs, 24)
    assert reduced.indices is not None
    rows, columns = reduced.indices[0] // 12, reduced.indices[0] % 12
    assert sorted(set(rows.tolist())) == [1, 3, 5, 7]
    assert sorted(set(columns.tolist())) == [1, 3, 5, 7, 9, 11]


def test_pooling_is_that_of_torch_where_rectangles_are_equal() -> None:
    tokens = torch.randn(2, 96, 3)
    reduced = average_pooling(BaselineInput(tokens, (8, 12)), 24)
    image = tokens.mT.reshape(2, 3, 8, 12)
    assert torch.allclose(reduced.tokens, F.avg_pool2d(image, 2).flatten(2).mT, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 5), (12, 12), (3, 17)])
def test_pooled_areas_are_rectangles_of_about_one_size(grid: tuple[int, int]) -> None:
    height, width = grid
    inputs = BaselineInput(torch.zeros(1, height * width, 1), grid)
    for count in range(1, height * width + 1):
        label = average_pooling(inputs, count).assignment[0].reshape(grid)
        sizes = []
        for slot in range(count):
            rows, columns = (label == slot).nonzero(as_tuple=True)
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert box == len(rows)
            sizes.append(len(rows))
        assert max(sizes) <= 4 * min(sizes)


def test_norm_and_attention_keep_the_highest_and_then_the_first() -> None:
    tokens = torch.tensor([1.0, -4.0, 2.0, -2.0, 3.0, 2.0])[None, :, None]
    attention = torch.tensor([[0.1, 0.0, 0.4, 0.1, 0.0, 0.1]])
    inputs = BaselineInput(tokens, (2, 3), attention)
    assert largest_norm(inputs, 3).indices.tolist() == [[1, 2, 4]]  # type: ignore[union-attr]
    assert class_attention(inputs, 3).indices.tolist() == [[0, 2, 3]]  # type: ignore[union-attr]


def _farthest_oracle(tokens: Tensor, count: int) -> list[int]:
    unit = [row / row.norm() for row in tokens.double()]
    distance = [[float(1 - a @ b) for b in unit] for a in unit]
    others = [[d for j, d in enumerate(row) if j != i] for i, row in enumerate(distance)]
    chosen = [max(range(len(unit)), key=lambda i: min(others[i]))]
    while len(chosen) < count:
        rest = [i for i in range(len(unit)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("count", [1, 2, 6, 19])
def test_farthest_points_are_those_of_the_definition(count: int) -> None:
    inputs = _inputs()
    indices = farthest_points(inputs, count).indices
    assert indices is not None
    for image in range(3):
        assert indices[image].tolist() == _farthest_oracle(inputs.tokens[image], count)


def test_farthest_points_do_not_see_the_length_of_tokens() -> None:
    inputs = _inputs()
    scaled = inputs._replace(tokens=inputs.tokens * torch.rand(3, LENGTH, 1).add(0.1))
    assert torch.equal(farthest_points(inputs, 7).assignment, farthest_points(scaled, 7).assignment)


def test_medoids_stand_for_the_nearest_tokens_and_are_central() -> None:
    inputs = _inputs(batch=4, grid=(5, 5))
    reduced = k_medoids(inputs, 6)
    assert reduced.indices is not None
    for image in range(4):
        points, medoids = inputs.tokens[image], reduced.indices[image].tolist()
        distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.equal(reduced.assignment[image], distance[:, medoids].argmin(1))
        for slot, medoid in enumerate(medoids):
            members = (reduced.assignment[image] == slot).nonzero()[:, 0]
            cost = distance[members][:, members].sum(1)
            assert members[cost.argmin()] == medoid


def test_medoids_find_separate_groups_of_tokens() -> None:
    source = torch.Generator().manual_seed(0)
    groups = torch.arange(24) % 3
    tokens = 10 * torch.eye(3)[groups] + 0.1 * torch.randn(24, 3, generator=source)
    reduced = k_medoids(BaselineInput(tokens[None], (4, 6)), 3)
    for slot in range(3):
        assert len(set(groups[reduced.assignment[0] == slot].tolist())) == 1


def _merging_oracle(tokens: Tensor, count: int) -> list[list[int]]:
    members = [[n] for n in range(len(tokens))]
    while len(members) > count:
        means = [F.normalize(tokens[m].double().mean(0), dim=0) for m in members]
        pairs = []
        for a in range(0, len(members), 2):
            odd = range(1, len(members), 2)
            b = max(odd, key=lambda n: float(means[a] @ means[n]))
            pairs.append((float(means[a] @ means[b]), a, b))
        amount = min(len(members) - count, len(members) // 2)
        gone = set()
        for _, a, b in sorted(pairs, reverse=True)[:amount]:
            members[b] += members[a]
            gone.add(a)
        members = [m for n, m in enumerate(members) if n not in gone]
    return sorted(sorted(m) for m in members)


@pytest.mark.parametrize("count", [1, 3, 8, 14, 19])
def test_merging_is_that_of_the_definition(count: int) -> None:
    inputs = _inputs(channels=5)
    assignment = bipartite_merging(inputs, count).assignment
    for image in range(3):
        found = [(assignment[image] == slot).nonzero()[:, 0].tolist() for slot in range(count)]
        assert found == _merging_oracle(inputs.tokens[image], count)


def test_merging_joins_like_tokens_first() -> None:
    tokens = torch.eye(8)[:, None].repeat(1, 2, 1).reshape(1, 16, 8)  # pairs of neighbours
    reduced = bipartite_merging(BaselineInput(tokens, (4, 4)), 8)
    assert torch.equal(reduced.assignment[0], torch.arange(16) // 2)
    assert torch.equal(reduced.tokens[0], torch.eye(8))


@pytest.mark.parametrize("name", BASELINES)
def test_impossible_arguments_are_refused(name: str) -> None:
    inputs = _inputs()
    for count in (0, 21):
        with pytest.raises(ValueError, match=f"count={count}: must be from 1 to the 20"):
            _run(name, inputs, count)
    with pytest.raises(ValueError, match=r"expected \(B, 16, C\)"):
        _run(name, inputs._replace(grid=(4, 4)), 3)
    with pytest.raises(ValueError, match="cls_attention of shape"):
        _run(name, inputs._replace(cls_attention=torch.zeros(3, 4)), 3)


def test_missing_attention_is_no_reason_for_another_baseline() -> None:
    with pytest.raises(ValueError, match="cls_attention=None"):
        class_attention(_inputs()._replace(cls_attention=None), 3)
