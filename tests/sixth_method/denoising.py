"""A method that the product does not know: everything it needs lies in its own new files."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from datamodules.imagenet import ImageBatch
from lightning_modules.optimizers import adamw_warmup_cosine
from lightning_modules.randomness import EVALUATION, NOISE, device_generator
from tests.sixth_method.network import Denoiser


class Denoising(LightningModule):
    """Learns to take Gaussian noise off images.

    Args:
        width: Hidden units of the network.
        noise: Standard deviation of the noise; pixels are in [-1, 1].
        lr: Highest learning rate.
        image_size: Side of the images in pixels (taken from the data).
        channels: Colour channels (taken from the data).
        seed: Key of the noise (taken from seed_everything).
    """

    def __init__(
        self,
        width: int = 32,
        noise: float = 0.3,
        lr: float = 1e-2,
        image_size: int = 8,
        channels: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.denoiser = Denoiser(channels * image_size**2, width)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the squared error per pixel."""
        loss = self._error(batch, NOISE, self.current_epoch, batch_idx)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Log the squared error per pixel under noise that is the same in every validation."""
        self.log("val/loss", self._error(batch, EVALUATION, 0, batch_idx))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Log the squared error per pixel."""
        self.log("test/loss", self._error(batch, EVALUATION, 1, batch_idx))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, its rate falling by half a cosine."""
        return adamw_warmup_cosine(self, self.denoiser, self.hparams["lr"], 0.0, 1, 0.01, 0.95)

    def _error(self, batch: ImageBatch, stream: int, epoch: int, number: int) -> Tensor:
        key = (stream, self.hparams["seed"], epoch, number, self.global_rank)
        image = batch["image"]
        noise = torch.randn(
            image.shape, generator=device_generator(image.device, *key), device=image.device
        )
        restored = self.denoiser(image + self.hparams["noise"] * noise)
        return (restored - image).square().mean()
