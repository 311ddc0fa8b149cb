"""What a newcomer meets first is ours, and it does not keep them waiting."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from calls import call

REPOSITORY = Path(__file__).resolve().parents[2]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, train\n"
        "train.main(['--help'])\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'wandb', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Quintet: ")
    assert "python train.py fit --config configs/farmer/demo.yaml" in done.stdout
    assert len(done.stdout.splitlines()) <= 30, "it must fit on one screen"
    for folder in (REPOSITORY / "configs").iterdir():
        if (REPOSITORY / "models" / folder.name).is_dir():
            assert re.search(rf"^  {folder.name} +\w.+\.$", done.stdout, re.MULTILINE), folder


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_every_way_to_ask(argv: list[str]) -> None:
    outcome = call(*argv)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Quintet: ")


def test_help_of_a_subcommand_names_our_settings() -> None:
    outcome = call("fit", "--help")
    assert outcome.code == 0
    for flag in ("--resume", "--name", "--runs_dir", "--checkpoint.every_n_minutes"):
        assert flag in outcome.out
