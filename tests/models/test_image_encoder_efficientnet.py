"""EfficientNet-Lite0 as an encoder of patches: timm's feature maps, in place, frozen."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.image_encoders.efficientnet_lite0 import EfficientNetLite0Encoder
from models.image_encoders.frozen_encoder import FrozenEncoder
from models.layers.checkpoint import load_efficientnet_lite0

STRIDES = {8: (40, 2), 16: (112, 3), 32: (320, 4)}  # channels, place among timm's feature maps


@pytest.fixture(scope="module")
def encoders() -> dict[int, EfficientNetLite0Encoder]:
    return {stride: EfficientNetLite0Encoder(stride, image_size=64) for stride in STRIDES}


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """timm's own way to feature maps, norms not folded."""
    network = timm.create_model("tf_efficientnet_lite0", features_only=True)
    network.load_state_dict(load_efficientnet_lite0(), strict=False)
    return network.eval()


def images(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bilinear")


@pytest.mark.parametrize("stride", STRIDES)
def test_tokens_are_the_feature_map_of_timm_in_raster_order(
    stride: int, encoders: dict[int, EfficientNetLite0Encoder], reference: nn.Module
) -> None:
    channels, place = STRIDES[stride]
    with torch.no_grad():
        expected = reference(images())[place]
    encoded = encoders[stride](images())
    side = 64 // stride
    assert encoded.grid == (side, side)
    assert encoded.prefix.shape == (2, 0, channels)
    assert encoded.cls_attention is None
    assert expected.std() > 0.1
    rows = encoded.tokens.mT.reshape(2, channels, side, side)
    torch.testing.assert_close(rows, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stride", STRIDES)
def test_properties_are_those_of_a_frozen_encoder(
    stride: int, encoders: dict[int, EfficientNetLite0Encoder]
) -> None:
    encoder = encoders[stride]
    assert isinstance(encoder, FrozenEncoder)
    assert encoder.channels == STRIDES[stride][0]
    assert encoder.patch_size == (stride, stride)
    assert encoder.image_size == (64, 64)
    assert encoder.grid(480, 640) == (64 // stride, 64 // stride)
    assert encoder.layer == len(encoder._held[0].blocks)
    assert not encoder.has_class_token
    assert encoder.state_dict() == {}
    assert list(encoder.parameters()) == []


def test_images_of_any_size_are_resized(encoders: dict[int, EfficientNetLite0Encoder]) -> None:
    small = images(24, 48)
    resized = F.interpolate(small, (64, 64), mode="bilinear", antialias=True)
    encoded = encoders[16](small)
    assert encoded.grid == (4, 4)
    torch.testing.assert_close(encoded.tokens, encoders[16](resized).tokens, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="expected"):
        encoders[16](torch.zeros(1, 1, 64, 64))


def test_wide_grids_keep_their_rows() -> None:
    encoder = EfficientNetLite0Encoder(16, image_size=(32, 96))
    plain, changed = images(32, 96), images(32, 96)
    changed[:, :, 20:28, 68:76] += 0.8  # in row 1, column 4 of 2 x 6
    difference = (encoder(plain).tokens - encoder(changed).tokens).norm(dim=-1)
    assert difference.argmax(1).tolist() == [1 * 6 + 4] * 2


def test_identity_tells_what_changes_the_tokens(
    encoders: dict[int, EfficientNetLite0Encoder],
) -> None:
    identities = {encoder.identity for encoder in encoders.values()}
    other: Any = EfficientNetLite0Encoder(16, image_size=96)
    assert len(identities | {other.identity}) == len(STRIDES) + 1
    assert EfficientNetLite0Encoder(16, image_size=64).identity == encoders[16].identity
    next(other.network.parameters()).mul_(2)
    other._identity = None
    changed = other.identity
    assert changed != EfficientNetLite0Encoder(16, image_size=96).identity


def test_is_frozen_and_draws_no_random_numbers(
    encoders: dict[int, EfficientNetLite0Encoder],
) -> None:
    before = torch.get_rng_state()
    encoder = EfficientNetLite0Encoder(32, image_size=32)
    assert torch.equal(before, torch.get_rng_state())
    encoder.train()
    tokens = encoder(images(32, 32).requires_grad_()).tokens
    assert not tokens.requires_grad
    assert not any(module.training for module in encoder.network.modules())
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    with pytest.raises(ValueError, match="no class token"):
        encoders[16](images(), attention=True)


@pytest.mark.parametrize("stride", [4, 14])
def test_stride_that_does_not_exist_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride={stride}: must be one of 8, 16, 32"):
        EfficientNetLite0Encoder(stride)


@pytest.mark.parametrize("size", [0, -64, 100, (64, 100), (64,)])
def test_size_that_the_stride_does_not_divide_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="must be one or two positive multiples of 16"):
        EfficientNetLite0Encoder(16, size)
