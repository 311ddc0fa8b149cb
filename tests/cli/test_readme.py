"""Every command of README.md runs; trainings are cut down to a few steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from calls import call

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
NO_DATA = re.compile("imagenet256|configs/(clift|token_reduction|concerto|bifrost)")
SMALL = [
    "--data.embedded=digits",
    "--data.image_size=8",
    "--data.levels=17",
    "--model.patch_size=2",
    "--model.informative_channels=2",
    "--model.flow.blocks=1",
    "--model.prior.layers=1",
    "--trainer.max_steps=2",
    "--trainer.limit_val_batches=1",
    "--trainer.callbacks=null",
]


def commands(program: str) -> list[list[str]]:
    """Arguments of every line of README.md's shell blocks that calls ``program``."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[len(program.split()) :] for line in lines if line.startswith(program)]


def test_train_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    seen = set()
    for words in commands("python train.py"):
        seen.add(words[0])
        # No such data or weights here: parse alone.
        if any(NO_DATA.search(word) for word in words):
            outcome = call(*words, "--print_config")
        elif words[0] == "fit" and "--resume" not in words:
            outcome = call(*words, *SMALL)
        else:
            outcome = call(*words)
        assert outcome.code == 0, f"{words}: {outcome.err}"
    assert {"fit", "test", "predict"} <= seen


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, *_ in commands("make"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_named_files_exist() -> None:
    for path in re.findall(r"(?<![\w/])(?:configs|models|datamodules|benchmarks)/[\w./-]+\w", TEXT):
        assert (ROOT / path).exists(), path
