"""Files of Concerto that do not fit: one line names file, key and remedy."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.concerto.checkpoint import load_backbone, load_pretraining, save_backbone
from models.concerto.pretraining import Concerto
from tests.models.concerto_cases import TINY, TINY_ENCODER, fill
from tests.models.concerto_files import (
    PLAIN,
    encoder_of,
    lightning_checkpoint,
    released_config,
    training_checkpoint,
)


@pytest.fixture(scope="module")
def network() -> Concerto:
    built = Concerto(PLAIN)
    fill(built)
    return built


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"enc_channels": [16, 32, 64]}, r"config enc_channels=\(16, 32, 64\): the weights have"),
    ({"enc_depths": [1, 2, 2]}, r"config enc_depths=\(1, 2, 2\): the weights have \(1, 1, 2\)"),
    ({"in_channels": 6}, "config in_channels=6: the weights have 9"),
    ({"mlp_ratio": 2}, "config mlp_ratio=2: the weights have 4"),
    ({"enc_num_head": [1, 2]}, r"config enc_num_head=\(1, 2\): expected 3 numbers"),
    ({"enc_num_head": [1, 2, 5]}, "channels=32: must be a multiple of its heads=5"),
    ({"enc_num_head": "many"}, "config enc_num_head='many': expected 3 numbers"),
    ({"enc_patch_size": [64, 64, 128]}, r"config enc_patch_size=\(64, 64, 128\): must be one size"),
    ({"enc_patch_size": 10**12}, "config enc_patch_size=1000000000000: must be one size"),
    ({"enc_patch_size": True}, "config enc_patch_size=True: must be one size"),
    ({"stride": [2, 4]}, r"config stride=\(2, 4\): only \(2, 2\) is supported"),
    ({"order": ["z", "hilbert"]}, "config order="),
    ({"enable_rpe": True}, "config enable_rpe=True: only False is supported"),
    ({"drop_path": 2.0}, r"config drop_path=2.0: must be in \[0, 1\)"),
    ({"drop_path": float("nan")}, r"config drop_path=nan: must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS, ids=[str(c) for c, _ in CONFIGS])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_configuration_that_does_not_fit_is_named(
    change: dict[str, Any], message: str, suffix: str, tmp_path: Path
) -> None:
    path, state = tmp_path / f"wrong{suffix}", encoder_of().state_dict()
    config = released_config() | change
    if suffix == ".pth":
        torch.save({"config": config, "state_dict": state}, path)
    else:
        save_file(state, path)
        path.with_suffix(".json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_arguments_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    config = released_config() | {"colour": "blue", "dec_depths": [2, 2]}
    torch.save({"config": config, "state_dict": encoder_of().state_dict()}, path)
    assert load_backbone(path).notes == ("config colour='blue' is not known; ignored",)


STATES: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("missing", {"enc.enc1.block0.mlp.0.fc2.bias": None}, "1 keys do not fit, first enc.enc1"),
    ("unknown", {"enc.enc1.extra": torch.zeros(2)}, "the file has .2,., the network nothing"),
    ("shape", {"enc.enc0.block0.attn.qkv.bias": torch.zeros(2)}, "the network .48,.; take"),
    ("nan", {"enc.enc0.block0.norm1.0.bias": torch.full((16,), torch.nan)}, "holds NaN"),
    ("type", {"enc.enc0.block0.norm1.0.bias": torch.zeros(16, dtype=torch.int64)}, "no floats"),
    ("flat", {"embedding.stem.linear.weight": torch.zeros(9)}, "is of shape .9,.: expected a matr"),
    ("down", {"enc.enc1.down.proj.weight": None}, "down.proj.weight is missing: expected a matrix"),
    ("empty", {"enc.enc0.block0.mlp.0.fc1.weight": torch.zeros(0, 0)}, "expected a matrix"),
    ("gap", {f"enc.enc2.block0.norm1.0.{p}": None for p in ("weight", "bias")}, "2 keys do not"),
]


@pytest.mark.parametrize(("change", "message"), [s[1:] for s in STATES], ids=[s[0] for s in STATES])
def test_weights_that_do_not_fit_are_named(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state, path = dict(encoder_of().state_dict()) | change, tmp_path / "wrong.pth"
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_of_other_kinds_are_named(network: Concerto, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"seg_head.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="0 encoders of Concerto, expected 1 key that ends in"):
        load_backbone(path)
    doubled = {f"{part}.{key}": value for key, value in encoder_of().state_dict().items() for part
               in ("first", "second")}  # fmt: skip
    torch.save(doubled, path)
    with pytest.raises(ValueError, match="2 encoders of Concerto"):
        load_backbone(path)
    save_backbone(path, network.student.backbone)
    with pytest.raises(ValueError, match="holds an encoder alone; load it by load_backbone"):
        load_pretraining(path)
    content = training_checkpoint(network)
    del content["state_dict"]["module.patch_proj.weight"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="no whole training checkpoint: 'patch_proj"):
        load_pretraining(path)
    content["state_dict"]["module.patch_proj.weight"] = torch.zeros(12, 70)
    torch.save(content, path)
    with pytest.raises(ValueError, match="heads of 64 and 70 channels: the encoder's levels have"):
        load_pretraining(path)
    with pytest.raises(FileNotFoundError, match="no such file; expected a backbone"):
        load_backbone(tmp_path / "gone.pth")


OWN: list[tuple[Any, str]] = [
    ({"encoder": {"channels": (16, 32, 32), "evil": 1}}, "no sizes of an encoder"),
    ({"encoder": 3}, "no sizes of an encoder"),
    ([1], "no dictionary of plain values"),
    ({"encoder": asdict(replace(TINY_ENCODER, depths=(1, 1, 1)))}, "the weights have"),
    ({"encoder": asdict(TINY_ENCODER) | {"channels": 5}}, "hyper_parameters shape"),
    ({"encoder": asdict(TINY_ENCODER) | {"patch_size": 0}}, "patch_size=0: must be >= 1"),
    (asdict(TINY) | {"surprise": 1}, "surprise"),
    (asdict(TINY) | {"hidden": 7}, "keys do not fit"),
]


@pytest.mark.parametrize(("shape", "message"), OWN, ids=[message for _, message in OWN])
def test_damaged_sizes_of_ours_are_named(shape: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(lightning_checkpoint(Concerto(TINY), shape), path)
    with pytest.raises(ValueError, match=message) as caught:
        load_pretraining(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
