"""Decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.concerto.block import DropPath
from models.concerto.clouds import grid_coordinates
from models.concerto.decoder import DecoderShape, PointDecoder
from models.concerto.encoder import EncodedLevel, EncoderShape, PointTransformer
from models.concerto.serialization import draw_orders
from tests.models.concerto_cases import TINY_ENCODER, fill, gradients, random_cloud

SHAPE = DecoderShape(channels=(24, 32), heads=(2, 2), depths=(1, 2), patch_size=32, drop_path=0.2)


def encoded(clouds: int = 2, requires_grad: bool = False) -> list[EncodedLevel]:
    """Levels of a small encoder in shuffled orders."""
    cloud = random_cloud(clouds, 200)
    cloud = cloud._replace(grid_coord=grid_coordinates(cloud.coord, 0.1))
    network = PointTransformer(TINY_ENCODER)
    fill(network)
    network.requires_grad_(requires_grad)
    return network.eval()(cloud, orders=draw_orders(3, torch.Generator().manual_seed(0)), depth=6)


def decoder(shape: DecoderShape = SHAPE) -> PointDecoder:
    network = PointDecoder(TINY_ENCODER, shape)
    fill(network)
    return network.eval()


def test_parameters_and_names_are_those_of_the_released_decoder() -> None:
    with torch.device("meta"):
        network = PointDecoder(EncoderShape.base(), DecoderShape())
    assert sum(p.numel() for p in network.parameters()) == 16_331_520
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["dec.dec3.up.proj.0.weight"] == (384, 512)
    assert shapes["dec.dec3.up.proj.1.weight"] == (384,)
    assert shapes["dec.dec0.up.proj_skip.0.weight"] == (64, 48)
    assert shapes["dec.dec0.up.proj_skip.1.bias"] == (64,)
    assert shapes["dec.dec1.block1.attn.qkv.weight"] == (3 * 96, 96)
    assert shapes["dec.dec2.block0.cpe.0.weight"] == (192, 3, 3, 3, 192)


def test_every_point_gets_features_and_every_parameter_a_gradient() -> None:
    network, levels = decoder(), encoded(requires_grad=True)
    out = network(levels)
    assert out.shape == (len(levels[0].feat), 24)
    out.square().sum().backward()
    found = gradients(network)
    assert set(found) == {name for name, _ in network.named_parameters()}
    assert all(float(value.abs().max()) > 0 for value in found.values())


@torch.no_grad()
def test_a_batch_gives_what_its_clouds_give_alone() -> None:
    network = decoder()
    joined = network(encoded())
    cloud = random_cloud(2, 200)
    voxels = grid_coordinates(cloud.coord, 0.1)
    encoder = PointTransformer(TINY_ENCODER)
    fill(encoder)
    orders = draw_orders(3, torch.Generator().manual_seed(0))
    first = cloud._replace(
        coord=cloud.coord[:200],
        feat=cloud.feat[:200],
        offset=torch.tensor([200]),
        grid_coord=voxels[:200],
        origin_coord=None,
    )
    alone = network(encoder.eval()(first, orders=orders, depth=6))
    assert torch.allclose(joined[:200], alone, atol=1e-4)


@torch.no_grad()
def test_all_levels_are_used() -> None:
    network, levels = decoder(), encoded()
    before = network(levels)
    for number, level in enumerate(levels):
        changed = [*levels]
        changed[number] = level._replace(feat=level.feat.flip(1))
        assert (network(changed) - before).abs().max() > 1e-2


def test_drop_path_falls_to_zero_at_the_finest_level() -> None:
    blocks = dict(decoder().named_modules())
    names = ("dec.dec1.block0", "dec.dec1.block1", "dec.dec0.block0")
    layers = [blocks[f"{name}.drop_path"] for name in names]
    rates = [layer.probability for layer in layers if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.2, 0.1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ()}, "channels="),
        ({"heads": (2,)}, "heads="),
        ({"heads": (5, 2)}, "channels=24: must be a multiple of its heads=5"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"drop_path": -0.1}, "drop_path=-0.1"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    options = {"channels": (24, 32), "heads": (2, 2), "depths": (1, 2)} | change
    with pytest.raises(ValueError, match=message):
        DecoderShape(**options)


def test_levels_must_fit() -> None:
    with pytest.raises(ValueError, match="expected 4 levels"):
        PointDecoder(EncoderShape.base(), SHAPE)
    assert DecoderShape(channels=[24, 32], heads=[2, 2], depths=[1, 2]).heads == (2, 2)  # type: ignore[arg-type]
