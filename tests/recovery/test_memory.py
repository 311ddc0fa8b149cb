"""Training takes no more memory the longer it lasts."""

from __future__ import annotations

from pathlib import Path

import pytest
from calls import write_tiny
from forked_calls import start
from methods import SMALLEST, train_arguments

_MEASURE = """\
import pathlib, resource
from lightning_modules.callbacks.step_seed import StepSeed
seed = StepSeed.on_train_batch_start
def measured(self, trainer, *rest):
    if trainer.global_step % {interval} == 0:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        with open("resident.txt", "a") as stream:
            print(pages * resource.getpagesize(), file=stream)
    seed(self, trainer, *rest)
StepSeed.on_train_batch_start = measured
"""


# Nothing but the number of steps takes time.
_LEAST = [
    "--data.batch_size=8",
    "--model.flow.blocks=1",
    "--model.flow.width=64",
    "--model.muon_lr=null",
]


@pytest.mark.parametrize(("name", "interval"), [("tiny pair", 100), ("farmer", 50)])
def test_growth_after_warm_up(name: str, interval: int, tmp_path: Path) -> None:
    """Measured at the start and four times at equal intervals, the first of which is warm-up."""
    if name == "tiny pair":
        args = ["fit", "--config", str(write_tiny(tmp_path)), "--trainer.max_epochs=-1"]
    else:
        args = [*train_arguments(SMALLEST[name], tmp_path), *_LEAST]
    flags = [f"--trainer.max_steps={4 * interval + 1}", "--trainer.limit_val_batches=0"]
    hook = _MEASURE.format(interval=interval)
    call = start([*args, *flags, "--trainer.callbacks=null"], tmp_path, hook)
    assert call.finish() == 0, call.log.read_text()
    resident = [int(line) for line in (tmp_path / "resident.txt").read_text().split()]
    assert len(resident) == 5
    growth = (resident[4] - resident[1]) / (3 * interval / 100)
    assert growth < 2**20, f"{growth / 2**20:.2f} MB every 100 steps"
