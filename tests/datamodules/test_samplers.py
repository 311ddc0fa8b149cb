"""Order of the data: keyed, shared out over ranks without overlap, equal batch counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.keyed_random import keyed_bits, keyed_generator
from datamodules.samplers import EpochSampler, EvaluationSampler, rank_and_world_size

RANKS = [1, 2, 3, 8, 64]


def first_draw(*key: int) -> float:
    return torch.rand(1, generator=keyed_generator(*key), dtype=torch.float64).item()


def test_keys_are_reproducible_and_distinct() -> None:
    keys = [(), (0,), (0, 0), (0, 1), (1, 0), (-1,), (1, 2, 3), (3, 2, 1), (2**63, 5)]
    assert len({first_draw(*key) for key in keys}) == len(keys)
    assert all(first_draw(*key) == first_draw(*key) for key in keys)


def test_neighbouring_keys_are_uncorrelated() -> None:
    draws = np.array([[first_draw(a, b) for b in range(40)] for a in range(40)])
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.1


def test_keyed_bits_are_fair_and_depend_on_every_part() -> None:
    words = np.arange(20_000)
    bits = keyed_bits((3, 4), words)
    shares = [((bits >> np.uint64(place)) & np.uint64(1)).mean() for place in range(64)]
    assert 0.48 < min(shares) <= max(shares) < 0.52
    for other in (keyed_bits((3, 5), words), keyed_bits((4, 3), words)):
        assert abs(((bits ^ other) & np.uint64(1)).mean() - 0.5) < 0.02
    assert np.array_equal(keyed_bits((3, 4), words[7:9]), bits[7:9])


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("count", [640, 647, 1000])
def test_training_ranks_never_overlap(world_size: int, count: int) -> None:
    batch_size = 3
    ranks = [
        list(EpochSampler(count, batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {count // (batch_size * world_size)}
    seen = [index for batches in ranks for batch in batches for index, _ in batch]
    assert len(seen) == len(set(seen)) > count - batch_size * world_size
    assert all(len(batch) == batch_size for batches in ranks for batch in batches)


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    whole = list(EpochSampler(48, 12))
    parts = [list(EpochSampler(48, 4, rank=rank, world_size=3)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (8, 3), (3, 8)])
def test_another_world_size_mid_epoch_sees_no_sample_twice(before: int, after: int) -> None:
    count, batch_size, done = 200, 4, 3
    seen: list[int] = []
    for rank in range(before):
        batches = list(EpochSampler(count, batch_size, rank=rank, world_size=before))[:done]
        seen += [index for batch in batches for index, _ in batch]
    offset = done * batch_size * before
    for rank in range(after):
        sampler = EpochSampler(count, batch_size, rank=rank, world_size=after)
        sampler.seek(0, offset)
        seen += [index for batch in sampler for index, _ in batch]
    assert len(seen) == len(set(seen)) > count - batch_size * after


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(50, 5, seed=1)
    assert sorted(sampler.order(0).tolist()) == list(range(50))
    assert not np.array_equal(sampler.order(0), sampler.order(1))
    assert not np.array_equal(sampler.order(0), EpochSampler(50, 5, seed=2).order(0))
    assert np.array_equal(sampler.order(3), EpochSampler(50, 2, seed=1).order(3))
    sampler.seek(4, 0)
    assert {epoch for batch in sampler for _, epoch in batch} == {4}


def test_unshuffled_order() -> None:
    sampler = EpochSampler(6, 2, shuffle=False)
    assert [[index for index, _ in batch] for batch in sampler] == [[0, 1], [2, 3], [4, 5]]


def test_naming_the_present_epoch_keeps_the_position() -> None:
    sampler = EpochSampler(20, 2)
    sampler.seek(3, 8)
    sampler.set_epoch(3)
    assert (sampler.offset, sampler.remaining) == (8, 6)
    sampler.set_epoch(4)
    assert (sampler.epoch, sampler.offset, sampler.remaining) == (4, 0, 10)


def test_less_than_one_global_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"7 training samples: fewer than one global batch of 8"):
        EpochSampler(7, 4, world_size=2)


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("count", [64, 65, 127, 640, 1000])
@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_evaluation_sees_every_sample_once(world_size: int, count: int, batch_size: int) -> None:
    ranks = [
        list(EvaluationSampler(count, batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(ranks[0][0] for _ in ranks)
    seen = [index for batches in ranks for batch in batches for index, _ in batch]
    assert seen == list(range(count))
    largest = max(len(batch) for batches in ranks for batch in batches)
    assert largest <= max(batch_size, 2 if count % world_size else 1)
    sampler = EvaluationSampler(count, batch_size, world_size=world_size)
    assert len(sampler) == len(ranks[0])


def test_fewer_evaluation_samples_than_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 evaluation samples: fewer than 4 processes"):
        EvaluationSampler(3, 2, world_size=4)


def test_a_single_process_is_rank_zero_of_one() -> None:
    assert rank_and_world_size(None) == (0, 1)
