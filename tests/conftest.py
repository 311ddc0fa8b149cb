"""Settings of every test: two threads at most, no network, no account."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true")

REPOSITORY = Path(__file__).resolve().parents[1]
# Processes started by tests import the same modules as the tests themselves.
os.environ["PYTHONPATH"] = os.pathsep.join(
    map(str, (REPOSITORY, REPOSITORY / "tests/cli", REPOSITORY / "tests/recovery"))
)
