"""The reducer as users call it: its statistics, its selections, and its files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.layers.standardiser import FeatureStandardiser
from models.token_reduction.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_reducer,
    save_reducer,
)
from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selection import select
from models.token_reduction.selector import SelectorShape, TokenSelector

SHAPE = SelectorShape(width=16, heads=2, grid=(4, 6), layers=1)
ORIGIN = ReducerOrigin("timm/some_encoder", "0123abcd", layer=-2, floor=0.3)


def features(*shape: int, seed: int = 0) -> Tensor:
    """Tokens with one huge channel and one of large mean, as encoders have them."""
    tokens = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))
    scale, shift = torch.ones(16), torch.zeros(16)
    scale[3], shift[5] = 100.0, 300.0
    return tokens * scale + shift


def make_reducer(shape: SelectorShape = SHAPE) -> TokenReducer:
    torch.manual_seed(1)
    reducer = TokenReducer(shape, ORIGIN)
    reducer.standardiser.update(features(8, 24, seed=7))
    return reducer


def check_statistics(standardiser: FeatureStandardiser, tokens: Tensor) -> None:
    rows = tokens.reshape(-1, 16).double()
    assert int(standardiser.count) == len(rows)
    torch.testing.assert_close(
        standardiser.mean.double(), rows.mean(0), rtol=1e-6, atol=1e-5 * float(rows.std())
    )
    torch.testing.assert_close(
        standardiser.std.double(), rows.std(0, correction=0), rtol=1e-5, atol=0
    )


def test_statistics_are_those_of_all_tokens_seen_in_uneven_batches() -> None:
    tokens = features(300)
    standardiser = FeatureStandardiser(16)
    for part in tokens.split([1, 99, 7, 193]):
        standardiser.update(part)
    check_statistics(standardiser, tokens)
    standard = standardiser(tokens)
    torch.testing.assert_close(standard.mean(0), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardiser.inverse(standard), tokens, atol=1e-3, rtol=1e-5)


def test_parts_gathered_apart_merge_to_the_whole() -> None:
    tokens = features(10, 24)
    parts = [FeatureStandardiser(16) for _ in range(3)]
    parts[0].update(tokens[:2])
    parts[1].update(tokens[2:])
    parts[0].merge(parts[2])  # has seen nothing
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    check_statistics(parts[2], tokens)


def test_masked_tokens_do_not_count() -> None:
    tokens = features(6, 24)
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(0)) < 0.5
    standardiser = FeatureStandardiser(16)
    standardiser.update(tokens.masked_fill(~mask[..., None], torch.nan), mask)
    check_statistics(standardiser, tokens[mask])
    standardiser.update(tokens, torch.zeros(6, 24, dtype=torch.bool))
    check_statistics(standardiser, tokens[mask])


def test_statistics_continue_after_saving() -> None:
    tokens = features(200)
    first, second = FeatureStandardiser(16), FeatureStandardiser(16)
    first.update(tokens[:80])
    second.load_state_dict(first.state_dict())
    second.update(tokens[80:])
    check_statistics(second, tokens)


def test_half_precision_tokens_are_standardised_in_float32() -> None:
    standardiser = FeatureStandardiser(16)
    tokens = features(50).half()
    standardiser.update(tokens)
    check_statistics(standardiser, tokens)
    standard = standardiser(tokens)
    assert standard.dtype == torch.float32
    torch.testing.assert_close(standard, standardiser(tokens.float()))


def test_constant_channels_become_zero() -> None:
    standardiser = FeatureStandardiser(16)
    tokens = features(50)
    tokens[:, 0] = 0.1
    standardiser.update(tokens)
    assert standardiser(tokens)[:, 0].abs().max() < 1e-6


def test_standardiser_needs_tokens_that_are_numbers() -> None:
    standardiser = FeatureStandardiser(16)
    for call in (standardiser, standardiser.inverse):
        with pytest.raises(RuntimeError, match="has seen no tokens: call update"):
            call(features(3))
    with pytest.raises(ValueError, match=r"tokens \(3, 8\): expected 16 channels"):
        standardiser.update(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="NaN or infinity"):
        standardiser.update(torch.full((3, 16), torch.inf))
    assert not standardiser.fitted


def test_reducer_keeps_raw_tokens_by_the_scores_of_standardised_ones() -> None:
    reducer, tokens = make_reducer(), features(3, 24)
    selection = reducer.reduce(tokens, share=0.25)
    standard = (tokens - reducer.standardiser.mean) / reducer.standardiser.std
    logits = reducer.selector(standard).detach()
    torch.testing.assert_close(selection.scores, logits[..., 1] - logits[..., 0])
    assert torch.equal(selection.mask, select(tokens, selection.scores, share=0.25).mask)
    assert torch.equal(selection.kept[1], tokens[1, selection.indices[1]])
    assert not selection.scores.requires_grad
    assert reducer.scores(tokens).requires_grad


def test_reducer_hands_every_option_to_the_selection() -> None:
    reducer, tokens = make_reducer(), features(4, 20)
    tiles = torch.tensor([0, 0, 1, 1])
    options = {"budget": "image", "tiles": tiles, "coverage": 0.4, "minimum": 3}
    for fill in ("grid", "farthest"):
        for amount in ({"count": 11}, {"share": 0.3}, {"threshold": 0.4}):
            selection = reducer.reduce(tokens, (4, 5), **options, fill=fill, **amount)  # type: ignore[arg-type]
            scores = reducer.scores(tokens, (4, 5))
            expected = select(tokens, scores, **options, fill=fill, **amount, grid=(4, 5))  # type: ignore[arg-type]
            assert torch.equal(selection.mask, expected.mask)


def test_scores_become_pictures_of_token_rectangles() -> None:
    scores = torch.arange(24.0)[None].repeat(2, 1)
    picture = make_reducer().scores_to_image(scores, None, 40, 60)
    assert picture.shape == (2, 40, 60)
    assert torch.equal(picture[1, ::10, ::10], torch.arange(24.0).view(4, 6))
    assert torch.equal(picture[0, 10:20, 20:30], torch.full((10, 10), 8.0))
    turned = make_reducer().scores_to_image(scores > 3, (6, 4), 6, 4)
    assert turned[0, 0].tolist() == [0, 0, 0, 0]
    assert turned[0, 1].tolist() == [1, 1, 1, 1]


def test_given_parts_are_used_and_must_fit() -> None:
    selector, standardiser = TokenSelector(SHAPE), FeatureStandardiser(16)
    reducer = TokenReducer(SHAPE, ORIGIN, standardiser, selector)
    assert reducer.selector is selector
    assert reducer.standardiser is standardiser
    other = SelectorShape(width=16, heads=4, grid=(4, 6), layers=1)
    with pytest.raises(ValueError, match=r"selector of .*heads=2"):
        TokenReducer(other, ORIGIN, selector=selector)


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_saved_reducer_scores_bit_for_bit_alike(tmp_path: Path, positions: str) -> None:
    shape = SelectorShape(16, 2, (4, 6), 2, 3.5, positions, 0.7)  # type: ignore[arg-type]
    reducer = make_reducer(shape)
    save_reducer(tmp_path / "new" / "folder", reducer)
    before = torch.get_rng_state()
    loaded = load_reducer(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
    ]
    tokens = features(3, 24)
    assert torch.equal(loaded.scores(tokens), reducer.scores(tokens))
    wide = features(2, 40)
    assert torch.equal(loaded.scores(wide, (5, 8)), reducer.scores(wide, (5, 8)))
    assert loaded.shape == shape
    assert loaded.origin == ORIGIN
    assert not loaded.training


def test_reducer_without_statistics_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has seen no tokens; train the reducer first"):
        save_reducer(tmp_path, TokenReducer(SHAPE, ORIGIN))
    reducer = make_reducer()
    with torch.no_grad():
        reducer.selector.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"selector\.head\.bias holds NaN"):
        save_reducer(tmp_path, reducer)
    assert not list(tmp_path.iterdir())


def test_origin_is_checked_before_training() -> None:
    with pytest.raises(ValueError, match="encoder: expected a printable name"):
        ReducerOrigin("")
    with pytest.raises(ValueError, match=r"floor=1\.2: must be in"):
        ReducerOrigin("x", floor=1.2)
