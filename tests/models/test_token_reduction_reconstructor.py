"""The reconstructor, and the loss it shares with the selector: what each term rewards."""

import pytest
import torch
from torch import Tensor

from models.token_reduction.losses import all_token_nmse, reduction_loss
from models.token_reduction.reconstructor import TokenReconstructor
from models.token_reduction.selector import (
    SelectorShape,
    TokenSelector,
    keep_scores,
    sample_mask,
)

SHAPE = SelectorShape(width=32, heads=4, grid=(4, 6), layers=2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_and_mask(batch: int = 2) -> tuple[Tensor, Tensor]:
    tokens = torch.randn(batch, 24, 32, generator=seeded(0))
    return tokens, (torch.rand(batch, 24, generator=seeded(1)) < 0.4).float()


def reconstructor() -> TokenReconstructor:
    torch.manual_seed(0)
    return TokenReconstructor(SHAPE)


def test_dropped_slots_get_outputs_of_their_own_only_by_positions() -> None:
    network = reconstructor()
    tokens, mask = tokens_and_mask()
    dropped = mask[0] == 0
    rebuilt = network(tokens, mask)[0, dropped]
    assert (rebuilt - rebuilt[:1])[1:].abs().amax(1).min() > 1e-4
    with torch.no_grad():
        network.transformer.positions.table.zero_()
    blind = network(tokens, mask)[0, dropped]
    torch.testing.assert_close(blind, blind[:1].expand_as(blind), rtol=0, atol=1e-6)


def test_dropped_tokens_have_no_influence_and_kept_ones_have() -> None:
    network = reconstructor()
    tokens, mask = tokens_and_mask()
    rebuilt = network(tokens, mask)
    changed = torch.where(mask[..., None] > 0, tokens, tokens + 100)
    assert torch.equal(network(changed, mask), rebuilt)
    assert torch.equal(network(tokens, mask.bool()), rebuilt)
    kept = int(mask[0].nonzero()[0])
    changed = tokens.clone()
    changed[0, kept, 0] += 1
    assert (network(changed, mask)[0] - rebuilt[0]).abs().amax(1).min() > 1e-6


def test_gradient_of_the_mask_is_what_the_token_has_beyond_the_mask_token() -> None:
    network = reconstructor()
    tokens, mask = tokens_and_mask()
    mask.requires_grad_()
    hidden = network.hide(tokens, mask)
    assert torch.equal(hidden[mask == 1], tokens[mask == 1])
    assert torch.equal(
        hidden[0, 0 if mask[0, 0] == 0 else int((mask[0] == 0).nonzero()[0])], network.mask_token
    )
    upstream = torch.randn(hidden.shape, generator=seeded(2))
    hidden.backward(upstream)
    assert mask.grad is not None
    expected = (upstream * (tokens - network.mask_token)).sum(-1)
    torch.testing.assert_close(mask.grad, expected.detach())
    assert network.mask_token.grad is not None
    torch.testing.assert_close(network.mask_token.grad, upstream[mask == 0].sum(0))


def test_first_error_is_about_that_of_predicting_the_mean() -> None:
    tokens = torch.randn(8, 24, 32, generator=seeded(0))
    for share in (0.0, 0.5, 1.0):
        mask = (torch.rand(8, 24, generator=seeded(1)) < share).float()
        loss, parts = reduction_loss(reconstructor()(tokens, mask), tokens, mask, 0.3)
        assert 0.9 < parts["reconstruction"] < 1.15
        assert loss.isfinite()


def test_dropping_everything_costs_at_most_one_on_standardised_tokens() -> None:
    tokens = torch.randn(16, 24, 32, generator=seeded(0))
    tokens = (tokens - tokens.mean((0, 1))) / tokens.std((0, 1), correction=0)
    nothing, everything = torch.zeros(16, 24), torch.ones(16, 24)
    loss, _ = reduction_loss(torch.zeros_like(tokens), tokens, nothing, 0.0)
    assert float(loss) <= 1 + 1e-5
    loss, _ = reduction_loss(tokens, tokens, everything, 0.0)
    assert float(loss) == 1


def test_price_is_flat_below_the_floor_and_has_slope_one_above() -> None:
    tokens = torch.zeros(2, 10, 4)
    for share, slope in ((0.2, 0.0), (0.6, 1.0)):
        mask = torch.zeros(2, 10)
        mask[:, : int(share * 10)] = 1
        mask.requires_grad_()
        loss, parts = reduction_loss(tokens, tokens, mask, 0.4)
        assert loss.requires_grad
        loss.backward()
        torch.testing.assert_close(mask.grad, torch.full((2, 10), slope / 20))
        assert float(parts["price"]) == pytest.approx(max(share, 0.4))
        assert float(parts["kept"]) == pytest.approx(share)
        assert not any(part.requires_grad for part in parts.values())


def test_weight_scales_the_price_only() -> None:
    tokens, mask = tokens_and_mask()
    one, parts = reduction_loss(torch.zeros_like(tokens), tokens, mask, 0.1)
    three, _ = reduction_loss(torch.zeros_like(tokens), tokens, mask, 0.1, weight=3.0)
    torch.testing.assert_close(three - one, 2 * parts["price"])
    torch.testing.assert_close(one, parts["reconstruction"] + mask.mean())


def test_floor_holds_for_the_batch_or_for_each_image() -> None:
    tokens = torch.zeros(2, 10, 4)
    mask = torch.zeros(2, 10)
    mask[0] = 1  # 1.0 and 0.0, together 0.5
    together, _ = reduction_loss(tokens, tokens, mask, 0.4)
    each, _ = reduction_loss(tokens, tokens, mask, 0.4, per_image=True)
    assert float(together) == pytest.approx(0.5)
    assert float(each) == pytest.approx(0.7)
    mask.requires_grad_()
    reduction_loss(tokens, tokens, mask, 0.4, per_image=True)[0].backward()
    assert mask.grad is not None
    torch.testing.assert_close(mask.grad[0], torch.full((10,), 0.05))
    assert not mask.grad[1].any()


def test_keeping_more_is_priced_not_rewarded() -> None:
    logits = torch.zeros(2, 24, 2, requires_grad=True)
    tokens = torch.zeros(2, 24, 8)
    loss, _ = reduction_loss(tokens, tokens, sample_mask(logits, 1.0, seeded(0)), 0.1)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[..., 1] > 0).all()
    assert (logits.grad[..., 0] < 0).all()


def test_error_counts_kept_and_dropped_tokens_alike() -> None:
    tokens = torch.zeros(1, 4, 8)
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    losses = []
    for place in range(4):
        wrong = tokens.clone()
        wrong[0, place] = 1
        losses.append(float(reduction_loss(wrong, tokens, mask, 0.5)[1]["reconstruction"]))
    assert losses == [0.25] * 4
    wide = torch.ones(1, 4, 512)
    assert float(reduction_loss(wide, 0 * wide, mask, 0.5)[1]["reconstruction"]) == 1


def test_nmse_passes_kept_tokens_and_counts_all_in_the_spread() -> None:
    tokens, mask = tokens_and_mask()
    guess = torch.randn(tokens.shape, generator=seeded(5))
    assert float(all_token_nmse(guess, tokens, torch.ones(2, 24))) == 0
    assert float(all_token_nmse(torch.zeros_like(tokens), tokens, torch.zeros(2, 24))) == 1
    rows = mask == 0
    expected = (guess - tokens)[rows].square().sum() / tokens.square().sum()
    torch.testing.assert_close(all_token_nmse(guess, tokens, mask), expected)
    mean = torch.arange(32.0)
    moved = all_token_nmse(guess + mean, tokens + mean, mask.bool(), mean)
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_numbers(dtype: torch.dtype) -> None:
    network = reconstructor().to(dtype)
    tokens, mask = tokens_and_mask()
    rebuilt = network((30 * tokens).to(dtype), mask)
    assert rebuilt.dtype == dtype
    loss, _ = reduction_loss(rebuilt, 30 * tokens, mask, 0.3)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_loss_under_autocast_is_in_float32() -> None:
    network, (tokens, mask) = reconstructor(), tokens_and_mask()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = reduction_loss(network(tokens, mask), tokens, mask, 0.3)
    exact, _ = reduction_loss(network(tokens, mask), tokens, mask, 0.3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


def test_mask_token_has_small_values() -> None:
    network = reconstructor()
    assert network.mask_token.abs().max() < 0.2


def test_other_grids_are_rebuilt_too() -> None:
    network = reconstructor()
    tokens = torch.randn(1, 30, 32)
    assert network(tokens, torch.ones(1, 30), (5, 6)).shape == (1, 30, 32)


def test_selector_learns_to_keep_what_cannot_be_rebuilt() -> None:
    # Four of twelve tokens differ from image to image; the others are the same everywhere.
    torch.manual_seed(0)
    shape = SelectorShape(width=16, heads=2, grid=(3, 4), layers=1)
    selector, network = TokenSelector(shape), TokenReconstructor(shape)
    fixed = torch.randn(12, 16, generator=seeded(1))
    surprising = torch.zeros(12, dtype=torch.bool)
    surprising[[1, 4, 6, 11]] = True
    optimiser = torch.optim.AdamW([*selector.parameters(), *network.parameters()], 5e-3)
    generator = seeded(2)
    for _ in range(200):
        noise = torch.randn(32, 12, 16, generator=generator)
        tokens = torch.where(surprising[:, None], noise, fixed)
        mask = sample_mask(selector(tokens), 1.0, generator)
        loss, _ = reduction_loss(network(tokens, mask), tokens, mask, floor=0.1, weight=0.5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    scores = keep_scores(selector(tokens)).mean(0)
    assert scores[surprising].min() > scores[~surprising].max()


def test_wrong_arguments_are_named_in_one_line() -> None:
    tokens, mask = tokens_and_mask()
    with pytest.raises(ValueError, match=r"floor=1\.5: must be in \[0, 1\]"):
        reduction_loss(tokens, tokens, mask, 1.5)
    with pytest.raises(ValueError, match=r"mask \(2, 23\): must fit tokens \(2, 24, 32\)"):
        reduction_loss(tokens, tokens, mask[:, 1:], 0.5)
    with pytest.raises(ValueError, match=r"reconstruction \(2, 23, 32\)"):
        all_token_nmse(tokens[:, 1:], tokens, mask)
