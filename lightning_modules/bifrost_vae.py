"""Training of the demo's autoencoder, in whose latents the demo's FLUX works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.readers.protocol import Split
from datamodules.text_image.batch import TextImageBatch
from datamodules.text_image.resident_pairs import PairPositions
from lightning_modules.bifrost_foundation_options import (
    SPLITS,
    FoundationOptimisation,
    FoundationPart,
    Recipe,
    gallery_rows,
    rebuilt,
    resident_data,
    training_recipe,
)
from lightning_modules.logging_steps import is_log_step
from lightning_modules.metrics.image_quality import psnr
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import NOISE, device_generator
from lightning_modules.resident_pictures import ResidentPictures
from models.bifrost.demo_foundation_files import VAE
from models.bifrost.demo_foundations import (
    VaeShape,
    autoencoding_loss,
    build_vae,
    standardised,
)
from models.bifrost.flux_latents import image_grid

_PIECE = 128


class BifrostVae(LightningModule):
    """diffusers' AutoencoderKL at toy size: absolute and squared error, and a little divergence.

    Logs ``train/loss``, ``train/psnr`` and ``train/divergence``; in validation ``val/psnr`` of
    held-out pictures. Shift and scale of the latents are measured when training ends.

    Args:
        shape: Sizes.
        divergence_weight: Factor of the divergence from the standard normal.
        optimisation: Optimiser and schedule.
        shift: Training pictures are moved by up to this many pixels.
        image_size: Side of the images in pixels (taken from the data).
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If the images are no whole number of packed tokens.
    """

    def __init__(
        self,
        shape: VaeShape = VaeShape(channels=(16, 32, 64), latent_channels=8),  # noqa: B008
        divergence_weight: float = 1e-4,
        optimisation: FoundationOptimisation = FoundationOptimisation(),  # noqa: B008 - frozen
        shift: int = 4,
        image_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = rebuilt(VaeShape, shape)
        self.optimisation = rebuilt(FoundationOptimisation, optimisation)
        if shift < 0:
            raise ValueError(f"shift={shift}: must be >= 0 (model.shift)")
        self.save_hyperparameters(logger=False)
        self.hparams.update(shape=asdict(self.shape), optimisation=asdict(self.optimisation))
        self.vae = build_vae(self.shape)
        rows, columns = image_grid(self.vae, (image_size, image_size))
        self._latent_shape = (self.shape.latent_channels, 2 * rows, 2 * columns)
        self.val_psnr = MeanMetric()

    def on_fit_start(self) -> None:
        """Put the training pictures where the module is."""
        self._pictures = ResidentPictures(resident_data(self).whole("train").pixels, self.device)

    def training_step(self, batch: PairPositions, batch_idx: int) -> Tensor:
        """The autoencoder's loss of one batch."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        index = batch["index"]
        images = self._pictures.take_shifted(index, self.hparams["shift"], generator)
        noise = torch.randn(
            (len(index), *self._latent_shape), generator=generator, device=self.device
        )
        loss = autoencoding_loss(self.vae, images, noise, self.hparams["divergence_weight"])
        if is_log_step(self.trainer):
            self.log("train/loss", loss.total, prog_bar=True)
            decibels = 10 * (4 / loss.squared.detach()).log10()
            self.log_dict({"train/psnr": decibels, "train/divergence": loss.divergence.detach()})
        return loss.total

    def validation_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """PSNR of pictures that were not trained on."""
        self._evaluate("val", batch)

    def test_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: Literal["val", "test"], batch: TextImageBatch) -> None:
        self.val_psnr.update(_quality(self.restore(batch["image"]), batch["image"]))
        self.log(f"{stage}/psnr", self.val_psnr, prog_bar=True)

    @torch.no_grad()
    def restore(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) from the means of their latents, clipped to [-1, 1]."""
        latents = self.vae.encode(images).latent_dist.mean
        restored: Tensor = self.vae.decode(latents).sample
        return restored.float().clamp(-1, 1)

    def figures(self) -> dict[str, float]:
        """PSNR over the whole splits, and how far the channels' deviations lie apart."""
        found = {}
        for name, split in SPLITS.items():
            quality = [_quality(self.restore(images), images) for images in self._images(split)]
            found[f"{name}_psnr"] = float(torch.cat(quality).mean())
        deviations = self._latents().std((0, 2, 3))  # (C,)
        found["least_channel_std"] = float(deviations.min())
        found["largest_channel_std"] = float(deviations.max())
        return found

    def _images(self, split: Split) -> Iterator[Tensor]:
        """All pictures of a split, in parts."""
        pictures = ResidentPictures(resident_data(self).whole(split).pixels, self.device)
        return (pictures.take(index) for index in pictures.pieces(_PIECE))

    @torch.no_grad()
    def _latents(self) -> Tensor:
        """Means of the latents (M, C, h, w) of the training pictures."""
        posteriors = (self.vae.encode(images).latent_dist for images in self._images("train"))
        return torch.cat([posterior.mean.float() for posterior in posteriors])

    def parts(self) -> list[FoundationPart]:
        """The autoencoder, with shift and scale of the training pictures' latents."""
        return [FoundationPart(VAE, self.vae, standardised(self.shape, self._latents()))]

    def recipe(self) -> Recipe:
        """How it was trained."""
        return training_recipe(self, self.optimisation) | {
            "loss": f"L1 + MSE + {self.hparams['divergence_weight']} divergence",
            "shift": int(self.hparams["shift"]),
        }

    def save_texts(self, folder: Path) -> None:
        """Nothing: there is no text."""

    def draw(self) -> list[tuple[str, Tensor]]:
        """Rows of pictures, and beneath them their restorations."""
        return gallery_rows(self, "restored", self.restore)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; warm-up and cosine to zero by optimiser step."""
        options = self.optimisation
        return warmup_cosine_steps(self, self._groups(), options.warmup_steps, options.beta2)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.optimisation
        return parameter_groups(self.named_parameters(), options.lr, options.weight_decay)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win over those stored with the schedule."""
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])


def _quality(restored: Tensor, images: Tensor) -> Tensor:
    """PSNR (B,) of pictures in [-1, 1]."""
    return psnr(restored / 2 + 0.5, images / 2 + 0.5)
