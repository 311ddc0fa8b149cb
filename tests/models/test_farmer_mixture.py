"""Mixtures, guidance and dequantisation against closed forms and library densities."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, distributions
from torch.testing import assert_close

from models.farmer.dequantization import (
    LevelStretch,
    bits_per_dim,
    dequantize,
    quantize,
    requantize,
)
from models.farmer.guidance import UNGUIDED, Guidance, draw
from models.farmer.mixture import Mixture, MixtureHead, mixture_from_raw

EXACT = {"atol": 1e-9, "rtol": 0.0}


def random_mixture(*leading: int, components: int = 4, channels: int = 3) -> Mixture:
    raw = torch.randn(*leading, components * (1 + 2 * channels), dtype=torch.float64)
    return mixture_from_raw(raw, components, channels)


def library_mixture(mixture: Mixture) -> distributions.MixtureSameFamily:
    return distributions.MixtureSameFamily(
        distributions.Categorical(logits=mixture.logits),
        distributions.Independent(distributions.Normal(mixture.means, mixture.scales), 1),
    )


def test_log_prob_equals_torch_distributions() -> None:
    mixture = random_mixture(2, 5)
    values = torch.randn(2, 5, 3, dtype=torch.float64)
    assert_close(mixture.log_prob(values), library_mixture(mixture).log_prob(values), **EXACT)
    shared = random_mixture(2)
    expected = library_mixture(shared).log_prob(values.transpose(0, 1)).T
    assert_close(shared.log_prob_shared(values), expected, **EXACT)


def test_shared_products_stay_accurate_far_from_the_origin() -> None:
    raw = torch.randn(1, 4 * 7)
    mixture = mixture_from_raw(raw, 4, 3)
    far = Mixture(mixture.logits, mixture.means + 50, mixture.scales * 0.1)
    values = far.means[:, 0].unsqueeze(1) + 0.05 * torch.randn(1, 8, 3)
    double = Mixture(*(part.double() for part in far))
    exact = double.log_prob(values.double().transpose(0, 1)).T
    assert_close(far.log_prob_shared(values).double(), exact, atol=1e-2, rtol=0)


@pytest.mark.parametrize("activation", ["squareplus", "softplus"])
def test_standard_normal_start(activation: str) -> None:
    head = MixtureHead(8, 4, 3, activation, standard_normal_start=True).double()  # type: ignore[arg-type]
    mixture = head(torch.randn(2, 8, dtype=torch.float64))
    assert_close(mixture.scales, torch.ones_like(mixture.scales))
    assert mixture.means.abs().max() < 0.2
    assert (mixture.means[:, 0] - mixture.means[:, 1]).abs().min() > 0
    mixture.log_prob(torch.randn(2, 3, dtype=torch.float64)).sum().backward()
    assert head.linear.bias.grad.abs().min() > 0


def test_samples_follow_the_mixture() -> None:
    mixture = random_mixture(1, components=3, channels=2)
    generator = torch.Generator().manual_seed(0)
    values = mixture.sample(40_000, generator)[0]
    library = library_mixture(mixture)
    assert_close(values.mean(0), library.mean[0], atol=0.06, rtol=0)
    assert_close(values.var(0), library.variance[0], atol=0.05, rtol=0.05)
    assert_close(mixture.mean()[0], library.mean[0], **EXACT)


def gaussian(mean: float, std: float, batch: int = 1) -> Mixture:
    shape = (batch, 1, 1)
    return Mixture(torch.zeros(batch, 1), torch.full(shape, mean), torch.full(shape, std))


def total_variation(values: Tensor, probability: Tensor, edges: Tensor) -> float:
    share = torch.histogram(values, edges).hist / len(values)
    return 0.5 * float((share - probability).abs().sum() + (1 - probability.sum()).abs())


@pytest.mark.parametrize("method", ["resampling", "naive"])
def test_guided_gaussian_reaches_its_closed_form(method: str) -> None:
    scale, mean_c, std_c, mean_u, std_u = 1.5, 0.8, 0.7, 0.0, 1.0
    ratio = (std_c / std_u) ** 2
    precision = 1 + scale - scale * ratio
    mean = ((1 + scale) * mean_c - scale * ratio * mean_u) / precision
    std = std_c / math.sqrt(precision)
    guidance = Guidance(
        scale,
        method=method,  # type: ignore[arg-type]
        conditional_candidates=100,
        unconditional_candidates=100,
    )
    count = 4000
    generator = torch.Generator().manual_seed(0)
    values = draw(
        gaussian(mean_c, std_c, count), gaussian(mean_u, std_u, count), guidance, 1, generator
    )
    assert abs(values.mean().item() - mean) < 0.04
    assert abs(values.std().item() - std) < 0.03


def test_zero_guidance_is_plain_sampling() -> None:
    """Total variation to the conditional density stays at the sampling floor."""
    conditional, unconditional = gaussian(0.5, 0.8, 20_000), gaussian(-0.5, 1.2, 20_000)
    edges = torch.linspace(-3, 4, 41)
    cdf = distributions.Normal(0.5, 0.8).cdf(edges)
    floor = 0.03
    for guidance in (UNGUIDED, Guidance(1e-9, unconditional_candidates=0)):
        generator = torch.Generator().manual_seed(0)
        values = draw(conditional, unconditional, guidance, 1, generator).flatten()
        assert total_variation(values, cdf.diff(), edges) < floor
    guided = draw(conditional, unconditional, Guidance(2.0), 1, torch.Generator().manual_seed(0))
    assert total_variation(guided.flatten(), cdf.diff(), edges) > 3 * floor


def test_more_candidates_approach_the_target() -> None:
    conditional, unconditional = gaussian(0.8, 0.7, 20_000), gaussian(0.0, 1.0, 20_000)
    edges = torch.linspace(-2, 4, 41)
    ratio = 0.7**2
    precision = 1 + 2.5 - 2.5 * ratio
    target = distributions.Normal(3.5 * 0.8 / precision, 0.7 / math.sqrt(precision))
    distances = []
    for candidates in (1, 5, 50):
        guidance = Guidance(
            2.5, conditional_candidates=candidates, unconditional_candidates=candidates - 1
        )
        generator = torch.Generator().manual_seed(1)
        values = draw(conditional, unconditional, guidance, 1, generator).flatten()
        distances.append(total_variation(values, target.cdf(edges).diff(), edges))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.04


def test_redundant_pool_is_shared_and_large_enough() -> None:
    guidance = Guidance(1.0, conditional_candidates=1, unconditional_candidates=1)
    mixture, other = gaussian(0.5, 0.8), gaussian(0.0, 1.0)
    values = draw(mixture, other, guidance, 64, torch.Generator().manual_seed(0))
    assert values.shape == (1, 64, 1)
    assert values.unique().numel() > 32


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1.0},
        {"conditional_candidates": 0},
        {"unconditional_candidates": -1},
        {"redundant_pool": 0},
        {"ratio_scale_temperature": 0.0},
    ],
)
def test_guidance_refuses_impossible_values(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"guidance"):
        replace(UNGUIDED, **wrong)


@pytest.mark.parametrize("levels", [17, 256])
def test_levels_survive_dequantisation(levels: int) -> None:
    images = torch.arange(levels).float() * 2 / (levels - 1) - 1
    assert torch.equal(quantize(images, levels), torch.arange(levels).float())
    for uniform in (torch.zeros(levels), torch.full((levels,), 0.999)):
        values = dequantize(images, levels, uniform)
        assert values.min() >= -1
        assert values.max() <= 1
        assert_close(requantize(values, levels), images)


def test_uniform_bytes_cost_eight_bits() -> None:
    dims = 28 * 28
    oracle = torch.tensor([-dims * math.log(2.0)], dtype=torch.float64)
    assert_close(bits_per_dim(oracle, dims, 256), torch.tensor([8.0], dtype=torch.float64))
    images = torch.randint(0, 256, (4, 1, 28, 28)).double() * 2 / 255 - 1
    values = dequantize(images, 256, torch.rand_like(images))
    normal = distributions.Normal(values.mean(), values.std()).log_prob(values)
    assert bits_per_dim(normal.flatten(1).sum(1), dims, 256).min() > 8.0


def test_level_stretch_is_exact() -> None:
    stretch = LevelStretch(16, 0.7).double()
    stretch.fit(torch.tensor([500, *range(15)]))
    assert stretch.fitted
    images = torch.randint(0, 16, (3, 1, 4, 4)).double() * 2 / 15 - 1
    values = dequantize(images, 16, torch.rand_like(images)).requires_grad_()
    stretched, log_det = stretch(values)
    (slope,) = torch.autograd.grad(stretched.sum(), values)
    assert_close(log_det, slope.log().flatten(1).sum(1), **EXACT)
    assert_close(stretch.inverse(stretched), values, **EXACT)
    assert stretched.min() >= -1
    assert stretched.max() <= 1
    width = stretch.edges.diff()
    assert width[0] == width.max()
    assert_close(width.sum(), torch.tensor(2.0, dtype=torch.float64))


def test_level_stretch_makes_an_iid_histogram_cheap() -> None:
    """A uniform density behind the full stretch costs about the entropy of the histogram."""
    stretch = LevelStretch(16, 0.99).double()
    counts = torch.tensor([800, *[20] * 15])
    stretch.fit(counts)
    levels = torch.repeat_interleave(torch.arange(16), counts).double()
    images = (levels * 2 / 15 - 1).view(1, -1)
    _, log_det = stretch(dequantize(images, 16, torch.rand_like(images)))
    bits = bits_per_dim(log_det - images.numel() * math.log(2), images.numel(), 16)
    share = counts / counts.sum()
    entropy = -(share * share.log2()).sum().item()
    assert entropy <= bits.item() < entropy + 0.02


def test_stretch_refuses_a_full_histogram() -> None:
    with pytest.raises(ValueError, match=r"level_stretch=1"):
        LevelStretch(16, 1.0)
