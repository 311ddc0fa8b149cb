"""The point encoder on a CUDA device: parity, determinism, half precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.concerto.clouds import PointCloud, grid_coordinates
from models.concerto.encoder import EncoderShape, PointTransformer, up_cast
from models.concerto.submanifold import SubmanifoldConv3d, neighbour_pairs
from tests.models.concerto_cases import fill, gradients, read_case

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def golden_network(patch_size: int) -> PointTransformer:
    network = PointTransformer(replace(EncoderShape.tiny(), patch_size=patch_size))
    fill(network)
    return network.eval().to(DEVICE)


def golden_cloud(name: str) -> PointCloud:
    description, case = read_case(name)
    voxels = case.get("in.grid_coord")
    if voxels is None:
        voxels = grid_coordinates(case["in.coord"], description["config"]["grid_size"])
    cloud = PointCloud(case["in.coord"], case["in.feat"], case["in.offset"], voxels)
    return PointCloud(*(None if x is None else x.to(DEVICE) for x in cloud))


@pytest.mark.parametrize(
    ("name", "size"), [("backbone_t_patch64", 64), ("backbone_t_patch1024", 1024)]
)
def test_features_are_those_of_the_released_code(name: str, size: int) -> None:
    _, case = read_case(name)
    with torch.no_grad():
        levels = golden_network(size)(golden_cloud(name), orders=case["in.order_perms"])
    for number, level in enumerate(levels):
        assert torch.equal(level.order.cpu(), case[f"out.stage{number}.serialized_order"])
    assert (levels[0].feat.cpu() - case["out.stage0.feat"]).abs().max() < 1e-5
    assert (levels[4].feat.cpu() - case["out.stage4.feat"]).abs().max() < 1e-4


@pytest.mark.parametrize("half", [False, True])
def test_rows_in_shared_voxels_give_equal_bits_in_every_run(half: bool) -> None:
    network, cloud = golden_network(1024), golden_cloud("backbone_t_patch1024")
    found = []
    for _ in range(3):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            out = network(cloud)[-1].feat
        out.float().square().mean().backward()
        found.append([out.detach(), *gradients(network).values()])
        network.zero_grad()
    assert all(bool(value.isfinite().all()) for value in found[0])
    for again in found[1:]:
        assert torch.equal(again[0], found[0][0])
        # Attention kernels may add up gradients in another order, the convolution may not.
        for first, second in zip(found[0][1:], again[1:], strict=True):
            assert torch.allclose(first, second, atol=1e-2 * float(first.abs().max()))


def test_convolution_gradients_have_equal_bits_in_every_run() -> None:
    voxels = torch.randint(0, 14, (6000, 3), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pairs = neighbour_pairs(voxels, torch.zeros(6000, dtype=torch.int64, device=DEVICE))
    network = SubmanifoldConv3d(16, 16)
    fill(network)
    network.to(DEVICE)
    x = torch.randn(6000, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        out = network(leaf, pairs)
        inputs = [leaf, network.weight, network.bias]
        runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_half_precision_is_near_full_precision() -> None:
    network, cloud = golden_network(1024), golden_cloud("backbone_t_patch1024")
    with torch.no_grad():
        full = up_cast(network(cloud), 2)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            half = up_cast(network(cloud), 2)
    assert float((half.float() - full).norm() / full.norm()) < 0.05
