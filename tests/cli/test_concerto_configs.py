"""The configurations for a user's own ScanNet and clouds do what they say, on tiny ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from calls import call

from models.concerto.checkpoint import save_backbone
from models.concerto.encoder import EncoderShape, PointTransformer
from tests.lightning_modules.segmentation_runs import write_scene

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "concerto"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = EncoderShape(channels=(16, 16, 16), heads=(1, 1, 1), depths=(1, 1, 1))
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "backbone.pth"
    save_backbone(path, PointTransformer(shape))
    return path


@pytest.mark.parametrize("mode", ["linear", "full"])
def test_scannet_is_probed(
    mode: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, number in (("train", 0), ("train", 1), ("val", 2)):
        folder = tmp_path / "scannet" / split / f"scene{number:04d}_00"
        write_scene(folder, number)
        (folder / "segment.npy").rename(folder / "segment20.npy")
    decoder = ["channels=[16,16]", "heads=[1,1]", "depths=[1,1]"]
    flags = [] if mode == "linear" else [f"--model.decoder.{part}" for part in decoder]
    flags += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    flags += ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]
    flags += ["--trainer.enable_model_summary=false"]
    flags += ["--data.root=scannet", "--data.batch_size=2", "--data.num_workers=0"]
    flags += [f"--model.pretrained={backbone}", "--data.grid_size=0.1"]
    outcome = call("fit", "--config", str(CONFIGS / f"scannet_{mode}.yaml"), *flags)
    assert outcome.code == 0, outcome.err
    outcome = call("test", "--resume", "runs/latest")
    assert outcome.code == 0, outcome.err
    assert "shower curtain" in outcome.out
    assert len(list(tmp_path.glob("runs/latest/clouds/val/*.ply"))) == 2


def test_features_of_own_clouds_are_written(
    backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_scene(tmp_path / "clouds" / "kitchen", 0)
    config = str(CONFIGS / "features.yaml")
    flags = [f"--model.pretrained={backbone}", "--trainer.accelerator=cpu"]
    flags += ["--trainer.enable_progress_bar=false"]
    outcome = call("predict", "--config", config, *flags)
    assert outcome.code == 0, outcome.err
    (folder,) = tmp_path.glob("runs/cloud_features/*/predictions")
    names = {"kitchen.npz", "kitchen-features.ply", "kitchen-features.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert np.load(folder / "kitchen.npz")["feat"].shape == (300, 48)
