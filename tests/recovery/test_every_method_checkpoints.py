"""Every method: checkpoints that are damaged, hostile or another method's are refused in a line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Outcome, call
from comparison import assert_same_weights, final_state, rows
from methods import SMALLEST
from spoiled_files import DAMAGES, truncate

Workplace = Callable[[str], Path]


def newest(run: Path) -> Path:
    """The file that ``last.ckpt`` points to."""
    return run / "checkpoints" / os.readlink(run / "checkpoints/last.ckpt")


def made_by(run: Path) -> str:
    """The class that a run's checkpoint says it is of."""
    return str(final_state(run)["quintet"]["model"])


def refusal(outcome: Outcome) -> str:
    """The one line that a call was refused with."""
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    lines = [line for line in outcome.err.splitlines() if ".ckpt" in line]
    assert len(lines) == 1, outcome.err
    return lines[0]


@pytest.mark.parametrize("method", SMALLEST)
def test_damaged_checkpoints(method: str, workplace: Workplace) -> None:
    run = workplace(method) / "run"
    good = newest(run).read_bytes()
    before = sorted((run / "checkpoints").glob("step-*.ckpt"))[-2]
    for damage in DAMAGES:
        newest(run).write_bytes(good)
        damage(newest(run))
        line = refusal(call("test", "--resume", "run", "--ckpt_path", str(newest(run))))
        assert line.startswith(str(newest(run))), damage.__name__
        assert "incomplete or damaged" in line, damage.__name__
        assert line.endswith(f"newest good: {before}"), damage.__name__


@pytest.mark.parametrize("method", SMALLEST)
def test_training_goes_on_from_the_last_good_one(
    method: str, trained: Callable[[str], Path], workplace: Workplace
) -> None:
    run = workplace(method) / "run"
    truncate(newest(run))
    outcome = call("fit", "--resume", "run")
    assert outcome.code == 0, outcome.err
    assert "incomplete or damaged: using " in outcome.err
    assert_same_weights(trained(method) / "runs/latest", run)
    assert rows(run) == rows(trained(method) / "runs/latest")


@pytest.mark.parametrize("method", SMALLEST)
def test_checkpoint_of_another_method(
    method: str, trained: Callable[[str], Path], workplace: Workplace
) -> None:
    names = list(SMALLEST)
    other = names[names.index(method) - 1]
    folder = workplace(method)
    file = newest((trained(other) / "runs/latest").resolve())
    for suffix in ("", ".sha256"):
        shutil.copy(f"{file}{suffix}", folder / f"other.ckpt{suffix}")
    line = refusal(call("test", "--resume", "run", "--ckpt_path", "other.ckpt"))
    theirs, own = (
        final_state(run)["quintet"]["model"] for run in (file.parents[1], folder / "run")
    )
    assert line == f"other.ckpt: checkpoint of {theirs}, config builds {own}"


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {Path('executed').absolute()}",)


@pytest.mark.parametrize("method", SMALLEST)
def test_pickled_code_is_not_executed(method: str, workplace: Workplace) -> None:
    run = workplace(method) / "run"
    content = final_state(run)
    content["hyper_parameters"]["seed"] = _Payload()
    torch.save(content, "evil.ckpt")
    for subcommand in ("fit", "test"):
        flags = ["--resume", "run", "--ckpt_path", "evil.ckpt"]
        assert "holds posix.system; refused" in refusal(call(subcommand, *flags))
    assert not Path("executed").exists()
