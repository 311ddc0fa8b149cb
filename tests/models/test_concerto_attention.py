"""Patch attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models.concerto.clouds import batch_numbers
from models.concerto.ordering import invert_order
from models.concerto.patch_attention import PatchAttention, Patches
from models.concerto.serialization import serialize
from tests.models.concerto_cases import fill, read_case

CASES = ("patch_attention_small", "patch_attention_tail", "patch_attention_batch2")


def attention(channels: int = 32, heads: int = 2) -> PatchAttention:
    network = PatchAttention(channels, heads)
    fill(network)
    return network


def random_orders(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Offset, a random order within each cloud, and its inverse."""
    generator = torch.Generator().manual_seed(0)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    drawn = [
        start + torch.randperm(size, generator=generator)
        for start, size in zip(starts, sizes, strict=True)
    ]
    order = torch.cat(drawn)
    return torch.tensor(sizes).cumsum(0), order, invert_order(order)


def plain_attention(network: PatchAttention, x: Tensor, patches: Patches, order: Tensor) -> Tensor:
    """Softmax attention of every padded patch by itself, put back in the order of rows."""
    padded = network.qkv(x)[order][patches.pad]
    parts = []
    borders = patches.cu_seqlens.tolist()
    for start, end in pairwise(borders):
        q, k, v = padded[start:end].view(end - start, 3, network.heads, -1).permute(1, 2, 0, 3)
        parts.append(((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).permute(1, 0, 2).flatten(1))
    return network.proj(torch.cat(parts)[patches.unpad])[invert_order(order)]


@pytest.mark.parametrize("name", CASES)
def test_patches_features_and_gradients_are_those_of_the_released_code(name: str) -> None:
    description, case = read_case(name)
    config, tolerance = description["config"], description["tolerances"]["atol"]
    network = attention(config["channels"], config["num_heads"])
    curves = serialize(case["in.grid_coord"], batch_numbers(case["in.offset"]))
    assert torch.equal(curves.order, case["out.serialized_order"])
    patches = Patches(case["in.offset"], config["patch_size"])
    assert torch.equal(patches.pad, case["out.pad"])
    assert torch.equal(patches.unpad, case["out.unpad"])
    assert torch.equal(patches.cu_seqlens, case["out.cu_seqlens"])
    row = config["order_index"]
    x = case["in.feat"].clone().requires_grad_()
    out = network(x, patches, curves.order[row], curves.inverse[row])
    out.square().sum().backward()
    found = {
        "out.feat": out.detach(),
        "out.grad_feat": x.grad,
        "out.grad_qkv_weight": network.qkv.weight.grad,
    }
    for key, value in found.items():
        assert value is not None
        assert (value - case[key]).abs().max() < tolerance[key], key


@pytest.mark.parametrize("sizes", [[8], [5, 16, 3], [20, 1, 31], [16, 17, 8]])
def test_output_and_gradients_are_those_of_padded_patches(sizes: list[int]) -> None:
    offset, order, inverse = random_orders(sizes)
    network, patches = attention(), Patches(offset, 8)
    x = torch.randn(sum(sizes), 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    inputs = [x, *network.parameters()]
    out = network(x, patches, order, inverse)
    expected = plain_attention(network, x, patches, order)
    assert torch.allclose(out, expected, atol=1e-5)
    found = torch.autograd.grad(out.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for value, target in zip(found, wanted, strict=True):
        assert torch.allclose(value, target, atol=1e-4 * float(target.abs().max()))


def test_a_batch_gives_what_its_clouds_give_alone() -> None:
    sizes = [50, 7, 23]
    offset, order, inverse = random_orders(sizes)
    network = attention()
    x = torch.randn(80, 32, generator=torch.Generator().manual_seed(1))
    joined = network(x, Patches(offset, 16), order, inverse)
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        own = Patches(torch.tensor([size]), 16)
        alone = network(x[rows], own, order[rows] - start, inverse[rows] - start)
        assert torch.allclose(joined[rows], alone, atol=1e-5)
        start += size


def test_an_empty_cloud_changes_nothing() -> None:
    assert Patches(torch.tensor([0, 9, 9]), 4).windows == Patches(torch.tensor([9]), 4).windows


def test_half_precision_is_finite_for_large_inputs() -> None:
    offset, order, inverse = random_orders([40, 9])
    network = attention()
    x = 30 * torch.randn(49, 32, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, Patches(offset, 16), order, inverse)
    out.float().square().mean().backward()
    assert bool(out.isfinite().all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="channels=30: must be a multiple of heads=4"):
        PatchAttention(30, 4)
    with pytest.raises(ValueError, match="patch_size=0"):
        Patches(torch.tensor([3]), 0)
