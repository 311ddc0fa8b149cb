"""Every setting that takes weights from a file: code in the file is refused and never executed."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call
from methods import ROWS, MethodRow, train_arguments

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_DISTILLATION = MethodRow(
    "farmer distillation",
    _CONFIGS / "farmer/demo_distill.yaml",
    ["--data.embedded=digits", "--data.image_size=8", "--data.levels=17", "--trainer.max_steps=2"],
    (),
)
_JUDGE = MethodRow(
    "token reduction, judge",
    _CONFIGS / "token_reduction/demo_judge.yaml",
    ["--data.train_size=32", "--data.val_size=16", "--data.batch_size=8", "--trainer.max_steps=2"],
    (),
)
_VGG19 = "--model.loss.perceptual=vgg19"
_TIMM = "--model.encoder=models.image_encoders.encoders.TimmEncoder"
_VIT = "--model.encoder.name=vit_tiny_patch16_224"

# A training, further flags, and the setting that takes the path.
IMPORTS: dict[str, tuple[MethodRow, list[str], str]] = {
    "a flow of TarFlow": (ROWS["farmer"], [], "--model.tarflow"),
    "a teacher": (_DISTILLATION, [], "--model.teacher"),
    "a renderer": (ROWS["clift stage 1"], [], "--model.pretrained"),
    "an encoder to condense for": (ROWS["clift stage 2"], [], "--model.pretrained"),
    "a perceptual network": (ROWS["clift stage 1"], [_VGG19], "--model.loss.weights"),
    "an encoder of pages": (ROWS["token reduction"], [], "--model.encoder.weights"),
    "an encoder of images": (ROWS["token reduction"], [_TIMM, _VIT], "--model.encoder.weights"),
    "a selector": (_JUDGE, [], "--model.pretrained"),
    "an encoder of clouds": (ROWS["concerto probe"], [], "--model.pretrained"),
    "a branch": (ROWS["bifrost branch"], [], "--model.pretrained"),
    "a branch to paint by": (ROWS["bifrost controlnet, EMA"], [], "--model.branch"),
    "a ControlNet": (ROWS["bifrost controlnet, EMA"], [], "--model.pretrained"),
}


# Further settings of models that take a path, and where code in the file is refused.
ELSEWHERE = {
    "folder": "test_code_in_a_foundation_is_refused",
    "vae_folder": "test_code_in_a_foundation_is_refused",
}


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker.absolute())

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def archive(file: Path, payload: object) -> None:
    """As torch writes it today."""
    content = {"state_dict": {"weight": torch.zeros(2)}, "global_step": 1, "config": payload}
    torch.save(content, file)


def old_archive(file: Path, payload: object) -> None:
    """As torch wrote it before 1.6: pickles one after another."""
    torch.save({"weight": payload}, file, _use_new_zipfile_serialization=False)


def bare_pickle(file: Path, payload: object) -> None:
    """As Python writes it."""
    file.write_bytes(pickle.dumps({"state_dict": payload}, protocol=2))


FILES: list[tuple[str, Callable[[Path, object], None]]] = [
    ("evil.ckpt", archive),
    ("evil.pth", old_archive),
    ("evil.safetensors", bare_pickle),
]


@pytest.mark.parametrize("name", IMPORTS)
def test_code_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, flags, setting = IMPORTS[name]
    monkeypatch.chdir(tmp_path)
    arguments = [*train_arguments(row, tmp_path), *flags, "--trainer.callbacks=null"]
    for file, write in FILES:
        write(tmp_path / file, _Payload(tmp_path / "executed"))
        outcome = call(*arguments, f"{setting}={tmp_path / file}")
        assert not (tmp_path / "executed").exists(), (file, write.__name__)
        assert outcome.code in (1, 2), (file, write.__name__)
        assert "Traceback" not in outcome.err
        assert file in outcome.err.strip().splitlines()[-1]
        assert not (tmp_path / "runs/latest").exists()


@pytest.mark.parametrize("part", ["tower", "language_model", "flux", "vae"])
def test_code_in_a_foundation_is_refused(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = train_arguments(ROWS["bifrost controlnet, EMA"], tmp_path)
    for suffix in ("safetensors", "json"):
        file = tmp_path / f"foundations/{part}.{suffix}"
        good = file.read_bytes()
        bare_pickle(file, _Payload(tmp_path / "executed"))
        outcome = call(*arguments)
        assert not (tmp_path / "executed").exists()
        assert outcome.code in (1, 2)
        assert "Traceback" not in outcome.err
        assert file.name in outcome.err.strip().splitlines()[-1]
        file.write_bytes(good)


@pytest.mark.parametrize("write", [archive, old_archive, bare_pickle])
def test_code_in_a_folder_of_transformers_is_refused(
    write: Callable[[Path, object], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPVisionConfig

    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2).save_pretrained("clip")
    write(tmp_path / "clip/pytorch_model.bin", _Payload(tmp_path / "executed"))
    arguments = train_arguments(ROWS["token reduction"], tmp_path)
    encoder = "--model.encoder=models.image_encoders.encoders.TransformersEncoder"
    outcome = call(*arguments, encoder, "--model.encoder.folder=clip")
    assert not (tmp_path / "executed").exists()
    assert outcome.code in (1, 2)
    assert "Traceback" not in outcome.err
    assert "clip" in outcome.err.strip().splitlines()[-1]


def test_every_setting_of_a_file_is_tested() -> None:
    """A new setting that takes weights has to be added to the table above."""
    tested = {setting.rpartition(".")[2] for _, _, setting in IMPORTS.values()}
    argument = r"^        (\w+): Path(?: \| None)?(?: = None)?,$"
    found: set[str] = set()
    for file in sorted((_CONFIGS.parent / "lightning_modules").glob("*.py")):
        found |= set(re.findall(argument, file.read_text(), re.MULTILINE))
    assert found - tested <= ELSEWHERE.keys()
