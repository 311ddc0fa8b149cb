"""Encoders from files: the weights land where they belong, and nothing is ever downloaded."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from models.image_encoders.encoders import (
    FrozenEncoder,
    OpenClipEncoder,
    OpenClipTower,
    TimmEncoder,
    TimmTower,
    TransformersEncoder,
    TransformersTower,
)
from tests.models.vision_towers import (
    IMAGE,
    MEAN,
    SIZES,
    STD,
    build_encoder,
    build_network,
    random_images,
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("an encoder tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_timm_from_a_file(tmp_path: Path) -> None:
    name = "test_vit.r160_in1k"  # timm's own toy, 96 wide, for 160 pixels
    torch.manual_seed(1)
    network = timm.create_model(name, pretrained=False)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "model.pth")
    wrapped = FrozenEncoder(TimmTower(network), layer=-2)
    for file in ("model.safetensors", "model.pth"):
        encoder = TimmEncoder(name, tmp_path / file, layer=-2)
        assert torch.allclose(
            encoder(random_images(160, 160)).tokens,
            wrapped(random_images(160, 160)).tokens,
            atol=1e-6,
        )
        assert (encoder.mean, encoder.std) == (wrapped.mean, wrapped.std)
        assert encoder(random_images(48, 80)).grid == (3, 5)


def test_transformers_from_a_folder(tmp_path: Path) -> None:
    network: Any = build_network("clip")
    network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mean=None"):
        TransformersEncoder(tmp_path)
    stated = {"image_mean": list(MEAN), "image_std": list(STD)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    encoder = TransformersEncoder(tmp_path, layer=-2)
    assert (encoder.mean, encoder.std) == (MEAN, STD)
    assert encoder.identity == build_encoder("clip").identity
    assert torch.equal(
        encoder(random_images()).tokens, build_encoder("clip")(random_images()).tokens
    )


def test_the_vision_model_of_a_whole_clip(tmp_path: Path) -> None:
    text = transformers.CLIPTextConfig(
        intermediate_size=8, vocab_size=50, bos_token_id=0, eos_token_id=1, **SIZES
    )
    vision = transformers.CLIPVisionConfig(intermediate_size=40, **SIZES, **IMAGE)
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision)
    ).eval()
    clip.save_pretrained(tmp_path)
    encoder = TransformersEncoder(tmp_path, -2, MEAN, STD)
    inside = FrozenEncoder(TransformersTower(clip.vision_model), -2, MEAN, STD)
    assert torch.equal(encoder(random_images()).tokens, inside(random_images()).tokens)
    assert encoder.identity == inside.identity


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    network: Any = build_network("dinov2")
    network.save_pretrained(tmp_path)
    state = network.state_dict()
    lost = next(key for key in state if key.endswith("fc1.weight"))
    del state[lost]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for .*fc1\.weight"):
        TransformersEncoder(tmp_path, -1, MEAN, STD)


@pytest.fixture
def tiny_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A small model among open_clip's configurations."""
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 32, "layers": 3, "width": 24, "head_width": 12, "patch_size": 8
        },
        "text_cfg": {
            "context_length": 4, "vocab_size": 20, "width": 8, "heads": 1, "layers": 1
        },
    }  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    return "tiny-clip"


def test_open_clip_from_a_file(tiny_clip: str, tmp_path: Path) -> None:
    model: Any = open_clip.create_model(tiny_clip)
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match="mean=None"):  # nothing is published for this name
        OpenClipEncoder(tiny_clip, tmp_path / "clip.safetensors")
    encoder = OpenClipEncoder(tiny_clip, tmp_path / "clip.safetensors", -2, MEAN, STD)
    wrapped = FrozenEncoder(OpenClipTower(model.visual), -2, MEAN, STD)
    assert torch.equal(encoder(random_images()).tokens, wrapped(random_images()).tokens)
    assert encoder.identity == wrapped.identity
    wide = OpenClipEncoder(
        tiny_clip, tmp_path / "clip.safetensors", -2, MEAN, STD, image_size=(24, 48)
    )
    assert wide(random_images(24, 48), attention=True).grid == (3, 6)


def test_open_clip_with_a_tower_of_timm() -> None:
    from open_clip.timm_model import TimmModel

    tower: Any = TimmModel("test_vit", 16, 160, pool="", proj="linear")
    encoder = FrozenEncoder(OpenClipTower(tower), -2, MEAN, STD)
    inner = FrozenEncoder(TimmTower(tower.trunk), -2, MEAN, STD)
    encoded = encoder(random_images(160, 160), attention=True)
    expected = inner(random_images(160, 160), attention=True)
    assert torch.equal(encoded.tokens, expected.tokens)
    assert torch.equal(encoded.prefix, expected.prefix)
    assert encoded.grid == expected.grid == (10, 10)


def test_published_normalisation_of_open_clip_models() -> None:
    from models.image_encoders.encoder_files import _shared_normalisation

    assert _shared_normalisation("ViT-L-14-336-quickgelu") == (
        open_clip.OPENAI_DATASET_MEAN,
        open_clip.OPENAI_DATASET_STD,
    )
    assert _shared_normalisation("ViT-SO400M-14-SigLIP-384") == ((0.5,) * 3, (0.5,) * 3)


def _one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def test_missing_files_say_what_to_get(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    with pytest.raises(FileNotFoundError, match=r"huggingface\.co/timm/test_vit") as timm_error:
        TimmEncoder("test_vit", missing)
    with pytest.raises(FileNotFoundError, match=r"open_clip_model\.safetensors") as clip_error:
        OpenClipEncoder("ViT-B-32", missing)
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it; download") as folder_error:
        TransformersEncoder(tmp_path / "openai" / "clip")
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(FileNotFoundError, match="no weights in it; download") as weights_error:
        TransformersEncoder(tmp_path)
    for error in (timm_error, clip_error, folder_error, weights_error):
        assert str(tmp_path) in _one_line(error.value)


class _Harmful:
    """Something that a file of weights must not hold."""


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    torch.save({"w": _Harmful()}, tmp_path / "objects.pth")
    torch.save({"w": "text"}, tmp_path / "text.pth")
    torch.save({"w": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 cut off")
    expected = {
        "objects.pth": "more than tensors",
        "text.pth": "named tensors and nothing else",
        "other.pth": "do not fit test_vit",
        "damaged.safetensors": "is damaged",
        "damaged.pth": "is damaged",
    }
    for file, message in expected.items():
        with pytest.raises(ValueError, match=message) as error:
            TimmEncoder("test_vit", tmp_path / file)
        assert file in _one_line(error.value)


@pytest.mark.parametrize("name", ["hf-hub:timm/vit_tiny", "no_such_model"])
def test_names_that_would_be_looked_up_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timm has no such model"):
        TimmEncoder(name, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="open_clip has no such model"):
        OpenClipEncoder(name, tmp_path / "weights.pth")


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model_type 'llama', expected one of clip"):
        TransformersEncoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: is no JSON"):
        TransformersEncoder(tmp_path)
