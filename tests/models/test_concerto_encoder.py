"""Encoder, its blocks and the up-cast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.concerto.block import DropPath
from models.concerto.clouds import PointCloud, grid_coordinates
from models.concerto.encoder import EncodedLevel, EncoderShape, PointTransformer, up_cast
from models.concerto.serialization import draw_orders
from tests.models.concerto_cases import TINY_ENCODER, fill, gradients, random_cloud, read_case

CASES = (("backbone_t_patch64", 64), ("backbone_t_patch1024", 1024))


def filled(shape: EncoderShape = TINY_ENCODER) -> PointTransformer:
    network = PointTransformer(shape)
    fill(network)
    return network.eval()


def voxel_cloud(clouds: int = 1, points: int = 300, grid_size: float = 0.1) -> PointCloud:
    """Two walls with several points in some voxels."""
    cloud = random_cloud(clouds, points)
    return cloud._replace(grid_coord=grid_coordinates(cloud.coord, grid_size))


def take(cloud: PointCloud, start: int, end: int) -> PointCloud:
    """Rows of one cloud of a batch."""
    rows = [None if x is None else x[start:end] for x in cloud]
    coord, feat, _, grid_coord, origin = rows
    assert coord is not None
    assert feat is not None
    return PointCloud(coord, feat, torch.tensor([end - start]), grid_coord, origin)


def golden_levels(
    name: str, patch_size: int
) -> tuple[PointTransformer, Tensor, list[EncodedLevel], dict[str, Any], dict[str, Tensor]]:
    description, case = read_case(name)
    network = filled(replace(EncoderShape.tiny(), patch_size=patch_size))
    voxels = case.get("in.grid_coord")
    if voxels is None:
        voxels = grid_coordinates(case["in.coord"], description["config"]["grid_size"])
        assert torch.equal(voxels, case["out.grid_coord"])
    feat = case["in.feat"].clone().requires_grad_()
    cloud = PointCloud(case["in.coord"], feat, case["in.offset"], voxels)
    return network, feat, network(cloud, orders=case["in.order_perms"]), description, case


@pytest.mark.parametrize(("name", "patch_size"), CASES)
def test_features_are_those_of_the_released_code(name: str, patch_size: int) -> None:
    network, _, levels, description, case = golden_levels(name, patch_size)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == description["state_dict"]
    for number, level in enumerate(levels):
        assert torch.equal(level.order, case[f"out.stage{number}.serialized_order"])
        if number:
            assert torch.equal(level.inverse, case[f"out.stage{number}.inverse"])
            assert torch.equal(level.grid_coord, case[f"out.stage{number}.grid_coord"])
    step = 1 if patch_size == 64 else 2
    found = {
        "out.stage0.feat": levels[0].feat,
        "out.stage4.feat": levels[4].feat,
        "out.stage4.coord": levels[4].coord,
        "out.upcast2.feat": up_cast(levels, 2),
        "out.upcast3.feat": up_cast(levels, 3)[::step],
    }
    assert torch.equal(levels[2].offset, case["out.upcast2.offset"])
    for key, value in found.items():
        error = (value.detach() - case[key]).abs().max()
        assert error < description["tolerances"]["atol"][key], key


def test_gradients_are_those_of_the_released_code() -> None:
    network, feat, levels, description, case = golden_levels(*CASES[0])
    (0.5 * up_cast(levels, 3).square().mean()).backward()
    found = {f"out.grad.{key}": value for key, value in gradients(network).items()}
    assert feat.grad is not None
    found["out.grad_feat"] = feat.grad
    stored = [key for key in case if key.startswith("out.grad") and key != "out.grad_norms"]
    assert len(stored) > 5
    for key in stored:
        limit = 1e-4 * float(case[key].abs().max())
        assert (found[key] - case[key]).abs().max() < limit, key
    zero = torch.zeros(1)
    norms = [
        float(found.get(f"out.grad.{key}", zero).norm()) for key in description["grad_norm_keys"]
    ]
    assert norms == pytest.approx(case["out.grad_norms"].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (EncoderShape.tiny(), 4_860_512),
        (EncoderShape.small(), 38_648_992),
        (EncoderShape.base(), 108_461_376),
        (EncoderShape.large(), 207_667_456),
    ],
)
def test_parameters_are_those_of_the_released_sizes(shape: EncoderShape, count: int) -> None:
    with torch.device("meta"):
        network = PointTransformer(shape)
    assert sum(p.numel() for p in network.parameters()) == count


def test_base_features_are_as_wide_as_in_the_paper() -> None:
    base = EncoderShape.base()
    assert [base.up_cast_channels(count) for count in (0, 2, 3, 4)] == [512, 1088, 1184, 1232]


@torch.no_grad()
def test_features_do_not_depend_on_threads_or_repetition() -> None:
    network, cloud = filled(), voxel_cloud(2)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(up_cast(network(cloud), 2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_a_batch_gives_what_its_clouds_give_alone() -> None:
    network = filled()
    cloud = voxel_cloud(2)
    assert cloud.grid_coord is not None
    # The second cloud reaches one bit farther than the first.
    cloud.grid_coord[300:] += 20
    orders = draw_orders(3, torch.Generator().manual_seed(0))
    levels = network(cloud, orders=orders, depth=7)
    start, starts = 0, [0, 0, 0]
    for end in cloud.offset.tolist():
        alone = network(take(cloud, start, end), orders=orders, depth=7)
        for number, (joined, own) in enumerate(zip(levels, alone, strict=True)):
            rows = slice(starts[number], starts[number] + len(own.feat))
            assert torch.equal(joined.grid_coord[rows], own.grid_coord)
            assert torch.equal(joined.order[:, rows] - rows.start, own.order)
            assert torch.allclose(joined.feat[rows], own.feat, atol=1e-5)
            assert torch.allclose(joined.coord[rows], own.coord, atol=1e-6)
            starts[number] = rows.stop
        start = end


@torch.no_grad()
def test_by_default_the_widest_cloud_decides_the_curves_as_in_the_released_code() -> None:
    network = filled()
    cloud = voxel_cloud(2)
    assert cloud.grid_coord is not None
    cloud.grid_coord[300:] += 20
    alone = network(take(cloud, 0, 300))[0].order
    joined = network(cloud)[0].order[:, :300]
    assert torch.equal(joined[:2], alone[:2])
    assert not torch.equal(joined[2:], alone[2:])


@torch.no_grad()
def test_orders_change_features_and_default_to_the_identity() -> None:
    network, cloud = filled(), voxel_cloud()
    plain = network(cloud)[-1].feat
    identity = torch.arange(4).expand(3, -1)
    assert torch.equal(plain, network(cloud, orders=identity)[-1].feat)
    assert (plain - network(cloud, orders=identity.flip(1))[-1].feat).abs().max() > 1e-3


@torch.no_grad()
def test_masked_points_hide_their_features() -> None:
    network, cloud = filled(), voxel_cloud()
    mask = torch.arange(len(cloud.feat)) % 3 == 0
    changed = cloud._replace(feat=torch.where(mask[:, None], cloud.feat + 1, cloud.feat))
    masked = network(cloud, mask)[-1].feat
    assert torch.equal(masked, network(changed, mask)[-1].feat)
    assert (masked - network(cloud)[-1].feat).abs().max() > 1e-3
    everywhere = network.embedding(cloud.feat, torch.ones_like(mask))
    assert torch.equal(everywhere, network.embedding.mask_token.expand_as(everywhere))


@torch.no_grad()
def test_colour_is_centred_and_scaled_ahead_of_the_stem() -> None:
    plain = filled()
    scaled = filled(replace(TINY_ENCODER, colour_centre=0.5, colour_scale=4.0))
    cloud = voxel_cloud()
    feat = cloud.feat.clone()
    feat[:, 3:6] = (feat[:, 3:6] - 0.5) * 4
    before = cloud.feat.clone()
    expected = plain(cloud._replace(feat=feat))[-1].feat
    assert torch.equal(scaled(cloud)[-1].feat, expected)
    assert torch.equal(cloud.feat, before)


def test_every_parameter_gets_a_gradient() -> None:
    network, cloud = filled().train(), voxel_cloud(2)
    mask = torch.arange(len(cloud.feat)) % 3 == 0
    network(cloud, mask)[-1].feat.square().sum().backward()
    found = gradients(network)
    assert set(found) == {name for name, _ in network.named_parameters()}
    assert all(float(value.abs().max()) > 0 for value in found.values())


def test_half_precision_is_finite_and_near() -> None:
    network, cloud = filled(), voxel_cloud(2)
    with torch.autocast("cpu", torch.bfloat16):
        half = up_cast(network(cloud), 2)
    half.float().square().mean().backward()
    assert all(bool(value.isfinite().all()) for value in gradients(network).values())
    with torch.no_grad():
        full = up_cast(network(cloud), 2)
    half = half.detach()
    assert float((half - full).norm() / full.norm()) < 0.05


@torch.no_grad()
def test_up_cast_repeats_coarser_rows_and_leaves_the_levels_alone() -> None:
    levels = filled()(voxel_cloud())
    before = [level.feat.clone() for level in levels]
    found = up_cast(levels, 2)
    assert found.shape == (300, 80)
    assert levels[1].inverse is not None
    assert levels[2].inverse is not None
    rows = levels[2].inverse[levels[1].inverse]
    assert torch.equal(found[:, :16], levels[0].feat)
    assert torch.equal(found[:, 48:], levels[2].feat[rows])
    assert torch.equal(up_cast(levels, 0), levels[2].feat)
    assert all(torch.equal(a.feat, b) for a, b in zip(levels, before, strict=True))
    with pytest.raises(ValueError, match="count=3"):
        up_cast(levels, 3)


def test_drop_path_drops_points_and_keeps_the_mean() -> None:
    layer = DropPath(0.25)
    x = torch.ones(20_000, 4)
    torch.manual_seed(0)
    out = layer(x)
    assert bool((out == out[:, :1]).all())
    assert sorted(out.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert float(out.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_drop_path_grows_linearly_over_all_blocks() -> None:
    network = PointTransformer(replace(TINY_ENCODER, drop_path=0.3))
    rates = [layer.probability for layer in network.modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    torch.manual_seed(0)
    cloud = voxel_cloud()
    first, second = (network.train()(cloud)[-1].feat for _ in range(2))
    assert not torch.equal(first, second)


def test_lists_from_a_configuration_become_tuples() -> None:
    shape = EncoderShape(channels=[16, 32], heads=[1, 2], depths=[1, 1])  # type: ignore[arg-type]
    assert shape == EncoderShape(channels=(16, 32), heads=(1, 2), depths=(1, 1))
    assert hash(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ()}, "channels="),
        ({"depths": (1, 1)}, r"depths=\(1, 1\)"),
        ({"depths": (1, 0, 1)}, "depths="),
        ({"heads": (3, 2, 2)}, "channels=16: must be a multiple of its heads=3"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"colour_scale": 0.0}, "colour_scale=0.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY_ENCODER, **change)


def test_clouds_that_do_not_agree_are_refused() -> None:
    network, cloud = filled(), voxel_cloud()
    assert cloud.grid_coord is not None
    with pytest.raises(ValueError, match="grid_coord=None"):
        network(cloud._replace(grid_coord=None))
    with pytest.raises(ValueError, match="300 features, 299 voxels"):
        network(cloud._replace(grid_coord=cloud.grid_coord[1:]))
    with pytest.raises(ValueError, match="last offset 299"):
        network(cloud._replace(offset=torch.tensor([299])))
    with pytest.raises(ValueError, match="mask of shape"):
        network(cloud, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="orders of shape"):
        network(cloud, orders=torch.arange(4)[None])
