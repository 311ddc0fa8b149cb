"""The demo's encoder: the shipped weights fit, read and are what a training writes."""

from pathlib import Path

import pytest
import torch

from models.token_reduction.demo_encoder import SHIPPED, DemoEncoder, save_encoder
from models.token_reduction.reading import ReadingNetwork, ReadingShape


def test_shipped_weights_are_small_and_fit() -> None:
    encoder = DemoEncoder()
    assert SHIPPED.stat().st_size < 3_000_000
    assert (encoder.channels, encoder.grid(96, 96)) == (96, (12, 12))
    encoded = encoder(torch.zeros(1, 3, 96, 96), attention=True)
    assert encoded.tokens.shape == (1, 144, 96)
    assert encoded.cls_attention is not None


def test_encoder_of_a_trained_network_is_that_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = ReadingShape(patch_size=16, width=16, layers=2, heads=2)
    network = ReadingNetwork(shape, 96, classes=5, scenes=3).bfloat16().float()
    save_encoder(network, tmp_path / "encoder.safetensors")
    encoder = DemoEncoder(tmp_path / "encoder.safetensors", layer=-1, shape=shape)
    images = torch.rand(2, 3, 96, 96) * 2 - 1
    expected = network.encoder.norm(encoder(images).tokens)
    torch.testing.assert_close(network.encoder.forward_features(images)[:, 1:], expected)


def test_wrong_sizes_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        DemoEncoder(shape=ReadingShape(width=48))
    with pytest.raises(FileNotFoundError, match=r"demo_encoder\.yaml"):
        DemoEncoder(tmp_path / "none.safetensors")


def test_images_must_be_whole_patches() -> None:
    with pytest.raises(ValueError, match="image_size=100"):
        ReadingNetwork(ReadingShape(), 100, classes=5, scenes=3)
