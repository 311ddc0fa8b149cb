"""Which tokens are kept: how many, which among equals, under whose budget, and what covers."""

import pytest
import torch
from torch import Tensor

from models.token_reduction.coverage import even_positions, spread_tokens
from models.token_reduction.selection import (
    Selection,
    as_list,
    as_packed,
    gather_kept,
    scatter_kept,
    select,
)


def tokens_and_scores(batch: int = 4, length: int = 36, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, length, 8, generator=generator)
    return tokens, torch.randn(batch, length, generator=generator)


def check(selection: Selection, tokens: Tensor) -> None:
    """All five fields tell the same, in raster order, with the padding they promise."""
    batch, length, _ = tokens.shape
    sizes = selection.mask.sum(1)
    assert selection.indices.shape == selection.valid.shape == (batch, int(sizes.max()))
    for row in range(batch):
        places = selection.mask[row].nonzero()[:, 0]
        size = len(places)
        assert torch.equal(selection.indices[row, :size], places)
        assert (selection.indices[row, size:] == length).all()
        assert torch.equal(selection.valid[row], torch.arange(int(sizes.max())) < size)
        assert torch.equal(selection.kept[row, :size], tokens[row, places])
        assert not selection.kept[row, size:].any()


@pytest.mark.parametrize(
    ("share", "length", "kept"),
    [(0.3, 36, 11), (0.1, 36, 4), (1.0, 36, 36), (0.001, 36, 1), (0.5, 5, 2), (0.29, 144, 42)],
)
def test_share_keeps_the_rounded_number_of_best_tokens(
    share: float, length: int, kept: int
) -> None:
    tokens, scores = tokens_and_scores(length=length)
    selection = select(tokens, scores, share=share)
    check(selection, tokens)
    assert selection.mask.sum(1).tolist() == [kept] * 4
    assert torch.equal(selection.scores, scores)
    for row in range(4):
        best = scores[row].topk(kept).indices.sort().values
        assert torch.equal(selection.indices[row], best)


def test_threshold_keeps_what_is_above_it_and_never_nothing() -> None:
    tokens, scores = tokens_and_scores()
    scores[2] = -1.0 - torch.arange(36.0).flip(0)  # best in the last place
    scores[3, 5] = 0.0
    selection = select(tokens, scores, threshold=0.0)
    check(selection, tokens)
    expected = scores > 0
    assert not expected[3, 5]
    expected[2, 35] = True
    assert torch.equal(selection.mask, expected)
    assert select(tokens, scores, threshold=0.0, minimum=3).mask.sum(1).tolist()[2] == 3
    assert selection.mask.sum(1).unique().numel() > 1


def test_image_budget_is_shared_by_the_tiles_of_an_image_only() -> None:
    tokens, scores = tokens_and_scores(batch=5)
    tiles = torch.tensor([7, 3, 7, 7, 3])
    scores[2] -= 100  # a blank tile of image 7
    selection = select(tokens, scores, share=0.25, budget="image", tiles=tiles)
    check(selection, tokens)
    for image, size in ((7, 27), (3, 18)):
        rows = tiles == image
        assert selection.mask[rows].sum() == size
        kept, dropped = scores[rows][selection.mask[rows]], scores[rows][~selection.mask[rows]]
        assert kept.min() > dropped.max()
    assert not selection.mask[2].any()
    other = select(tokens[1::3], scores[1::3], share=0.25, budget="image", tiles=tiles[1::3])
    assert torch.equal(other.mask, selection.mask[1::3])


def test_image_with_fewer_tokens_than_the_count_keeps_all() -> None:
    tokens, scores = tokens_and_scores(batch=3)
    tiles = torch.tensor([0, 1, 1])
    selection = select(tokens, scores, count=40, budget="image", tiles=tiles)
    assert selection.mask[0].all()
    assert selection.mask[1:].sum() == 40


def test_batch_budget_is_spent_where_the_scores_are() -> None:
    tokens, scores = tokens_and_scores()
    scores[1] += 100
    selection = select(tokens, scores, count=30, budget="batch")
    check(selection, tokens)
    assert selection.mask.sum(1).tolist() == [0, 30, 0, 0]
    selection = select(tokens, scores, threshold=1e6, budget="batch")
    assert selection.mask.sum() == 1
    assert selection.mask.flatten().nonzero() == scores.flatten().argmax()


@pytest.mark.parametrize("budget", ["tile", "image", "batch"])
def test_equal_scores_go_to_the_lower_index(budget: str) -> None:
    tokens, _ = tokens_and_scores()
    tiles = torch.zeros(4, dtype=torch.int64) if budget == "image" else None
    scores = torch.zeros(4, 36)
    scores[:, 30] = 1.0
    selection = select(tokens, scores, count=5, budget=budget, tiles=tiles)
    if budget == "tile":
        assert selection.indices.tolist() == [[0, 1, 2, 3, 30]] * 4
    else:
        assert selection.mask.sum(1).tolist() == [2, 1, 1, 1]
        assert selection.indices[0].tolist() == [0, 30]


def test_infinite_scores_rank_first_and_last() -> None:
    tokens, scores = tokens_and_scores(batch=1)
    scores[0, 20:] = -torch.inf
    scores[0, 7] = torch.inf
    selection = select(tokens, scores, count=22, coverage=0.0)
    assert selection.indices[0].tolist() == list(range(22))
    assert select(tokens, scores, count=1).indices.tolist() == [[7]]


@pytest.mark.parametrize("fill", ["grid", "farthest"])
@pytest.mark.parametrize("coverage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("amount", [{"share": 0.3}, {"threshold": 0.5}, {"count": 7}])
def test_batch_gives_what_its_tiles_give_one_by_one(
    fill: str, coverage: float, amount: dict[str, float]
) -> None:
    tokens, scores = tokens_and_scores(batch=6)
    tokens[2, 10:20] = tokens[2, 3]  # a plain area: equal tokens, equal scores
    scores[2, 10:20] = scores[2, 3]
    whole = select(tokens, scores, coverage=coverage, fill=fill, **amount)
    check(whole, tokens)
    for row in range(6):
        one = slice(row, row + 1)
        alone = select(tokens[one], scores[one], coverage=coverage, fill=fill, **amount)
        assert torch.equal(alone.mask, whole.mask[one])
        assert torch.equal(alone.kept[0], as_list(whole)[row])


def test_grid_coverage_is_an_even_grid_and_the_rest_goes_by_score() -> None:
    tokens, scores = tokens_and_scores()
    selection = select(tokens, scores, count=12, coverage=0.35, fill="grid")
    even = torch.zeros(36, dtype=torch.bool)
    even[even_positions((6, 6), 4)] = True
    for row in range(4):
        mask = selection.mask[row]
        assert mask.sum() == 12
        assert mask[even].all()
        rest = scores[row].masked_fill(even, -torch.inf)
        assert set(rest.topk(8).indices.tolist()) == set((mask & ~even).nonzero()[:, 0].tolist())


def test_image_budget_spreads_the_grid_over_all_tiles() -> None:
    tokens, scores = tokens_and_scores(batch=3)
    scores[1] -= 100
    tiles = torch.zeros(3, dtype=torch.int64)
    selection = select(tokens, scores, count=24, budget="image", tiles=tiles, coverage=0.5)
    assert selection.mask.sum() == 24
    assert torch.equal(selection.indices[1, selection.valid[1]], even_positions((6, 6), 4))


@pytest.mark.parametrize("grid", [(6, 6), (1, 7), (7, 1), (2, 9), (5, 3)])
def test_even_positions_are_as_many_as_asked_for_and_distinct(grid: tuple[int, int]) -> None:
    for count in range(grid[0] * grid[1] + 1):
        places = even_positions(grid, count)
        assert len(places) == count
        assert (places.diff() > 0).all()
        assert count == 0 or (int(places.min()) >= 0 and int(places.max()) < grid[0] * grid[1])


def test_even_positions_leave_no_part_of_the_grid_empty() -> None:
    places = even_positions((12, 12), 16)
    cells = (places // 12 // 3) * 4 + places % 12 // 3
    assert sorted(cells.tolist()) == list(range(16))
    assert even_positions((12, 12), 1).tolist() == [6 * 12 + 6]


def farthest_by_hand(tokens: Tensor, chosen: list[int], count: int) -> list[int]:
    """Greedy max-min cosine distance, one token at a time in float64."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    while len(chosen) < count:
        nearest = (unit @ unit[chosen].T).amax(1)
        nearest[chosen] = torch.inf
        chosen = [*chosen, int(nearest.argmin())]
    return sorted(chosen)


def test_farthest_coverage_adds_the_tokens_unlike_any_kept() -> None:
    tokens, scores = tokens_and_scores()
    selection = select(tokens, scores, count=12, coverage=0.5, fill="farthest")
    for row in range(4):
        best = scores[row].topk(6).indices.tolist()
        assert selection.indices[row].tolist() == farthest_by_hand(tokens[row], best, 12)


def test_farthest_coverage_reaches_a_cluster_without_scores() -> None:
    tokens = torch.zeros(1, 30, 4)
    tokens[0, :20, 0] = 1
    tokens[0, 20:29, 1] = 1
    tokens[0, 29, 2] = 1
    scores = -torch.arange(30.0)[None]
    selection = select(tokens, scores, count=5, coverage=0.4, fill="farthest")
    assert selection.indices.tolist() == [[0, 1, 2, 20, 29]]
    by_score = select(tokens, scores, count=5)
    assert by_score.indices.tolist() == [[0, 1, 2, 3, 4]]


def test_spreading_leaves_padding_out_and_is_exact_under_autocast() -> None:
    tokens, _ = tokens_and_scores(batch=2, length=120)
    present = torch.arange(120) < torch.tensor([[120], [80]])
    chosen = torch.arange(120).eq(0).repeat(2, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spread = spread_tokens(tokens, chosen, torch.tensor([60, 80]), present)
    assert torch.equal(spread[1], present[1])
    assert spread[0].nonzero()[:, 0].tolist() == farthest_by_hand(tokens[0], [0], 60)


def test_kept_tokens_are_untouched_and_pass_gradients() -> None:
    tokens, scores = tokens_and_scores()
    half = tokens.half()
    selection = select(half, scores.half(), share=0.3)
    assert selection.kept.dtype == torch.float16
    assert selection.scores.dtype == torch.float32
    check(selection, half)
    tokens.requires_grad_()
    select(tokens, scores, share=0.3).kept.sum().backward()
    assert tokens.grad is not None
    kept = select(tokens, scores, share=0.3).mask
    assert torch.equal(tokens.grad, kept[..., None].expand(-1, -1, 8).float())


def test_kept_tokens_go_back_to_their_places() -> None:
    tokens, scores = tokens_and_scores()
    selection = select(tokens, scores, threshold=0.3)
    filling = torch.arange(8.0)
    whole = scatter_kept(selection.kept, selection.indices, 36, filling)
    mask = selection.mask[..., None]
    assert torch.equal(whole, torch.where(mask, tokens, filling))
    assert torch.equal(gather_kept(whole, selection.indices), selection.kept)
    assert torch.equal(
        gather_kept(scores, selection.indices)[selection.valid], scores[mask[..., 0]]
    )


def test_packed_tokens_follow_one_another() -> None:
    tokens, scores = tokens_and_scores()
    scores[1] -= 100
    selection = select(tokens, scores, share=0.25, budget="batch")
    packed = as_packed(selection)
    assert packed.lengths.tolist() == selection.mask.sum(1).tolist()
    assert packed.lengths[1] == 0
    assert torch.equal(packed.tokens, torch.cat(as_list(selection)))
    parts = packed.indices.split(packed.lengths.tolist())
    for row, part in enumerate(parts):
        assert torch.equal(part, selection.mask[row].nonzero()[:, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing: give one of share, count, threshold"),
        ({"share": 0.5, "count": 3}, "share=0.5, count=3: give one"),
        ({"share": 0.0}, "share=0.0: must be in"),
        ({"share": 1.5}, "share=1.5: must be in"),
        ({"count": 0}, "count=0: must be >= 1"),
        ({"count": 37}, "count=37: must be from 1 to the 36 tokens"),
        ({"threshold": float("nan")}, "threshold=nan: must be a number"),
        ({"share": 0.5, "minimum": 0}, "minimum=0: must be from 1"),
        ({"share": 0.5, "coverage": 1.1}, "coverage=1.1"),
        ({"share": 0.5, "fill": "random"}, "fill='random': expected"),
        ({"share": 0.5, "grid": (5, 5)}, r"grid=\(5, 5\): must have the 36 tokens"),
        ({"share": 0.5, "budget": "image"}, "budget='image': tiles must be given"),
        ({"share": 0.5, "tiles": torch.zeros(4)}, "budget='tile': tiles must be given"),
        ({"share": 0.5, "budget": "page"}, "budget='page'"),
        ({"share": 0.5, "budget": "image", "tiles": torch.zeros(3)}, r"expected \(4,\) integers"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments: dict[str, object], message: str) -> None:
    tokens, scores = tokens_and_scores()
    with pytest.raises(ValueError, match=message) as raised:
        select(tokens, scores, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_wrong_tensors_are_named_in_one_line() -> None:
    tokens, scores = tokens_and_scores()
    with pytest.raises(ValueError, match=r"tokens \(4, 36, 8\), scores \(4, 35\)"):
        select(tokens, scores[:, 1:], share=0.5)
    scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match="scores hold NaN"):
        select(tokens, scores, share=0.5)
