"""The test of a segmentation as a table, class by class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.metrics.segmentation_scores import segmentation_scores
from lightning_modules.point_segmentation import PointSegmentation
from lightning_modules.segmentation_results import (
    SegmentationResult,
    plain_scores,
    result_table,
    write_result,
)

# What a run's directory adds to its name: seeds of one arm differ in nothing else.
_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")


class SegmentationTable(Callback):
    """Prints the IoU of every class after ``test`` and writes it into the run directory.

    The files are segmentation.json, which `lightning_modules.probe_table` reads, and
    segmentation.txt; of another split than test its name is in theirs.
    """

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write.

        Raises:
            TypeError: If the module is not `PointSegmentation`.
        """
        if not isinstance(pl_module, PointSegmentation):
            raise TypeError(
                f"{type(pl_module).__name__}: SegmentationTable needs PointSegmentation"
            )
        confusion = pl_module.matrix("test").compute()  # of all ranks, so that all must ask
        if not trainer.is_global_zero or is_trial(trainer):
            return
        data = cast("Any", trainer).datamodule
        run = Path(trainer.default_root_dir)
        options = pl_module.hparams
        result = SegmentationResult(
            label=options["label"] or _STAMP.sub("", run.name),
            seed=options["seed"],
            mode=options["mode"],
            source=data.source_name,
            split=data.test_name,
            clouds=len(cast("Any", trainer.test_dataloaders).dataset),
            class_names=data.class_names,
            **plain_scores(segmentation_scores(confusion)),
        )
        Console().print(result_table(result))
        file = write_result(result, run)
        Console().print(f"{'table':<16} {file}", soft_wrap=True, highlight=False, markup=False)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                rows = [
                    list(row)
                    for row in zip(result.class_names, result.iou, result.acc, strict=True)
                ]
                logger.log_table("test/classes", columns=["class", "iou", "acc"], data=rows)
