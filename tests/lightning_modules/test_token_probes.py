"""Probes of kept tokens, short trainings and intervals, each against what can be worked out."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.metrics.adaptivity import measure_adaptivity
from lightning_modules.metrics.bootstrap import ratio_estimate
from lightning_modules.metrics.short_training import ShortTraining, fit_network
from lightning_modules.metrics.token_probes import (
    ReadTokens,
    SceneProbe,
    area_weights,
    fit_reader,
    read_rightly,
)
from models.token_reduction.baselines import BASELINES, BaselineInput
from models.token_reduction.learned_reduction import selector_reduction
from models.token_reduction.reading import RegionReader, grid_positions
from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selector import SelectorShape

GRID = (4, 4)


def written(count: int) -> tuple[Tensor, Tensor]:
    """Tokens (N, 16, 8) that carry, in one token of each region, what stands there (N, 4)."""
    generator = torch.Generator().manual_seed(count)
    regions = torch.randint(4, (count, 4), generator=generator)
    tokens = 0.1 * torch.randn(count, 16, 8, generator=generator)
    for region, place in enumerate((0, 3, 12, 15)):
        tokens[:, place, :4] += 3 * nn.functional.one_hot(regions[:, region], 4)
    return tokens, regions


def trained_reader() -> RegionReader:
    tokens, regions = written(256)
    torch.manual_seed(0)
    reader = RegionReader(8, 4, GRID, width=16, heads=2)
    places = grid_positions(GRID)

    def everything(positions: Tensor, generator: torch.Generator) -> ReadTokens:
        return ReadTokens(tokens[positions], places.expand(len(positions), -1, -1))

    fit_reader(reader, regions, everything, ShortTraining(150, 32, lr=1e-2, muon_lr=None))
    return reader


def test_reader_reads_and_misses_what_was_dropped() -> None:
    reader = trained_reader()
    tokens, regions = written(100)
    places = grid_positions(GRID).expand(100, -1, -1)
    right, there = read_rightly(reader, ReadTokens(tokens, places), regions)
    assert right.sum() > 0.95 * there.sum()
    kept = [1, 2, 3, 4, 5, 6, 12, 15]  # the upper left corner is gone
    right, _ = read_rightly(reader, ReadTokens(tokens[:, kept], places[:, kept]), regions[:, :])
    lost = (regions[:, 0] > 0).sum()
    assert right.sum() <= there.sum() - 0.5 * lost


def test_region_without_tokens_gets_the_learned_answer() -> None:
    torch.manual_seed(0)
    reader = RegionReader(8, 4, GRID, width=16, heads=2)
    nn.init.constant_(reader.empty, 7.0)
    tokens = torch.randn(2, 2, 8)
    positions = torch.tensor([[0.0, 0.0], [0.0, 3.0]]).expand(2, -1, -1)
    logits = reader(tokens, positions)
    assert bool((logits[:, 2:] == 7).all())
    assert not bool((logits[:, :2] == 7).any())


def test_invalid_tokens_are_not_read() -> None:
    torch.manual_seed(0)
    reader = RegionReader(8, 4, GRID, width=16, heads=2)
    tokens, positions = torch.randn(3, 5, 8), grid_positions(GRID)[:5].expand(3, -1, -1)
    valid = torch.tensor([True, True, False, True, False]).expand(3, -1)
    expected = reader(tokens[:, [0, 1, 3]], positions[:, [0, 1, 3]])
    torch.testing.assert_close(reader(tokens, positions, valid), expected)


def test_reader_does_not_depend_on_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    reader = RegionReader(8, 4, GRID, width=16, heads=2)
    tokens, positions = torch.randn(3, 16, 8), grid_positions(GRID).expand(3, -1, -1)
    order = torch.randperm(16)
    shuffled = reader(tokens[:, order], positions[:, order])
    torch.testing.assert_close(shuffled, reader(tokens, positions))


def test_scene_probe_separates_what_is_separable() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(3, (300,), generator=generator)
    pooled = torch.randn(300, 5, generator=generator)
    pooled[:, :3] += 6 * nn.functional.one_hot(scenes, 3)
    probe = SceneProbe(pooled[:200], scenes[:200], 3)
    assert (probe(pooled[200:]) == scenes[200:]).float().mean() > 0.98


def test_area_weights_follow_the_area() -> None:
    places = grid_positions(GRID)
    inputs = BaselineInput(torch.randn(1, 16, 3), GRID)
    reduced = BASELINES["grid"](inputs, 16, None)
    torch.testing.assert_close(area_weights(reduced, places), torch.full((1, 16), 1 / 16))
    corner = reduced._replace(positions=torch.tensor([[[0.0, 0.0], [3.0, 3.0], [3.0, 2.9]]]))
    weights = area_weights(corner, places)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[0, 0] > weights[0, 1]


def test_interval_covers_a_proportion_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        right = (torch.rand(200, generator=generator) < 0.8).double()
        estimate = ratio_estimate(right, torch.ones(200), draws=300)
        covered += estimate.low <= 0.8 <= estimate.high
    assert 0.89 <= covered / 200 <= 0.99


def test_ratio_is_of_sums_and_not_a_mean_of_ratios() -> None:
    estimate = ratio_estimate(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0]))
    assert estimate.value == 0.25
    with pytest.raises(ValueError, match="sum to 0"):
        ratio_estimate(torch.zeros(3), torch.zeros(3))


def test_short_training_repeats_itself_and_leaves_the_global_noise_alone() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        network = nn.Linear(4, 1)

        def loss_of(
            positions: Tensor, generator: torch.Generator, network: nn.Linear = network
        ) -> Tensor:
            noise = torch.randn(len(positions), 4, generator=generator)
            return (network(noise) - noise.sum(1, keepdim=True)).square().mean()

        state = torch.get_rng_state()
        fit_network(network, 10, loss_of, ShortTraining(60, 8, lr=0.1, muon_lr=None))
        assert torch.equal(torch.get_rng_state(), state)
        results.append(network.weight.detach().clone())
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], torch.ones(1, 4), atol=0.1, rtol=0)


def test_threshold_is_calibrated_on_other_images() -> None:
    torch.manual_seed(0)
    reducer = TokenReducer(SelectorShape(8, 2, GRID, layers=1), ReducerOrigin("noise"))
    train, test = torch.randn(200, 16, 8), torch.randn(200, 16, 8)
    reducer.standardiser.update(train)
    labels = {"kind": torch.arange(200) % 2, "complexity": torch.rand(200)}
    rows = measure_adaptivity(
        reducer, {"tokens": train}, {"tokens": test, **labels}, (0.3, 1.0), ("even", "odd")
    )
    assert len(rows) == 1
    assert rows[0].keep == pytest.approx(0.3, abs=0.03)
    assert rows[0].by_kind["even"] == pytest.approx(rows[0].by_kind["odd"], abs=0.05)
    assert abs(rows[0].spearman) < 0.25
    assert "calibrated to 0.3" in rows[0].describe()


def test_selector_stands_among_the_baselines() -> None:
    torch.manual_seed(0)
    reducer = TokenReducer(SelectorShape(8, 2, GRID, layers=1), ReducerOrigin("noise"))
    tokens = torch.randn(3, 16, 8)
    reducer.standardiser.update(tokens)
    inputs = BaselineInput(reducer.standardiser(tokens), GRID)
    reduced = selector_reduction(reducer)(inputs, 5, None)
    expected = reducer.reduce(tokens, count=5).indices
    assert torch.equal(reduced.indices, expected)
    covered = selector_reduction(reducer, 0.4)(inputs, 5, None)
    assert torch.equal(covered.indices, reducer.reduce(tokens, count=5, coverage=0.4).indices)
