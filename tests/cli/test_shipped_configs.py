"""Every YAML file in configs/ is accepted by the parser, and names classes that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from calls import call, write_tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(file.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_parses(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = CONFIGS / name
    arguments = ["--config", str(file)]
    if "model" not in yaml.safe_load(file.read_text()):  # an addition to a method's file
        arguments = ["--config", str(write_tiny(tmp_path)), *arguments]
    outcome = call("fit", *arguments, "--print_config")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out)["model"]["class_path"]
    assert not list(tmp_path.glob("runs")), "looking at a configuration starts no run"


def test_all_kinds_are_there() -> None:
    expected = {f"trainer/{name}.yaml" for name in ("cpu", "gpu", "ddp", "fsdp2", "slurm")}
    expected |= {f"logger/{name}.yaml" for name in ("csv", "wandb", "wandb_offline")}
    assert expected <= set(FILES)
