"""Submanifold convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.concerto.submanifold import SubmanifoldConv3d, neighbour_pairs
from tests.models.concerto_cases import fill, read_case


def random_voxels(count: int, side: int, seed: int = 0) -> Tensor:
    """(count, 3) voxels, many of them shared by rows if ``side`` is small."""
    return torch.randint(0, side, (count, 3), generator=torch.Generator().manual_seed(seed))


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolution(channels: int, out: int) -> SubmanifoldConv3d:
    network = SubmanifoldConv3d(channels, out)
    fill(network)
    return network


def plain_convolution(
    network: SubmanifoldConv3d, x: Tensor, cells: list[tuple[int, ...]]
) -> Tensor:
    """The rule written out, row by row; cells are (cloud, x, y, z)."""
    first: dict[tuple[int, ...], int] = {}
    for row, cell in enumerate(cells):
        first.setdefault(cell, row)
    weight = network.weight
    out = [network.bias + weight[:, 1, 1, 1] @ values for values in x]
    positive = [
        (i, j, k)
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
        for k in (-1, 0, 1)
        if (i, j, k) > (0, 0, 0)
    ]
    for row, (cloud, *at) in enumerate(cells):
        for i, j, k in positive:
            other = first.get((cloud, at[0] + i, at[1] + j, at[2] + k))
            if other is not None:
                out[row] = out[row] + weight[:, 1 + i, 1 + j, 1 + k] @ x[other]
                out[other] = out[other] + weight[:, 1 - i, 1 - j, 1 - k] @ x[row]
    return torch.stack(out)


@pytest.mark.parametrize("name", ["subm_conv_unique", "subm_conv_dups"])
def test_output_and_gradients_are_those_of_spconv(name: str) -> None:
    description, case = read_case(name)
    tolerance = description["tolerances"]["atol"]
    network = convolution(16, 16)
    x = case["in.feat"].clone().requires_grad_()
    cells = case["in.indices"]
    out = network(x, neighbour_pairs(cells[:, 1:], cells[:, 0]))
    (out * case["in.grad_out"]).sum().backward()
    found = {
        "out.feat": out.detach(),
        "out.grad_feat": x.grad,
        "out.grad_weight": network.weight.grad,
        "out.grad_bias": network.bias.grad,
    }
    for key, value in found.items():
        assert value is not None
        assert (value - case[key]).abs().max() < tolerance[key], key


def test_distinct_voxels_give_the_dense_convolution_across_blocks() -> None:
    voxels = random_voxels(9000, 24).unique(dim=0)
    voxels = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(1))]
    network = convolution(5, 3)
    x = random_rows(len(voxels), 5).requires_grad_()
    pairs = neighbour_pairs(voxels, torch.zeros(len(voxels), dtype=torch.int64))
    assert len({span[0] for span in pairs.spans}) == 13
    assert len(pairs.spans) == 26, "two blocks"
    out = network(x, pairs)
    dense = torch.zeros(24, 24, 24, 5)
    dense = dense.index_put(tuple(voxels.T), x).permute(3, 0, 1, 2)
    weight = network.weight.permute(0, 4, 1, 2, 3)
    expected = F.conv3d(dense[None], weight, network.bias, padding=1)[0][(slice(None), *voxels.T)].T
    assert torch.allclose(out, expected, atol=1e-5)
    factor = random_rows(*out.shape, seed=2)
    found = torch.autograd.grad((out * factor).sum(), [x, network.weight])
    wanted = torch.autograd.grad((expected * factor).sum(), [x, network.weight])
    assert torch.allclose(found[0], wanted[0], atol=1e-5)
    assert torch.allclose(found[1], wanted[1], atol=1e-3)


@pytest.mark.parametrize("side", [3, 12])
def test_shared_voxels_and_clouds_follow_the_rule(side: int) -> None:
    voxels = random_voxels(60, side)
    batch = torch.arange(60) // 35
    network = convolution(4, 6)
    x = random_rows(60, 4)
    cells = [tuple(row) for row in torch.cat([batch[:, None], voxels], 1).tolist()]
    out = network(x, neighbour_pairs(voxels, batch))
    assert torch.allclose(out, plain_convolution(network, x, cells), atol=1e-5)


@pytest.mark.parametrize("side", [2, 5])
def test_gradients_agree_with_differences(side: int) -> None:
    network = convolution(2, 3).double()
    pairs = neighbour_pairs(random_voxels(12, side), torch.zeros(12, dtype=torch.int64))
    x = random_rows(12, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *_: network(x, pairs), (x, *network.parameters()))


def test_taps_without_pairs_have_no_gradient() -> None:
    network = convolution(3, 3)
    line = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    x = random_rows(3, 3)
    network(x, neighbour_pairs(line, torch.zeros(3, dtype=torch.int64))).sum().backward()
    assert network.weight.grad is not None
    used = network.weight.grad.abs().sum((0, 4)) > 0
    assert used.nonzero().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 2]]


def test_a_single_point_sees_itself_alone() -> None:
    network = convolution(3, 2)
    pairs = neighbour_pairs(torch.tensor([[4, 0, 9]]), torch.zeros(1, dtype=torch.int64))
    x = random_rows(1, 3)
    assert torch.allclose(network(x, pairs), network.bias + x @ network.weight[:, 1, 1, 1].T)


def test_results_do_not_depend_on_threads_or_repetition() -> None:
    voxels, batch = random_voxels(6000, 14), torch.zeros(6000, dtype=torch.int64)
    network = convolution(16, 16)
    x = random_rows(6000, 16)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            leaf = x.clone().requires_grad_()
            out = network(leaf, neighbour_pairs(voxels, batch))
            (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
            found.append((out.detach(), gradient))
    finally:
        torch.set_num_threads(threads)
    for out, gradient in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_rows_may_come_in_any_order() -> None:
    voxels = random_voxels(200, 9).unique(dim=0)
    batch = torch.zeros(len(voxels), dtype=torch.int64)
    network = convolution(4, 4)
    x = random_rows(len(voxels), 4)
    order = torch.randperm(len(voxels), generator=torch.Generator().manual_seed(0))
    straight = network(x, neighbour_pairs(voxels, batch))
    shuffled = network(x[order], neighbour_pairs(voxels[order], batch))
    assert torch.allclose(shuffled, straight[order], atol=1e-5)
