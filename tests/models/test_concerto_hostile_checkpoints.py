"""Files of Concerto made to do harm: one line names what was refused, and nothing happens."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.concerto.checkpoint import load_backbone, load_pretraining, save_backbone
from models.concerto.encoder import PointTransformer
from models.concerto.pretraining import Concerto
from tests.models.concerto_cases import TINY, TINY_ENCODER
from tests.models.hostile_archives import PAYLOADS, Call, dump, tensor, write

STEM = "embedding.stem.linear.weight"
LOADERS: list[Callable[[Path], object]] = [load_backbone, load_pretraining]


def refusal(path: Path, load: Callable[[Path], object] = load_backbone) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError, match=path.stem) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path.parent))
    assert len(message) < 600
    return message


@pytest.mark.parametrize(("name", "payload"), PAYLOADS, ids=[name for name, _ in PAYLOADS])
@pytest.mark.parametrize("place", ["config", "optimizer", "best_metric_value", "hyper_parameters"])
def test_code_is_named_and_not_executed(
    name: str, payload: Callable[[str], Any], place: str, tmp_path: Path
) -> None:
    marker = tmp_path / "executed"
    content = {"state_dict": {f"module.student.backbone.{STEM}": tensor(4, (2, 2), (2, 1))}}
    content[place] = payload(str(marker))
    path = write(tmp_path / "evil.pth", dump(content))
    for load in LOADERS:
        assert name in refusal(path, load)
    assert not marker.exists()


@pytest.mark.parametrize("load", LOADERS)
def test_pickle_outside_an_archive_is_not_read(
    load: Callable[[Path], object], tmp_path: Path
) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    assert "no checkpoint of torch" in refusal(path, load)
    assert not marker.exists()


def test_numpy_scalars_are_inert_and_arrays_refused(tmp_path: Path) -> None:
    state = PointTransformer(TINY_ENCODER).state_dict()
    path = tmp_path / "model.pth"
    torch.save({"state_dict": state, "best_metric_value": np.float64(0.7)}, path)
    load_backbone(path)
    torch.save({"state_dict": state, "best_metric_value": np.zeros(3)}, path)
    assert "multiarray._reconstruct" in refusal(path)


@pytest.mark.parametrize(
    ("numel", "size", "stride"),
    [(10**12, (10**12,), (1,)), (4, (10**12, 9), (0, 0)), (4, (2, 3), (3, 1)), (4, (4,), (-1,))],
)
def test_sizes_beyond_the_file_are_refused(
    numel: int, size: tuple[int, ...], stride: tuple[int, ...], tmp_path: Path
) -> None:
    refusal(write(tmp_path / "huge.pth", dump({"state_dict": {STEM: tensor(numel, size, stride)}})))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    pickled = dump({"state_dict": {STEM: tensor(4, (2, 2), (2, 1))}})
    path = write(tmp_path / "bomb.pth", pickled, zipfile.ZIP_DEFLATED)
    assert "not an archive as torch writes it" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
def test_truncated_files_are_refused(suffix: str, keep: float, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pth", tmp_path / f"short{suffix}"
    if suffix == ".safetensors":
        save_file(PointTransformer(TINY_ENCODER).state_dict(), whole)
    else:
        save_backbone(whole, PointTransformer(TINY_ENCODER))
    content = whole.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert "incomplete" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"epoch": 3}, {}, {"state_dict": {}}, {"state_dict": 5}, {"a": {"b": 1}}, 7, "text"],
)
@pytest.mark.parametrize("load", LOADERS)
def test_files_without_weights_are_refused(
    content: object, load: Callable[[Path], object], tmp_path: Path
) -> None:
    refusal(write(tmp_path / "empty.pth", dump(content)), load)


@pytest.mark.parametrize("config", [5, "text", [1], {1: 2}, {"enc_channels": {"a": 1}}])
def test_configurations_of_other_kinds_are_refused(config: object, tmp_path: Path) -> None:
    state, path = PointTransformer(TINY_ENCODER).state_dict(), tmp_path / "model.pth"
    torch.save({"config": config, "state_dict": state}, path)
    assert "config" in refusal(path)


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[1]", "7", " " * 70_000 + "{}", '{"enc_channels": "\\n"}']
)
def test_configurations_beside_safetensors_are_checked(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(PointTransformer(TINY_ENCODER).state_dict(), path)
    path.with_suffix(".json").write_text(text)
    refusal(path)


def test_configuration_opens_no_path(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_backbone(path, PointTransformer(TINY_ENCODER))
    config = json.loads(path.with_suffix(".json").read_text())
    config |= {"pretrained": "/etc/passwd", "__class__": "os.system"}
    path.with_suffix(".json").write_text(json.dumps(config))
    assert len(load_backbone(path).notes) == 2


def test_keys_with_line_breaks_stay_on_one_line(tmp_path: Path) -> None:
    state, path = dict(PointTransformer(TINY_ENCODER).state_dict()), tmp_path / "model.pth"
    torch.save(state | {"enc.\nevil" * 500: torch.zeros(2)}, path)
    refusal(path)
    torch.save({"a\nb" * 500: torch.zeros(2)}, path)
    refusal(path)
    torch.save({"state_dict": {"a\nb": 3}}, path)
    refusal(path)


def test_levels_far_apart_build_no_giant(tmp_path: Path) -> None:
    """A block's number in a key is no reason to build as many levels."""
    state, path = dict(PointTransformer(TINY_ENCODER).state_dict()), tmp_path / "model.pth"
    torch.save(state | {"enc.enc999999999.block0.norm1.0.bias": torch.zeros(2)}, path)
    assert "enc.enc3.down.proj.weight is missing" in refusal(path)
    torch.save(state | {"enc.enc0.block999999999.norm1.0.bias": torch.zeros(16)}, path)
    assert "keys do not fit" in refusal(path)


def test_sizes_of_ours_build_no_giant(tmp_path: Path) -> None:
    network, path = Concerto(TINY), tmp_path / "last.ckpt"
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    for name in ("hidden", "prototypes", "image_channels"):
        for size in (10**9, 10**18, 10**30, 3.5, "many"):
            shape = asdict(TINY) | {name: size}
            torch.save({"state_dict": state, "hyper_parameters": {"shape": shape}}, path)
            refusal(path, load_pretraining)


def test_reading_leaves_no_permission_behind(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_backbone(path, PointTransformer(TINY_ENCODER))
    load_backbone(path)
    assert not any(
        isinstance(entry, tuple) and "omegaconf" in entry[1]
        for entry in torch.serialization.get_safe_globals()
    )
