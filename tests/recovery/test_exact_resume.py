"""A run that goes on from any checkpoint ends exactly like one that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from calls import call, fit, write_tiny
from comparison import assert_same_weights, rows
from methods import EMA, ROWS, SAVE_EVERY_STEP, fit_row

VARIANTS = {
    "plain": ([], (1, 12, 17)),
    "accumulate, validate mid-epoch, EMA": (
        [
            "--trainer.accumulate_grad_batches=2",
            "--trainer.val_check_interval=5",
            "--config=ema.yaml",
            "--data.count=44",
        ],
        (2, 3, 6, 9),
    ),
    "accumulate past a validation": (
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=4"],
        (1, 2, 5),
    ),
    "step limit, validation across epochs": (
        [
            "--trainer.max_steps=17",
            "--trainer.max_epochs=-1",
            "--trainer.val_check_interval=5",
            "--trainer.check_val_every_n_epoch=null",
        ],
        (5, 12, 16),
    ),
    "step limit alone": (["--trainer.max_steps=20", "--trainer.max_epochs=null"], (12, 13)),
    "workers": (["--data.num_workers=2"], (7,)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags, steps = VARIANTS[variant]
    write_tiny(tmp_path, EMA, "ema.yaml")
    reference = fit(tmp_path, *SAVE_EVERY_STEP, *flags)
    _check_resumes(tmp_path, reference, steps)


@pytest.mark.parametrize("method", ROWS)
def test_resume_of_a_method_is_exact(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reference = fit_row(ROWS[method], tmp_path, *SAVE_EVERY_STEP)
    _check_resumes(tmp_path, reference, ROWS[method].steps)


def _check_resumes(tmp_path: Path, reference: Path, steps: tuple[int, ...]) -> None:
    for step in steps:
        run = tmp_path / f"from-{step}"
        shutil.copytree(reference, run, symlinks=True)
        for later in (run / "checkpoints").glob("step-*.ckpt"):
            if later.stem > f"step-{step:08d}":
                later.unlink()
        outcome = call("fit", "--resume", str(run))
        assert outcome.code == 0, outcome.err
        assert_same_weights(reference, run)
        assert rows(run) == rows(reference)


def test_dropout_without_step_seed_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model does depend on the global generator, so the tests above mean something."""
    monkeypatch.chdir(tmp_path)
    reference = fit(tmp_path, "--trainer.max_steps", "6")
    other = tmp_path / "other"
    shutil.copytree(reference, other, symlinks=True)
    for file in (other / "checkpoints").iterdir():
        file.unlink()
    hook = "lightning_modules.callbacks.step_seed.StepSeed.on_train_batch_start"
    monkeypatch.setattr(hook, lambda *_, **__: None)
    assert call("fit", "--resume", str(other)).code == 0
    with pytest.raises(AssertionError):
        assert_same_weights(reference, other)


def test_changed_setting_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win over the saved configuration, and the checkpoint over neither."""
    monkeypatch.chdir(tmp_path)
    run = fit(tmp_path, "--model.lr", "0.01", "--trainer.max_epochs", "1")
    outcome = call("fit", "--resume", str(run), "--model.lr", "0.5", "--trainer.max_epochs", "2")
    assert outcome.code == 0, outcome.err
    assert "lr=0.5 is in the configuration, but the optimiser state" in outcome.err
    assert "lr: 0.5" in (run / "config.yaml").read_text()
    assert "lr: 0.01" in (run / "config.before-1.yaml").read_text()
    assert [int(row["step"]) for row in rows(run)] == sorted(int(r["step"]) for r in rows(run))
