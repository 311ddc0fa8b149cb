"""What a token selector saves and costs in time, measured at the end of a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.metrics.reduction_latency import (
    ConsumerShape,
    LatencyRow,
    measure_latency,
)
from lightning_modules.text_files import table_text, write_text
from lightning_modules.token_reduction import TokenReduction

_WIDTH = 110


class ReductionLatency(Callback):
    """Times encoder, selector, gather and a consumer on one batch of ``test``, on its device.

    Prints a table and writes it to ``<run>/reduction/latency.json`` and ``.txt``. Only the first
    process measures.

    Args:
        shares: Retained shares.
        consumer: A transformer with random weights that reads the kept tokens.
        images: Images of the batch, as far as the first test batch has them.
        repeats: Timed turns of which the median counts.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        shares: tuple[float, ...] = (0.1, 0.3, 0.5, 1.0),
        consumer: ConsumerShape = ConsumerShape(),  # noqa: B008 - frozen
        images: int = 16,
        repeats: int = 5,
    ) -> None:
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares={shares}: must be shares in (0, 1]")
        for name, value in (("images", images), ("repeats", repeats)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be >= 1")
        self.shares, self.consumer = tuple(shares), consumer
        self.images, self.repeats = images, repeats
        self._batch: Tensor | None = None

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401 - whatever the data module yields
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the images that are timed."""
        if not batch_idx and not dataloader_idx:
            self._batch = batch["image"][: self.images]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, print and write."""
        batch, self._batch = self._batch, None
        if not isinstance(pl_module, TokenReduction) or is_trial(trainer) or batch is None:
            return
        if not trainer.is_global_zero:
            return
        images, module = batch, pl_module

        def encode() -> Tensor:
            tokens: Tensor = module.encoder(images).tokens
            return tokens

        with trainer.precision_plugin.forward_context():
            rows = measure_latency(encode, module.reducer, self.consumer, self.shares, self.repeats)
        self._report(trainer, rows, images.device)

    def _report(self, trainer: Trainer, rows: Sequence[LatencyRow], device: torch.device) -> None:
        title = f"one image in a batch of {self.images}, {trainer.precision}, {device.type}"
        table = latency_table(rows, title, self.consumer)
        Console(width=max(Console().width, _WIDTH)).print(table)
        folder = Path(trainer.default_root_dir) / "reduction"
        content = {
            "device": device.type,
            "precision": str(trainer.precision),
            "threads": torch.get_num_threads(),
            "consumer": asdict(self.consumer),
            "rows": [asdict(row) for row in rows],
        }
        write_text(folder / "latency.json", json.dumps(content, indent=1) + "\n")
        write_text(folder / "latency.txt", table_text(table, _WIDTH))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                columns = list(asdict(rows[0]))
                cells = [list(asdict(row).values()) for row in rows]
                logger.log_table("test/latency", columns=columns, data=cells)


def latency_table(rows: Sequence[LatencyRow], title: str, consumer: ConsumerShape) -> Table:
    """Table for the terminal; shares of a part stand together."""
    caption = (
        f"consumer: {consumer.layers} blocks of {consumer.width}, random weights; the speed-up is "
        "that of its reading, selector and gather included"
    )
    table = Table(title=title, caption=caption)
    table.add_column("part")
    for heading in ("share", "tokens", "ms", "GFLOP", "speed-up"):
        table.add_column(heading, justify="right")
    order = ("encoder", "selector", "gather", "consumer", "selector to consumer")
    before = None
    for row in sorted(rows, key=lambda row: (order.index(row.part), row.share)):
        if before not in (None, row.part):
            table.add_section()
        before = row.part
        gain = "–" if row.speed_up is None else f"{row.speed_up:.2f}"
        numbers = (f"{row.share:g}", str(row.tokens), f"{row.milliseconds:.3f}")
        table.add_row(row.part, *numbers, f"{row.gflop:.3f}" if row.gflop else "–", gain)
    return table
