"""What the ranks of a distributed training saw, kept for a test to compare."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class KeepStep(Callback):
    """Writes what each rank saw, and rank 0's gradients before clipping."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        torch.save(batch, self.folder / f"batch{trainer.global_rank}.pt")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.requires_grad}
            torch.save(gradients, self.folder / "gradients.pt")
            torch.save(pl_module.state_dict(), self.folder / "weights.pt")
