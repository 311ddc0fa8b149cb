"""Inception features: clear refusals, and the right bytes reach torch-fidelity."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from models.layers import inception
from models.layers.inception import InceptionFeatures


class FakeInception(nn.Module):
    """Stands for torch-fidelity's network: returns its input's first 2048 bytes."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str
    ) -> None:
        super().__init__()
        self.path = feature_extractor_weights_path

    def forward(self, images: Tensor) -> tuple[Tensor]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return (images.flatten(1)[:, :2048].float(),)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(inception, "find_spec", lambda name: object())
    path = tmp_path / "any_name.pth"
    path.write_bytes(b"weights")
    return path


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pt_inception-2015-12-05-6726825d\.pth"):
        InceptionFeatures(tmp_path / "nothing.pth")


def test_missing_package_is_named(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install torch-fidelity"):
        InceptionFeatures(weights)


def test_other_weights_never_reach_the_unpickler(weights: Path) -> None:
    with pytest.raises(ValueError, match="expected 6726825d"):
        InceptionFeatures(weights)


def test_images_arrive_as_rounded_rgb_bytes(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "check_sha256", lambda path, prefix: None)
    features = InceptionFeatures(weights)
    images = torch.tensor([-1.5, -1.0, 0.0, 1.0]).view(1, 1, 2, 2).repeat(1, 1, 14, 14)
    out = features(images)
    assert features.network.path == str(weights)
    assert out.shape == (1, 2048)
    assert out.unique().tolist() == [0.0, 128.0, 255.0]
