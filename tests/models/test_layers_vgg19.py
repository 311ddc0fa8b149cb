"""VGG19 features: both weight files give the published network, in units of pixels 0 to 255."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from scipy.io import savemat
from torch import Tensor, nn
from torch.testing import assert_close

from models.layers import vgg19
from models.layers.vgg19 import Vgg19Features, read_vgg19

LAYERS = 37


def random_state(scale: float = 1.0) -> dict[str, Tensor]:
    """Weights of the right shapes by torchvision's keys."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (inputs, outputs) in vgg19._CONVOLUTIONS.items():
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
        state[f"features.{index}.weight"] = weight * scale * (2 / (9 * inputs)) ** 0.5
        state[f"features.{index}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    return state


def write_matconvnet(path: Path, state: dict[str, Tensor], modern: bool = True) -> None:
    """Writes weights as MatConvNet does: a 1 x n cell of structs with filters (h, w, in, out)."""
    layers = np.empty((1, LAYERS), dtype=object)
    for index in range(LAYERS):
        layer: dict[str, object] = {"type": "other", "name": f"layer{index}"}
        if f"features.{index}.weight" in state:
            filters = state[f"features.{index}.weight"].permute(2, 3, 1, 0).numpy()
            bias = state[f"features.{index}.bias"].numpy()[:, None]
            cell = np.empty((1, 2), dtype=object)
            cell[0, 0], cell[0, 1] = filters, bias
            layer |= {"weights": cell} if modern else {"filters": filters, "biases": bias}
        layers[0, index] = layer
    savemat(path, {"layers": layers})


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def torch_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg19-dcbb9e9d.pth"
    extra = {"features.32.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}
    torch.save(state | extra, path)
    return path


def published_network(state: dict[str, Tensor]) -> nn.Sequential:
    """torchvision's own layers with average pooling."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["E"])
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.MaxPool2d):
            layers[index] = nn.AvgPool2d(2)
    layers.load_state_dict({k.removeprefix("features."): v for k, v in state.items()}, strict=False)
    return layers.eval()


@torch.no_grad()
def published_features(state: dict[str, Tensor], images: Tensor) -> list[Tensor]:
    network = published_network(state)
    return [network[:end](images) for end in (4, 9, 14, 23, 32)]


@pytest.mark.parametrize("modern", [True, False])
def test_matconvnet_weights_are_used_as_they_are(
    modern: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    write_matconvnet(tmp_path / "vgg.mat", state, modern)
    read = read_vgg19(tmp_path / "vgg.mat")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_layers_are_torchvisions_with_average_pooling(
    state: dict[str, Tensor], tmp_path: Path
) -> None:
    write_matconvnet(tmp_path / "vgg.mat", state)
    images = torch.randn(2, 3, 32, 48)
    features = Vgg19Features(tmp_path / "vgg.mat")(images)
    assert [f.shape[1:] for f in features] == [
        (64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3)
    ]  # fmt: skip
    for feature, published in zip(features, published_features(state, images), strict=True):
        assert_close(feature, published)


def test_torchvision_weights_see_their_own_pixels(
    state: dict[str, Tensor], torch_file: Path
) -> None:
    """Features of pixels 0..255 are the published ones times the mean deviation of a pixel."""
    centred = torch.rand(1, 3, 32, 32) - 0.45
    published = published_features(
        state, centred / torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    )
    features = Vgg19Features(torch_file)(255 * centred)
    for feature, expected in zip(features, published, strict=True):
        assert_close(feature, expected * 255 * 0.226, rtol=1e-3, atol=1e-2)


def test_network_is_frozen_in_evaluation_mode(torch_file: Path) -> None:
    network = Vgg19Features(torch_file).train()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_construction_draws_no_random_numbers(torch_file: Path) -> None:
    before = torch.get_rng_state()
    Vgg19Features(torch_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_file_says_which_to_get(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vgg.mat: no such file; get imagenet-.*put it"):
        Vgg19Features(tmp_path / "vgg.mat")


@pytest.mark.parametrize("suffix", [".mat", ".pth"])
def test_damaged_file_is_named_in_one_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"vgg{suffix}"
    path.write_bytes(b"these are not weights" * 20)
    with pytest.raises(ValueError, match=f"vgg{suffix}: not readable as VGG19") as caught:
        read_vgg19(path)
    assert "\n" not in str(caught.value)


def test_wrong_sizes_are_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state | {"features.28.bias": torch.zeros(3)}, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"28.bias has shape \(3,\), VGG19 needs \(512,\)"):
        read_vgg19(tmp_path / "vgg.pth")


def test_another_network_is_refused(tmp_path: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match=r"resnet.pth: not readable as VGG19"):
        read_vgg19(tmp_path / "resnet.pth")


def test_small_or_grey_pictures_are_refused(torch_file: Path) -> None:
    network = Vgg19Features(torch_file)
    for shape in ((1, 1, 32, 32), (1, 3, 15, 32)):
        with pytest.raises(ValueError, match="at least 16 x 16"):
            network(torch.zeros(shape))
