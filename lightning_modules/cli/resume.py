"""Which run and which checkpoint a call goes on with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_modules.callbacks.run_record import ORIGIN_KEY, class_path
from lightning_modules.cli.checkpoint_files import (
    newest_good_checkpoint,
    read_checkpoint,
    remove_partial_files,
)
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.cli.invocation import Invocation
from lightning_modules.cli.run_directory import (
    RunDirectory,
    announce,
    is_zero_rank,
    newest_run,
    start_run,
)

_MOST_KEYS = 3


def choose_run(
    invocation: Invocation, *, runs_dir: Path, method: str, name: str, ckpt_path: str | None
) -> RunDirectory:
    """Open the run to go on with, or start a new one.

    Args:
        invocation: Has the directory given with ``--resume``.
        runs_dir: Parent of all runs.
        method: Folder below it.
        name: First part of a new run's name.
        ckpt_path: ``last`` without ``--resume`` stands for the newest run of this name.

    Raises:
        CheckpointError: If there is no such run and the subcommand needs one.
        ConfigError: If the directory cannot be created.
    """
    existing = invocation.resume
    if existing is None and ckpt_path == "last":
        existing = newest_run(runs_dir, method, name)
        if existing is None and invocation.subcommand != "fit":
            raise CheckpointError(
                f"--ckpt_path last: no run {runs_dir / method / name}-* to load from"
            )
    if existing is None:
        return start_run(runs_dir, method, name)
    run = RunDirectory(existing, is_new=False)
    announce(run)
    return run


def choose_checkpoint(run: RunDirectory, ckpt_path: str | None, subcommand: str) -> str | None:
    """Choose the checkpoint to load and check that it is whole.

    Args:
        run: The run of this call.
        ckpt_path: A path; ``last`` or None for the newest good one of the run; ``best`` for the
            one that a ModelCheckpoint of the run holds to be the best.
        subcommand: Everything but ``fit`` needs a checkpoint when it goes on with a run.

    Returns:
        A path, or None to start from the initial weights.

    Raises:
        CheckpointError: If a checkpoint is needed and there is no good one.
    """
    if ckpt_path not in (None, "last", "best"):
        if "://" not in str(ckpt_path):
            read_checkpoint(Path(str(ckpt_path)))
        return str(ckpt_path)
    if run.is_new and ckpt_path != "best":
        return None
    if is_zero_rank() and subcommand == "fit":
        remove_partial_files(run.checkpoints)
    folders = [run.checkpoints, run.path]  # Lightning puts those of requeued SLURM jobs in the run
    newest, damaged = newest_good_checkpoint(folders, for_training=subcommand == "fit")
    if newest is None and (damaged or subcommand != "fit"):
        reason = "; ".join(damaged) or "it has none yet"
        raise CheckpointError(f"{run.checkpoints}: no good checkpoint: {reason}")
    if damaged and is_zero_rank():
        print(f"{'; '.join(damaged)}: using {newest}", file=sys.stderr)
    if newest is None or ckpt_path != "best":
        return None if newest is None else str(newest)
    return _best_model(newest)


def check_fit(ckpt_path: str, model: LightningModule) -> None:
    """Check that a checkpoint was made by the configured model.

    Raises:
        CheckpointError: If it belongs to another class or has parameters of other shapes.
    """
    checkpoint = read_checkpoint(Path(ckpt_path))
    origin = checkpoint.get(ORIGIN_KEY, {}).get("model")
    origin = origin or checkpoint.get("hyper_parameters", {}).get("_class_path")
    saved: dict[str, Any] = checkpoint["state_dict"]
    own = model.state_dict()
    if origin is not None and origin != class_path(model):
        raise CheckpointError(
            f"{ckpt_path}: checkpoint of {origin}, config builds {class_path(model)}"
        )
    if own and saved and not own.keys() & saved.keys():
        examples = ", ".join(list(saved)[:_MOST_KEYS])
        raise CheckpointError(
            f"{ckpt_path}: none of its weights ({examples}, ...) is in {class_path(model)}"
        )
    wrong = [k for k in own.keys() & saved.keys() if _shape(own[k]) != _shape(saved[k])]
    if wrong:
        first = min(wrong)
        raise CheckpointError(
            f"{ckpt_path}: {first} has shape {_shape(saved[first])}, the configured model needs "
            f"{_shape(own[first])} ({len(wrong)} differ); use the configuration it was trained with"
        )
    _warn_of_kept_settings(checkpoint, model)


def _best_model(newest: Path) -> str:
    states = read_checkpoint(newest).get("callbacks", {})
    paths = [state.get("best_model_path") for state in states.values() if isinstance(state, dict)]
    best = next((path for path in paths if path), None)
    if best is None:
        raise CheckpointError(f"--ckpt_path best: {newest} knows no ModelCheckpoint with a monitor")
    if not Path(best).exists():
        best = str(newest.with_name(Path(best).name))
    read_checkpoint(Path(best))
    return best


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _warn_of_kept_settings(checkpoint: dict[str, Any], model: LightningModule) -> None:
    """Say which changed settings have no effect because the optimiser's state is restored."""
    saved = checkpoint.get("hyper_parameters", {})
    for name in ("lr", "learning_rate", "weight_decay", "betas"):
        if name in saved and name in model.hparams and saved[name] != model.hparams[name]:
            print(
                f"{name}={model.hparams[name]} is in the configuration, but the optimiser state of "
                f"the checkpoint goes on with {saved[name]}",
                file=sys.stderr,
            )
