"""Analytic properties of the flow, the prior and their joint density (float64 oracles)."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from models.farmer.affine_block import FlowShape, InverseOptions
from models.farmer.farmer import Farmer
from models.farmer.flow import AutoregressiveFlow
from models.farmer.patches import patchify, unpatchify
from tests.models.farmer_networks import (
    SMALL_FLOW,
    SMALL_PRIOR,
    joint_log_prob,
    small_farmer,
    small_flow,
    small_prior,
)

EXACT = {"atol": 1e-9, "rtol": 0.0}


def test_patchify_follows_unfold_and_inverts() -> None:
    images = torch.randn(2, 3, 8, 8)
    tokens = patchify(images, 4)
    unfolded = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    assert torch.equal(tokens, unfolded)
    assert torch.equal(unpatchify(tokens, 4, 8), images)


@pytest.mark.parametrize(
    "shape",
    [
        SMALL_FLOW,
        replace(SMALL_FLOW, output_norm=True, position_affine=True),
        replace(SMALL_FLOW, soft_clip=0.5, first_reverse=True),
    ],
)
def test_log_det_equals_jacobian(shape: FlowShape) -> None:
    flow = small_flow(6, 4, shape)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    out = flow(x)
    jacobian = torch.autograd.functional.jacobian(lambda t: flow(t).tokens, x)
    log_det = torch.linalg.slogdet(jacobian.view(24, 24))[1]
    assert out.log_det.abs().item() > 1e-2
    assert_close(out.log_det[0], log_det, **EXACT)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_round_trip(dtype: torch.dtype, bound: float, chunk: int) -> None:
    shape = replace(SMALL_FLOW, position_affine=True)
    flow = small_flow(6, 4, shape).to(dtype)
    x = torch.randn(5, 6, 4, dtype=dtype)
    z = flow(x).tokens
    kept = z.clone()
    back, evaluations = flow.inverse(z, options=InverseOptions(chunk, tolerance=0.0))
    assert (back - x).abs().max() < bound
    assert torch.equal(z, kept)
    assert evaluations <= 4 * 5
    assert (z - x).abs().max() > 0.1


def test_jacobi_stops_early_within_tolerance() -> None:
    flow = small_flow(16, 4)
    z = flow(torch.randn(2, 16, 4, dtype=torch.float64)).tokens
    exact, sequential = flow.inverse(z)
    close, evaluations = flow.inverse(z, options=InverseOptions(15, tolerance=1e-6))
    assert evaluations < sequential
    assert (close - exact).abs().max() < 1e-4


def test_blocks_are_strictly_causal_in_their_own_order() -> None:
    flow = small_flow(5, 2)
    for block in flow.blocks:
        x = torch.randn(1, 5, 2, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda t, b=block: b(t).tokens, x)
        influence = jacobian[0, :, :, 0].abs().amax((1, 3))  # (token out, token in)
        influence = influence.flip(0, 1) if block.reverse else influence
        assert influence.triu(1).max() == 0
        assert influence.tril(-1).max() > 0
        assert torch.equal(x.flip(1)[:, 0] if block.reverse else x[:, 0], first_token(block, x))


def first_token(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """First output token in the block's own order; it must be the input token."""
    z = block(x).tokens
    return z[:, -1] if block.reverse else z[:, 0]


def test_directions_alternate_through_the_prior() -> None:
    for blocks in (3, 4):
        for first_reverse in (False, True):
            shape = replace(SMALL_FLOW, blocks=blocks, first_reverse=first_reverse)
            network = small_farmer(shape)
            directions = [b.reverse for b in network.flow.blocks] + [network.prior.reverse]
            assert all(a != b for a, b in pairwise(directions))
    along = small_farmer(prior=replace(SMALL_PRIOR, final_permute=False))
    assert along.prior.reverse == along.flow.blocks[-1].reverse


def test_flow_starts_as_identity() -> None:
    shape = replace(SMALL_FLOW, output_norm=True, position_affine=True)
    flow = AutoregressiveFlow(shape, 6, 4)
    x = torch.randn(2, 6, 4)
    out = flow(x)
    assert torch.equal(out.tokens, x)
    assert torch.equal(out.log_det, torch.zeros(2))


@pytest.mark.parametrize(("tokens", "informative", "redundant"), [(2, 1, 0), (1, 1, 1)])
def test_density_integrates_to_one(tokens: int, informative: int, redundant: int) -> None:
    thin = {"layers": 1, "width": 16}  # the grid has 130,321 points
    shape = replace(SMALL_PRIOR, scale_activation="softplus", redundant_floor=0.1, **thin)
    flow = small_flow(tokens, informative + redundant, replace(SMALL_FLOW, **thin))
    prior = small_prior(tokens, informative, redundant, shape)
    axis = torch.linspace(-12, 12, 361, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, tokens, informative + redundant)
    labels = torch.full((len(grid),), 2)
    with torch.no_grad():
        mass = joint_log_prob(flow, prior, grid, labels).exp().sum() * (24 / 360) ** 2
    assert abs(mass.item() - 1) < 1e-3


def test_split_obeys_the_chain_rule() -> None:
    """Integrating the joint over the redundant channel leaves the informative factor."""
    prior = small_prior(1, 1, 1)
    axis = torch.linspace(-15, 15, 3001, dtype=torch.float64)
    known = torch.full_like(axis, 0.3)
    tokens = torch.stack([known, axis], -1).unsqueeze(1)
    labels = torch.zeros(len(axis), dtype=torch.int64)
    with torch.no_grad():
        parts = prior(tokens, labels)
    joint = (parts.informative + parts.redundant).exp().sum() * (30 / 3000)
    assert_close(joint, parts.informative[0, 0].exp(), atol=1e-6, rtol=0)


def test_total_is_the_sum_of_its_parts() -> None:
    network = small_farmer().double()
    out = network(torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 4, -1]))
    assert_close(out.total, out.informative + out.redundant + out.log_det, **EXACT)


def test_single_component_equals_one_more_affine_step() -> None:
    """With K = 1 the prior is an affine autoregressive step under N(0, I) (appendix A.1)."""
    prior = small_prior(6, 4, 0, replace(SMALL_PRIOR, informative_components=1))
    z = torch.randn(3, 6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 4])
    expected = []
    state = prior.start(labels)
    for token in z.unbind(1):
        mixture = prior.next_mixture(state)
        mean, std = mixture.means[:, 0], mixture.scales[:, 0]
        u = (token - mean) / std
        normal = -0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)
        expected.append(normal - std.log().sum(-1))
        state = prior.advance(state, token)
    assert_close(prior(z, labels).informative, torch.stack(expected, 1), **EXACT)


@pytest.mark.parametrize("position_embedding", ["learned", "rotary"])
@pytest.mark.parametrize("reverse", [False, True])
def test_cached_decoding_equals_the_parallel_pass(position_embedding: str, reverse: bool) -> None:
    shape = replace(SMALL_PRIOR, position_embedding=position_embedding)
    prior = small_prior(6, 2, 3, shape)
    prior.reverse = reverse
    z = torch.randn(2, 6, 5, dtype=torch.float64)
    labels = torch.tensor([3, -1])
    ordered = z.flip(1) if reverse else z
    state = prior.start(labels)
    informative = []
    for token in ordered.unbind(1):
        informative.append(prior.next_mixture(state).log_prob(token[:, :2]))
        state = prior.advance(state, token[:, :2])
    shared = prior.redundant_mixture(state)
    assert shared is not None
    cached = torch.stack(informative, 1)
    redundant = shared.log_prob_shared(ordered[:, :, 2:])
    parallel = prior(z, labels)
    assert_close(parallel.informative, cached.flip(1) if reverse else cached, **EXACT)
    assert_close(parallel.redundant, redundant.flip(1) if reverse else redundant, **EXACT)


def test_redundant_tokens_are_exchangeable() -> None:
    prior = small_prior(6, 2, 3)
    z = torch.randn(2, 6, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    permuted = torch.cat([z[..., :2], z[:, torch.randperm(6), 2:]], -1)
    before, after = prior(z, labels), prior(permuted, labels)
    assert_close(before.informative, after.informative, **EXACT)
    assert_close(before.redundant.sum(1), after.redundant.sum(1), **EXACT)


def test_redundant_channels_never_reach_the_transformer() -> None:
    prior = small_prior(6, 2, 3)
    z = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(prior(z, torch.tensor([0, 1])).informative.sum(), z)
    assert gradient[..., 2:].abs().max() == 0
    assert gradient[..., :2].abs().min() > 0
    # The redundant term of token 0 depends on the redundant channels of token 0 alone.
    (gradient,) = torch.autograd.grad(prior(z, torch.tensor([0, 1])).redundant[:, 0].sum(), z)
    assert gradient[:, 1:, 2:].abs().max() == 0
    assert gradient[:, 1:, :2].abs().max() > 0


def test_class_changes_the_likelihood_and_none_is_its_own_class() -> None:
    network = small_farmer()
    images = torch.randn(1, 1, 8, 8).expand(6, -1, -1, -1)
    totals = network(images, torch.tensor([0, 1, 2, 3, 4, -1])).total
    assert totals.unique().numel() == 6


def test_fixed_normal_and_flow_alone() -> None:
    alone = Farmer(
        8,
        1,
        5,
        patch_size=2,
        informative_channels=0,
        flow=SMALL_FLOW,
        prior=replace(SMALL_PRIOR, redundant_prior="standard_normal"),
    )
    images = torch.randn(2, 1, 8, 8)
    out = alone(images, torch.tensor([0, 1]))
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(images).flatten(1).sum(1)
    assert_close(out.total, normal, atol=1e-3, rtol=0)
    assert alone.sample_latent(torch.tensor([0, 1])).tokens.shape == (2, 16, 4)
    with pytest.raises(ValueError, match="standard_normal"):
        Farmer(8, 1, 5, 2, informative_channels=0, flow=SMALL_FLOW, prior=SMALL_PRIOR)


def test_precision_islands_under_autocast() -> None:
    network = small_farmer()
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, -1])
    exact = network(images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(images, labels)
        flow = network.flow(patchify(images, 2))
    assert all(part.dtype == torch.float32 for part in mixed)
    assert flow.tokens.dtype == torch.float32
    assert_close(mixed.total, exact.total, atol=0.05 * 64, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        back, _ = network.flow.inverse(flow.tokens)
    assert (network.to_images(back) - images).abs().max() < 0.1


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        network = Farmer(8, 1, 5, 2, 2, SMALL_FLOW, SMALL_PRIOR, activation_checkpointing=recompute)
        network.load_state_dict(small_farmer().state_dict())
        images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        network(images, torch.tensor([0, 1])).total.sum().backward()
        gradients.append(network.flow.blocks[0].proj_in.weight.grad)
    assert_close(gradients[0], gradients[1], atol=0, rtol=0)
