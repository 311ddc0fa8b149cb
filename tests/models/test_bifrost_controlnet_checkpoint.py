"""Folders of the released ControlNet: round trip, parts, and files that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.bifrost.controlnet import LatentFluxControlNet
from models.bifrost.controlnet_checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    export_controlnet,
    read_controlnet,
)
from tests.models.bifrost_flux import fill, small_controlnet, small_flux


def filled_controlnet(scale: float = 2.0) -> LatentFluxControlNet:
    """ControlNet with weights of the golden rule."""
    controlnet = small_controlnet(small_flux(guidance=True), scale)
    fill(controlnet)
    return controlnet


def same_weights(first: LatentFluxControlNet, second: LatentFluxControlNet) -> bool:
    """Whether two networks have the same names and values."""
    one, two = first.state_dict(), second.state_dict()
    return list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A written ControlNet."""
    export_controlnet(filled_controlnet(), tmp_path / "flux_controlnet")
    return tmp_path / "flux_controlnet"


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    """Change entries of the configuration."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_round_trip(tmp_path: Path, scale: float) -> None:
    controlnet = filled_controlnet(scale)
    export_controlnet(controlnet, tmp_path / "made" / "flux_controlnet")
    loaded = read_controlnet(tmp_path / "made" / "flux_controlnet")
    assert same_weights(loaded, controlnet)
    assert loaded.config["scale"] == scale
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    halved = read_controlnet(tmp_path / "made" / "flux_controlnet", torch.bfloat16)
    assert halved.dtype == torch.bfloat16
    assert halved.up_sampling_block.bn1.num_batches_tracked.dtype == torch.int64
    with pytest.raises(ValueError, match="holds a ControlNet already"):
        export_controlnet(controlnet, tmp_path / "made" / "flux_controlnet")


def test_configuration_is_the_releases(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["_class_name"] == "FluxControlNetModel"
    assert "latent_channels" not in config
    assert "scale" not in config
    assert read_controlnet(folder).config["latent_channels"] == 8


def test_parts_are_read_by_their_index(tmp_path: Path) -> None:
    controlnet = filled_controlnet()
    export_controlnet(controlnet, tmp_path, part_bytes=60_000)
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    assert not (tmp_path / WEIGHTS_FILE).exists()
    assert same_weights(read_controlnet(tmp_path), controlnet)
    # Ours as diffusers writes it is read just so.
    controlnet.save_pretrained(tmp_path / "own", max_shard_size="60KB")
    assert same_weights(read_controlnet(tmp_path / "own"), controlnet)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/passwd", "weights.bin"])
def test_index_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"x_embedder.weight": name}}))
    with pytest.raises(ValueError, match="no safetensors file of this folder"):
        read_controlnet(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, "num_layers=1000000000: expected"),
        ({"num_layers": "2"}, "num_layers=2: expected"),
        ({"num_attention_heads": True}, "num_attention_heads=True: expected"),
        ({"axes_dims_rope": [1, 2, 3]}, "expected three even numbers"),
        ({"axes_dims_rope": 16}, "expected three even numbers"),
        ({"guidance_embeds": "yes"}, "expected true or false"),
        ({"scale": 3}, "scale=3: expected 0.5, 1 or 2"),
        ({"num_mode": 4}, "take no latents"),
        ({"num_layers": 1}, r"do not fit config\.json, first \w*blocks\.1\."),
        ({"num_layers": 3}, r"first \w*blocks\.2\.\S* the file has nothing"),
        ({"latent_channels": 9}, r"has \(32, 8\), the network \(32, 9\)"),
    ],
)
def test_configurations_that_lie_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_controlnet(folder)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_named(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    state, whole = load_file(weights), weights.read_bytes()
    save_file(state | {"x_embedder.bias": torch.full((32,), torch.nan)}, weights)
    with pytest.raises(ValueError, match=r"x_embedder\.bias is not finite"):
        read_controlnet(folder)
    save_file(state | {"x_embedder.bias": torch.zeros(32, dtype=torch.int64)}, weights)
    with pytest.raises(ValueError, match=r"x_embedder\.bias is of type torch\.int64"):
        read_controlnet(folder)
    save_file(state | {"extra": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="first extra: the file has"):
        read_controlnet(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        read_controlnet(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="there is no such file; download"):
        read_controlnet(folder)
    (folder / CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged or no JSON"):
        read_controlnet(folder)


def test_other_controlnets_are_refused(folder: Path) -> None:
    state = load_file(folder / WEIGHTS_FILE)
    others = {k: v for k, v in state.items() if not k.startswith("up_sampling_block")}
    save_file(others, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="no ControlNet of Bifrost"):
        read_controlnet(folder)
