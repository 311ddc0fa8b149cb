"""A disk that is full: the run stops with a line, and what was saved before stays good."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calls import call, write_tiny
from comparison import final_state
from forked_calls import start
from methods import SAVE_EVERY_STEP, SMALLEST, train_arguments

from lightning_modules.cli.checkpoint_files import newest_good_checkpoint

# No file may grow beyond some size from a step on; the kernel's refusal is what a full disk gives.
_FULL = """\
import resource
from lightning_modules.callbacks.step_seed import StepSeed
seed = StepSeed.on_train_batch_start
def limited(self, trainer, *rest):
    if trainer.global_step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    seed(self, trainer, *rest)
StepSeed.on_train_batch_start = limited
"""


def assert_stopped(code: int, text: str, checkpoints: Path) -> None:
    """The line that is shown, and checkpoints of which none is torn."""
    assert code == 2, text
    assert "Traceback" not in text
    (line,) = (line for line in text.splitlines() if "not saved" in line)
    assert re.search(r"step-\d+\.ckpt: checkpoint not saved: ", line)
    assert re.search(r"\(free space: .*\); earlier ones are kept$", line)
    good, damaged = newest_good_checkpoint([checkpoints])
    assert good is not None
    assert not damaged
    assert not list(checkpoints.glob(".*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, in which a run gets stuck."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_small_disk_fills_up(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    flags = ["--config=tiny.yaml", f"--runs_dir={small_disk}/runs", *SAVE_EVERY_STEP]
    outcome = call("fit", *flags)
    checkpoints = small_disk / "runs/latest/checkpoints"
    assert_stopped(outcome.code, outcome.err, checkpoints)
    step = newest_good_checkpoint([checkpoints])[0]
    assert step is not None
    for file in sorted(checkpoints.glob("step-*.ckpt"))[:-2]:
        file.unlink()
    outcome = call("fit", "--resume", f"{small_disk}/runs/latest", "--checkpoint.keep=2")
    assert outcome.code == 0, outcome.err
    assert final_state(small_disk / "runs/latest")["global_step"] == 24


@pytest.mark.parametrize("method", SMALLEST)
def test_checkpoint_of_a_method_does_not_fit(method: str, workplace: Callable[[str], Path]) -> None:
    folder = workplace(method)
    arguments = [*train_arguments(SMALLEST[method], folder), *SAVE_EVERY_STEP]
    stopped = start(arguments, folder, _FULL)
    code = stopped.finish()
    run = folder / "runs/latest"
    assert_stopped(code, stopped.log.read_text(), run / "checkpoints")
    assert final_state(run)["global_step"] == 2
