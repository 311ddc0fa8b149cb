"""Calls of train.py within the test's own process."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import train

TINY = """\
model:
  class_path: tiny_pair.TinyModel
  init_args:
    width: 8
data:
  class_path: tiny_pair.TinyData
  init_args:
    batch_size: 4
trainer:
  max_epochs: 2
  accelerator: cpu
  log_every_n_steps: 1
  enable_model_summary: false
  enable_progress_bar: false
"""


@dataclass(frozen=True)
class Outcome:
    """What a call left: exit status and both output streams."""

    code: int
    out: str
    err: str


def call(*args: str) -> Outcome:
    """Call ``train.main`` and catch how it ends."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main(args)
        except SystemExit as ending:
            code = int(ending.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def write_tiny(folder: Path, text: str = TINY, name: str = "tiny.yaml") -> Path:
    """Write the configuration of the tiny pair."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def fit(folder: Path, *args: str, config: Path | None = None) -> Path:
    """Train the tiny pair, or ``config``, below ``folder`` and return the run directory."""
    config = config or write_tiny(folder)
    outcome = call("fit", "--config", str(config), "--runs_dir", str(folder / "runs"), *args)
    if outcome.code:
        raise AssertionError(outcome.err)
    return (folder / "runs" / "latest").resolve()
