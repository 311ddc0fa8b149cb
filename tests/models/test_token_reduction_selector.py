"""The selector: its hard mask and the mask's gradient, its head, its positions, its start."""

import pytest
import torch
from torch import Tensor, nn

from models.token_reduction.positions import GridPositions, sincos_positions
from models.token_reduction.selector import (
    SelectorShape,
    TokenSelector,
    gumbel_noise,
    keep_scores,
    sample_mask,
    soft_mask,
)
from models.token_reduction.transformer import TokenTransformer

SMALL = SelectorShape(width=32, heads=4, grid=(4, 6), layers=2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, 2, generator=seeded(3), dtype=dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_gradient_of_the_hard_mask_is_that_of_the_relaxed_choice(temperature: float) -> None:
    logits = random_logits(2, 6, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, 6, generator=seeded(4), dtype=torch.float64)
    noise = gumbel_noise(logits.shape, seeded(9), logits.device).double()

    def relaxed(z: Tensor) -> float:
        difference = (z[..., 1] + noise[..., 1]) - (z[..., 0] + noise[..., 0])
        return float((weights / (1 + (-difference / temperature).exp())).sum())

    mask = sample_mask(logits, temperature, seeded(9))
    (mask * weights).sum().backward()
    step = 1e-6
    numeric = torch.zeros_like(logits)
    for place in range(logits.numel()):
        shift = torch.zeros(logits.numel(), dtype=torch.float64)
        shift[place] = step
        up, down = (logits.detach() + sign * shift.view_as(logits) for sign in (1, -1))
        numeric.view(-1)[place] = (relaxed(up) - relaxed(down)) / (2 * step)
    assert logits.grad is not None
    assert numeric.abs().min() > 1e-6
    torch.testing.assert_close(logits.grad, numeric, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mask_is_exactly_zero_or_one_and_neither_constant(dtype: torch.dtype) -> None:
    logits = random_logits(8, 200, dtype=dtype).requires_grad_()
    mask = sample_mask(logits, 0.66, seeded(0))
    assert mask.dtype == torch.float32
    assert mask.shape == (8, 200)
    assert ((mask == 0) | (mask == 1)).all()
    assert 0.2 < mask.mean() < 0.8
    mask.sum().backward()
    assert logits.grad is not None
    assert logits.grad[..., 1].abs().max() > 0.1
    assert (logits.grad[..., 1] >= 0).all()


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_keep_rate_is_the_softmax_of_the_logits(temperature: float) -> None:
    logits = torch.tensor([[0.3, -0.2], [-1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    draws = logits[None].expand(20000, 4, 2)
    rate = sample_mask(draws, temperature, seeded(1)).mean(0)
    torch.testing.assert_close(rate, logits.softmax(-1)[:, 1], rtol=0, atol=0.015)


def test_tokens_are_drawn_independently() -> None:
    mask = sample_mask(torch.zeros(20000, 3, 2), 1.0, seeded(2))
    assert mask.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03
    assert {int(n) for n in mask.sum(1).unique()} == {0, 1, 2, 3}


def test_noise_comes_from_the_generator_alone() -> None:
    logits = random_logits(2, 50)
    before = torch.get_rng_state()
    first = sample_mask(logits, 1.0, seeded(5))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        second = sample_mask(logits, 1.0, seeded(5))
    assert torch.equal(first, second)
    generator = seeded(5)
    drawn = [sample_mask(logits, 1.0, generator) for _ in range(2)]
    assert torch.equal(drawn[0], first)
    assert not torch.equal(drawn[1], first)


def test_noise_is_gumbel_and_finite_even_where_the_draw_is_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = gumbel_noise((200000,), seeded(0), torch.device("cpu"))
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.std()) - 1.2825) < 0.01
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator: self.zero_())
    assert gumbel_noise((10,), seeded(0), torch.device("cpu")).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_and_low_temperature_give_no_nan(dtype: torch.dtype) -> None:
    logits = (random_logits(4, 100) * 2e4).clamp(-6e4, 6e4).to(dtype).requires_grad_()
    mask = sample_mask(logits, 0.1, seeded(0))
    mask.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    sure = keep_scores(logits.float()).abs() > 100
    assert torch.equal(mask[sure] > 0, keep_scores(logits.float())[sure] > 0)


def test_relaxed_choice_of_a_token_does_not_look_at_others() -> None:
    logits, noise = random_logits(1, 5), random_logits(1, 5)
    other = logits.clone()
    other[0, 1:] += 3
    first, second = soft_mask(logits, noise, 1.0), soft_mask(other, noise, 1.0)
    assert torch.equal(first[0, 0], second[0, 0])


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [
        ((2, 5, 1), 1.0, r"logits \(2, 5, 1\): expected \(B, L, 2\)"),
        ((2, 5), 1.0, r"logits \(2, 5\): expected"),
        ((2, 5, 2), 0.01, "temperature=0.01: must be >= 0.1"),
        ((2, 5, 2), float("nan"), "temperature=nan"),
    ],
)
def test_one_logit_a_token_and_low_temperatures_are_refused(
    shape: tuple[int, ...], temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_mask(torch.zeros(shape), temperature, seeded(0))


@pytest.mark.parametrize("keep", [0.5, 0.6, 0.9])
def test_selector_starts_near_its_keep_probability(keep: float) -> None:
    torch.manual_seed(0)
    shape = SelectorShape(width=64, heads=4, grid=(12, 12), keep_bias=keep)
    logits = TokenSelector(shape)(torch.randn(4, 144, 64))
    assert logits.shape == (4, 144, 2)
    probability = logits.detach().softmax(-1)[..., 1]
    assert abs(float(probability.mean()) - keep) < 0.06
    assert 0.01 < float(keep_scores(logits.detach()).std()) < 0.3


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_head_is_in_float32_under_autocast(weights: torch.dtype) -> None:
    torch.manual_seed(0)
    selector = TokenSelector(SMALL).to(weights)
    nn.init.normal_(selector.head.weight)
    seen: list[Tensor] = []
    selector.transformer.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = selector(torch.randn(2, 24, 32))
    assert logits.dtype == torch.float32
    head = selector.head
    exact = seen[0].double() @ head.weight.double().T + head.bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selector_in_half_precision_gives_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    selector = TokenSelector(SMALL)
    tokens = 50 * torch.randn(2, 24, 32)  # outliers of standardised tokens
    full = selector(tokens)
    half = selector.to(dtype)(tokens.to(dtype))
    assert half.isfinite().all()
    torch.testing.assert_close(half, full, rtol=0, atol=0.05)
    half.sum().backward()
    assert all(p.grad.isfinite().all() for p in selector.parameters() if p.grad is not None)


def test_training_is_as_deterministic_as_evaluation() -> None:
    torch.manual_seed(0)
    selector = TokenSelector(SMALL)
    tokens = torch.randn(2, 24, 32)
    assert torch.equal(selector.train()(tokens), selector.eval()(tokens))
    assert len(TokenSelector(SelectorShape(8, 2, (2, 2))).transformer.blocks) == 3


def test_scores_of_an_image_do_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    selector = TokenSelector(SMALL)
    tokens = torch.randn(5, 24, 32)
    alone = torch.cat([selector(row[None]) for row in tokens])
    torch.testing.assert_close(selector(tokens), alone, rtol=0, atol=1e-5)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    selector = TokenSelector(SMALL)
    sample_mask(selector(torch.randn(2, 24, 32)), 1.0, seeded(0)).mul(
        torch.randn(2, 24, generator=seeded(1))
    ).sum().backward()
    for name, parameter in selector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_positions_of_another_grid_are_interpolated_row_by_row() -> None:
    positions = GridPositions((6, 8), 4)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    with torch.no_grad():
        positions.table.copy_(torch.stack([rows, columns, rows + columns, rows * 0 + 1], -1))
    same = positions((6, 8))
    assert torch.equal(same, positions())
    assert same.view(6, 8, 4)[2, 5].tolist() == [2, 5, 7, 1]
    finer = positions((12, 24)).view(12, 24, 4)[3:-3, 6:-6]  # away from the border
    wanted_rows = ((torch.arange(12.0) + 0.5) / 2 - 0.5)[3:-3, None].expand(-1, 12)
    wanted_columns = ((torch.arange(24.0) + 0.5) / 3 - 0.5)[None, 6:-6].expand(6, -1)
    torch.testing.assert_close(finer[..., 0], wanted_rows, atol=0.02, rtol=0)
    torch.testing.assert_close(finer[..., 1], wanted_columns, atol=0.02, rtol=0)
    torch.testing.assert_close(finer[..., 3], torch.ones(6, 12))
    coarser = positions((3, 4)).view(3, 4, 4)
    torch.testing.assert_close(coarser[1, :, 0], torch.full((4,), 2.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["learned", "sincos"])
def test_every_slot_has_a_position_of_its_own(kind: str) -> None:
    positions = GridPositions((5, 7), 16, kind)
    for grid in (None, (5, 7), (8, 3), (10, 14)):
        table = positions(grid)
        length = 35 if grid is None else grid[0] * grid[1]
        assert table.shape == (length, 16)
        apart = torch.cdist(table, table) + 10 * torch.eye(length)
        assert apart.min() > 1e-3
    assert [p.requires_grad for p in positions.parameters()] == [True] * (kind == "learned")


def test_sincos_positions_state_row_and_column() -> None:
    table = sincos_positions((4, 6), 8)
    assert torch.equal(table[1, :, :4], table[1, :1, :4].expand(6, -1))
    assert torch.equal(table[:, 2, 4:], table[:1, 2, 4:].expand(4, -1))
    torch.testing.assert_close(table[3, 2, 0], torch.tensor(3.0).sin())
    torch.testing.assert_close(table[3, 2, 6], torch.tensor(2.0).cos())


def test_wrong_sizes_are_named_in_one_line() -> None:
    with pytest.raises(ValueError, match="width=30: must be a multiple of heads=4"):
        TokenTransformer(30, 4, 1, 4.0, (2, 2))
    with pytest.raises(ValueError, match="layers=0"):
        TokenTransformer(32, 4, 0, 4.0, (2, 2))
    with pytest.raises(ValueError, match="width=30: sincos positions need a multiple of 4"):
        TokenTransformer(30, 3, 1, 4.0, (2, 2), "sincos")
    with pytest.raises(ValueError, match="positions='none'"):
        TokenTransformer(32, 4, 1, 4.0, (2, 2), "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keep_bias=1\.0: must be in"):
        SelectorShape(32, 4, (2, 2), keep_bias=1.0)
    with pytest.raises(ValueError, match=r"tokens \(2, 23, 32\): expected \(B, 24, 32\)"):
        TokenSelector(SMALL)(torch.zeros(2, 23, 32))
    with pytest.raises(ValueError, match=r"expected \(B, 9, 32\) for grid=\(3, 3\)"):
        TokenSelector(SMALL)(torch.zeros(2, 24, 32), (3, 3))
