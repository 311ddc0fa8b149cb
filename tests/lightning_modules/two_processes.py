"""Runs a test's script in processes of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_sharded(code: str, folder: Path, seconds: float) -> None:
    """Run a script, given the folder, whose trainer starts the second process itself.

    Both processes write "done" to ``rank<n>.txt`` in the folder when all has gone well.
    """
    script = folder / "sharded.py"
    script.write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert call.returncode == 0, call.stderr[-3000:]
    assert [(folder / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["done", "done"]


def run_both_ranks(code: str, folder: Path) -> None:
    """Run code twice at a time, given its rank and the folder, where the two may meet."""
    arguments = [sys.executable, "-c", code]
    ranks = [subprocess.Popen([*arguments, str(rank), str(folder)]) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
