"""Retrieval by cosine, and the judge of pictures that rests on it."""

import pytest
import torch

from lightning_modules.metrics.picture_retrieval import PictureJudge
from lightning_modules.metrics.retrieval import (
    grouped_ranks,
    nearest_entries,
    recall,
    retrieval_ranks,
)


def random_pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return small.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_ranks_count_who_comes_before() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.1], [0.0, 5.0], [1.0, 0.0]])
    ranks = retrieval_ranks(queries, gallery, torch.tensor([0, 1, 3]))
    assert ranks.tolist() == [0, 1, 3]
    assert (recall(ranks, 1), recall(ranks, 2)) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_a_constant_answer_is_right_by_chance() -> None:
    gallery = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0))
    own = torch.arange(20)
    for answer in (torch.zeros(20, 3, 4), torch.ones(20, 3, 4)):
        ranks = retrieval_ranks(answer, gallery, own)
        assert sorted(ranks.tolist()) == list(range(20))
    assert recall(retrieval_ranks(gallery, gallery, own), 1) == 1.0


def test_what_all_share_is_subtracted() -> None:
    centre = torch.tensor([10.0, 0.0])
    gallery = centre + torch.tensor([[0.0, 1.0], [-5.0, 1.5]])
    query, own = centre + torch.tensor([[0.0, 3.0]]), torch.tensor([0])
    assert retrieval_ranks(query, gallery, own, centre).tolist() == [0]
    assert retrieval_ranks(query, gallery, own).tolist() == [1]
    assert nearest_entries(query, gallery, centre).tolist() == [0]
    assert nearest_entries(query, gallery, 0 * centre).tolist() == [1]


def test_groups_are_compared_among_themselves() -> None:
    gallery = torch.eye(7)
    queries = gallery.roll(1, 0)  # the answer of the one before
    own = torch.arange(7)
    assert recall(retrieval_ranks(queries, gallery, own), 1) == 0
    # In groups of two, and three at the end: only the first of each has its neighbour elsewhere.
    ranks = grouped_ranks(queries, gallery, own, 2)
    alone = [retrieval_ranks(queries[a:b], gallery[a:b], torch.arange(b - a)).tolist()
             for a, b in ((0, 2), (2, 4), (4, 7))]  # fmt: skip
    assert ranks.tolist() == [rank for group in alone for rank in group]
    with pytest.raises(ValueError, match="truth=7"):
        retrieval_ranks(queries, gallery, own + 1)
    with pytest.raises(ValueError, match="expected"):
        retrieval_ranks(queries, gallery[:, :3], own)


def test_judge_finds_true_pictures() -> None:
    truth = random_pictures(30)
    judge = PictureJudge(truth, stride=16, image_size=32, group=10)
    perfect = judge.rate(truth[:20])
    assert perfect == {"r1_group": 1.0, "r1": 1.0, "r5": 1.0, "psnr": 100.0}
    other = judge.rate(random_pictures(20, seed=1))
    assert other["r1"] < 0.3
    assert 3 < other["psnr"] < 10
    nearly = (truth[:20] + 0.2).clamp(-1, 1)
    errors = (nearly - truth[:20]).div(2).square().mean((1, 2, 3))
    level = float(-10 * errors.log10().mean())
    assert judge.rate(nearly)["psnr"] == pytest.approx(level, abs=1e-3)
