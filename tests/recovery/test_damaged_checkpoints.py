"""Checkpoints that are torn, foreign or hostile: one line, exit status 2, nothing executed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import TINY, call, fit, write_tiny
from comparison import final_state
from spoiled_files import DAMAGES, truncate

from lightning_modules.cli.checkpoint_files import newest_good_checkpoint, read_checkpoint
from lightning_modules.cli.checkpoint_io import VerifiedCheckpointIO
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.cli.interface import QuintetCLI


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its two newest checkpoints, of steps 20 and 24."""
    return fit(tmp_path_factory.mktemp("trained"), "--checkpoint.every_n_train_steps", "5")


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return Path("run")


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000024.ckpt"


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: Callable[[Path], None], run: Path) -> None:
    damage(newest(run))
    outcome = call("test", "--resume", "run", "--ckpt_path", str(newest(run)))
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if "ckpt" in line]
    assert line.startswith(str(newest(run)))
    assert "incomplete or damaged" in line
    assert f"newest good: {newest(run).with_name('step-00000020.ckpt')}" in line
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("with_digest", [True, False])
def test_resume_falls_back_to_the_newest_good_one(with_digest: bool, run: Path) -> None:
    truncate(newest(run))
    if not with_digest:
        newest(run).with_name(newest(run).name + ".sha256").unlink()
    outcome = call("fit", "--resume", "run")
    assert outcome.code == 0, outcome.err
    assert "incomplete or damaged: using run/checkpoints/step-00000020.ckpt" in outcome.err
    assert final_state(run)["global_step"] == 24


def test_nothing_good_left(run: Path) -> None:
    for file in (run / "checkpoints").glob("step-*.ckpt"):
        truncate(file)
    outcome = call("fit", "--resume", "run")
    assert outcome.code == 2
    assert "no good checkpoint" in outcome.err
    assert "Traceback" not in outcome.err


def test_checkpoint_of_another_model(run: Path) -> None:
    text = (run / "config.yaml").read_text().replace("TinyModel", "OtherModel")
    (run / "config.yaml").write_text(text)
    outcome = call("test", "--resume", "run")
    assert outcome.code == 2
    assert "checkpoint of tiny_pair.TinyModel, config builds tiny_pair.OtherModel" in outcome.err


def test_checkpoint_of_another_size(run: Path) -> None:
    outcome = call("test", "--resume", "run", "--model.width", "4")
    assert outcome.code == 2
    assert "net.0.bias has shape (8,), the configured model needs (4,) (3 differ)" in outcome.err


def test_weights_file_of_somebody_else(run: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, run / "foreign.ckpt")
    outcome = call("test", "--resume", "run", "--ckpt_path", "run/foreign.ckpt")
    assert outcome.code == 2
    assert "not a training checkpoint" in outcome.err


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("flags", [[], ["--weights_only", "false"], ["--weights_only", "true"]])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_executed(flags: list[str], zipped: bool, run: Path) -> None:
    content = final_state(run)
    content["hyper_parameters"]["lr"] = _Payload(Path("executed").absolute())
    evil = run / "evil.ckpt"
    if zipped:
        torch.save(content, evil)
    else:
        evil.write_bytes(pickle.dumps(content["hyper_parameters"]))
    for subcommand in ("fit", "test"):
        outcome = call(subcommand, "--resume", "run", "--ckpt_path", str(evil), *flags)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert not Path("executed").exists()


@pytest.mark.parametrize("key", ["_class_path", "_instantiator"])
def test_no_module_named_by_a_checkpoint_is_imported(
    key: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("evil_module.py").write_text("open('imported', 'w')\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    content = final_state(run)
    content["hyper_parameters"][key] = "evil_module.Model"
    content["quintet"] = {}
    VerifiedCheckpointIO().save_checkpoint(content, run / "evil.ckpt")
    call("validate", "--resume", "run", "--ckpt_path", "run/evil.ckpt")
    assert not Path("imported").exists()


def test_checkpoint_does_not_change_the_configuration(run: Path) -> None:
    """Fails if Lightning renames the hook that the interface turns off."""
    from lightning.pytorch.cli import LightningCLI

    assert callable(LightningCLI._parse_ckpt_path)
    assert QuintetCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path
    outcome = call(
        "fit", "--resume", "run", "--model.lr", "0.25", "--trainer.max_epochs", "3"
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert final_state(run)["hyper_parameters"]["lr"] == 0.25


def test_failed_write_keeps_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if "step-00000010.ckpt" in str(target) and "sha256" not in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    outcome = call("fit", "--config", "tiny.yaml", "--checkpoint.every_n_train_steps", "5")
    assert outcome.code == 2
    assert "step-00000010.ckpt: checkpoint not saved: No space left on device" in outcome.err
    folder = Path("runs/latest/checkpoints")
    assert newest_good_checkpoint([folder])[0] == folder / "step-00000005.ckpt"
    assert not list(folder.glob(".*.partial"))


def test_overwritten_file_is_good_whenever_the_process_dies(tmp_path: Path) -> None:
    """Between writing the digest and renaming the file, the old file still counts as whole."""
    file, io = tmp_path / "a.ckpt", VerifiedCheckpointIO()
    content = {"state_dict": {}, "global_step": 1}
    io.save_checkpoint(content, file)
    before = file.read_bytes()
    io.save_checkpoint({**content, "global_step": 2}, file)
    assert read_checkpoint(file)["global_step"] == 2
    file.write_bytes(before)
    assert read_checkpoint(file)["global_step"] == 1
    io.save_checkpoint({**content, "global_step": 3}, file)
    file.write_bytes(b"x" + before[1:])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(file)
    io.remove_checkpoint(file)
    assert not list(tmp_path.iterdir())


def test_run_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions mean nothing to root, so the refusal is simulated at the system's border."""
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, TINY)

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    outcome = call("fit", "--config", "tiny.yaml")
    assert outcome.code == 2
    assert "cannot write into it (Permission denied); choose another with --runs_dir" in outcome.err
