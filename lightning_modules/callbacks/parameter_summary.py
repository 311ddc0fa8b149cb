"""What is trained, in a few lines before the first step."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table
from torch import nn


class ParameterSummary(ModelSummary):
    """Parameters of each part of the module, and how many of them are trained.

    Parts without parameters, such as metrics, are left out; weights that are kept out of the
    module, such as those of frozen foundations, are not counted.
    """

    def __init__(self) -> None:
        super().__init__(max_depth=1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table on the first process."""
        if not trainer.is_global_zero:
            return
        table = Table("part", "class")
        table.add_column("parameters", justify="right")
        table.add_column("trained", justify="right")
        for name, part in pl_module.named_children():
            if any(True for _ in part.parameters()):
                table.add_row(name, type(part).__name__, *_counts(part))
        if table.row_count > 1:
            table.add_section()
            table.add_row("all", "", *_counts(pl_module))
        Console().print(table)


def _counts(part: nn.Module) -> tuple[str, str]:
    every = sum(p.numel() for p in part.parameters())
    trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
    return f"{every:,}", f"{trained:,}"
