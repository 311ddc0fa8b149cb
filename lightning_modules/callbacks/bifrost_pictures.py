"""Pictures that a latent ControlNet draws while it trains, beside the true ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_modules.bifrost_controlnet import BifrostControlNet
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.callbacks.validation_rhythm import ValidationRhythm
from lightning_modules.pictures import draw_grid, shortened, write_png


class BifrostPictures(ValidationRhythm):
    """Writes ``<run>/pictures/bifrost-step000123.png`` and sends it to W&B.

    A row is a caption with its picture: the truth, from its true latents, from latents that the
    branch generates of the caption (if there is a branch), and by FLUX from the caption alone.
    Noise is the same every time.

    Args:
        train_pictures: Rows of training captions.
        test_pictures: Rows of captions that were held out.
        every_n_validations: Draw at every n-th validation of training; 0 draws at the test only.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, train_pictures: int = 6, test_pictures: int = 6, every_n_validations: int = 1
    ) -> None:
        super().__init__(every_n_validations)
        counts = {"train_pictures": train_pictures, "test_pictures": test_pictures}
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"{name}={value}: must be >= 0")
        if not train_pictures + test_pictures:
            raise ValueError("train_pictures=0, test_pictures=0: at least one must be > 0")
        self.train_pictures, self.test_pictures = train_pictures, test_pictures

    def draw(self, trainer: Trainer, pl_module: LightningModule, occasion: str) -> None:
        """Draw ``bifrost-<occasion>.png``, on the first rank."""
        if not isinstance(pl_module, BifrostControlNet):
            raise TypeError(
                f"{type(pl_module).__name__}: BifrostPictures draws BifrostControlNet only"
            )
        if not trainer.is_global_zero or is_trial(trainer):
            return
        rows: list[tuple[str, Tensor]] = []
        with trainer.precision_plugin.forward_context():
            if self.train_pictures:
                rows += _rows(trainer, pl_module, "train", self.train_pictures)
            if self.test_pictures:
                rows += _rows(trainer, pl_module, "test", self.test_pictures)
        columns = ["truth", "true latents", "generated", "text alone"]
        if pl_module.generator is None:
            columns.remove("generated")
        picture = draw_grid(rows, columns=columns, scale=max(1, -(-96 // rows[0][1].shape[-1])))
        name = f"bifrost-{occasion}.png"
        write_png(picture, Path(trainer.default_root_dir) / "pictures" / name)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                stage = "test" if trainer.testing else "val"
                logger.log_image(f"{stage}/pictures", [picture], step=trainer.global_step)


@torch.no_grad()
def _rows(
    trainer: Trainer, module: BifrostControlNet, split: Literal["train", "test"], count: int
) -> list[tuple[str, Tensor]]:
    """Captions of a split, each with its pictures (columns, 3, H, W)."""
    data = cast("Any", trainer).datamodule
    batch = module.transfer_batch_to_device(data.gallery(split, count), module.device, 0)
    captions = batch["caption_full"]
    keys = [(number,) for number in batch["index"].tolist()]
    conditions: list[Tensor | None] = [module.foundation.latents(batch["image"])]
    if module.generator is not None:
        conditions.append(module.generator.generate(captions, keys, module.decoding))
    conditions.append(None)
    drawn = [module.drawing.paint(captions, latents, keys) for latents in conditions]
    columns = torch.stack([batch["image"], *drawn], 1).float().cpu()  # (B, columns, 3, H, W)
    mark = "" if split == "train" else " (held out)"
    names = [shortened(caption) + mark for caption in captions]
    return list(zip(names, columns, strict=True))
