"""What a run's Weights & Biases loggers are given."""

from __future__ import annotations

import os
from collections.abc import Iterable

from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_modules.cli.run_directory import RunDirectory, is_zero_rank


def place_loggers(trainer: Namespace, run: RunDirectory) -> None:
    """Let Weights & Biases write into the run directory and go on with the run it began.

    Args:
        trainer: Section of the configuration; the arguments of its loggers are completed.
        run: The run of this call.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        if not isinstance(logger, Namespace) or not logger.class_path.endswith("WandbLogger"):
            continue
        # W&B's service may have been started, by an earlier run of this process, in another folder.
        folder = str(run.path.absolute())
        own = {"save_dir": folder, "name": run.path.name, "project": "quintet"}
        if is_zero_rank():
            own["id"] = run.wandb_id
        if logger.init_args.get("offline"):
            os.environ.setdefault("WANDB_SILENT", "true")  # its farewell would bury the summary
        for name, value in own.items():
            if logger.init_args.get(name) in (None, "."):
                logger.init_args[name] = value


def leave_out_unset(loggers: Iterable[Logger]) -> None:
    """Do not hand W&B the setting ``anonymous`` where the user has not made it.

    Lightning 2.6 always does, as None, and W&B then warns that it has no effect.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
            logger._wandb_init.pop("anonymous", None)
