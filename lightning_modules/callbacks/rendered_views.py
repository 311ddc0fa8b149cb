"""Pictures of rendered views beside the truth, while a model trains and when it is tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from datamodules.multiview.batch import MultiviewBatch
from lightning_modules.callbacks.run_checkpoint import is_training_validation, is_trial
from lightning_modules.clift import Clift
from lightning_modules.pictures import draw_grid, write_png
from models.clift.clift import SceneTokens


class RenderedViews(Callback):
    """Writes ``<run>/pictures/views-step000123.png`` and sends it to W&B.

    A row is a scene: its context views, a true target view, and that view rendered from all tokens
    and at each budget, in the way the stage keeps tokens. Scenes are those of the first batch.

    Args:
        shares: Stored tokens as shares of all.
        scenes: Most rows.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, shares: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625), scenes: int = 8
    ) -> None:
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(f"shares={shares}: must be shares in (0, 1]")
        if scenes < 1:
            raise ValueError(f"scenes={scenes}: must be >= 1")
        self.shares, self.scenes = tuple(shares), scenes

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch of every validation of training."""
        if not batch_idx and is_training_validation(trainer):
            self._draw(trainer, pl_module, batch, f"step{trainer.global_step:06d}")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch of the test."""
        if not batch_idx:
            self._draw(trainer, pl_module, batch, "test")

    def _draw(
        self, trainer: Trainer, pl_module: LightningModule, batch: MultiviewBatch, occasion: str
    ) -> None:
        if not isinstance(pl_module, Clift):
            raise TypeError(f"{type(pl_module).__name__}: RenderedViews draws CLiFT only")
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            rendered = self._render(pl_module, batch)  # one (B, 3, H, W) for each column
        if not trainer.is_global_zero or is_trial(trainer):
            return
        context, truth = batch["context"]["image"], batch["target"]["image"][:, 0]
        names = [f"view {view + 1}" for view in range(context.shape[1])] + ["truth"]
        columns = torch.cat([context, torch.stack([truth, *rendered.values()], 1)], 1)
        rows = [("", scene) for scene in columns[: self.scenes].float().cpu() * 2 - 1]
        picture = draw_grid(rows, columns=[*names, *rendered])
        run = Path(trainer.default_root_dir)
        write_png(picture, run / "pictures" / f"views-{occasion}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                stage = "test" if trainer.testing else "val"
                logger.log_image(f"{stage}/views", [picture], step=trainer.global_step)

    def _render(self, module: Clift, batch: MultiviewBatch) -> dict[str, Tensor]:
        encoded = module.encode(batch)
        total = encoded.tokens.shape[1]
        stored = {f"{total}": SceneTokens(*encoded)}
        for share in self.shares:
            generator = module.evaluation_generator(int(batch["index"][0]))
            kept = module.store(encoded, module.usual_storage, share, generator)
            stored[f"{int(kept.valid.sum(1).max())}"] = kept
        pictures = {}
        for name, scene in stored.items():
            pictures[name] = module.render(module.remember(scene), batch["target"])[:, 0]
        return pictures
