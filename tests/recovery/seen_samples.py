"""Keeps a record of the samples that every process has trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer


class Seen(NamedTuple):
    """One training batch on one process.

    Attributes:
        epoch: Number of the epoch, from 0.
        batch: Number of the batch in its epoch, as Lightning counts.
        step: Optimiser steps done with it.
        indices: Its samples.
    """

    epoch: int
    batch: int
    step: int
    indices: list[int]


class SeenSamples(Callback):
    """Writes one line a batch into ``seen-<rank>.jsonl`` in the working directory."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Write the line."""
        seen = Seen(trainer.current_epoch, batch_idx, trainer.global_step, batch["index"].tolist())
        with Path(f"seen-{trainer.global_rank}.jsonl").open("a") as stream:
            stream.write(json.dumps(seen) + "\n")


def read_seen(folder: Path) -> list[Seen]:
    """All batches of all processes, in the order of steps."""
    lines = [line for file in folder.glob("seen-*.jsonl") for line in file.read_text().splitlines()]
    return sorted((Seen(*json.loads(line)) for line in lines), key=lambda seen: seen.step)
