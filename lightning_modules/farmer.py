"""Training of FARMER: likelihood of noisy pixels, bits per dimension, class-conditional samples."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric, Metric

from datamodules.imagenet import ImageBatch
from datamodules.sample_requests import SampleRequest
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import adamw_warmup_cosine, keep_configured_rates
from lightning_modules.randomness import EVALUATION, NOISE, SAMPLES, device_generator
from lightning_modules.schedules import cosine
from models.farmer.affine_block import FlowShape, InverseOptions
from models.farmer.checkpoint import load_tarflow, read_tarflow
from models.farmer.dequantization import (
    LevelStretch,
    bits_per_dim,
    count_levels,
    dequantize,
    requantize,
)
from models.farmer.farmer import Farmer as FarmerNetwork
from models.farmer.farmer import Likelihood
from models.farmer.guidance import UNGUIDED, Guidance
from models.farmer.prior import PriorShape
from models.farmer.sharding import shard_farmer


class Farmer(LightningModule):
    """FARMER (arXiv 2510.23588): flow and autoregressive prior, trained jointly by likelihood.

    Logs ``train/loss`` in nats per dimension at the current noise level, ``val/bits_per_dim``
    with uniform dequantisation and no other noise, and ``val/noisy_nats`` at the final noise
    level. The last two are different quantities and must not be compared.

    Args:
        flow: Size and options of the flow.
        prior: Size and options of the autoregressive prior.
        patch_size: Side of a patch in pixels; must divide the image size.
        informative_channels: Channels of a token modelled one by one by the prior.
        image_size: Side of the images in pixels (taken from the data).
        channels: Colour channels (taken from the data).
        levels: Grey levels of the data (taken from the data).
        num_classes: Number of classes (taken from the data).
        uniform_dequantization: Spread every grey level over its bin. False trains on Gaussian
            noise alone, as the paper does.
        level_stretch: Strength of the histogram stretch in [0, 1), see `LevelStretch`; 0 is off.
        noise_start: Standard deviation of the Gaussian noise at step 0.
        noise_end: Standard deviation of the Gaussian noise at the end.
        noise_share: Share of the training over which the noise falls, in (0, 1].
        prior_noise: Largest standard deviation of noise on the prior's input; per image uniform
            in [0, prior_noise] (0.3 in JetFormer, not mentioned by the paper).
        label_dropout: Share of images trained without their class, for guidance.
        lr: Highest learning rate.
        min_lr: Learning rate at both ends of the schedule.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        weight_decay: AdamW's weight decay on matrices; vectors have none.
        beta2: AdamW's second momentum coefficient.
        muon_lr: Highest rate of Muon on the transformers' matrices (ours; fewer steps at
            demo scale); null trains them by AdamW, as the paper does.
        guidance: How samples are drawn in validation, test and predict.
        inverse_chunk: Tokens inverted together by Jacobi iteration; 1 is the exact sequential
            inverse of the flow.
        redundant_scale: Multiplies the redundant channels' deviation from their mean in samples;
            0 keeps structure and drops texture (figure 7 of the paper).
        tweedie: Denoise samples by one step along the score, at the final noise level.
        evaluation_draws: Draws of the dequantisation noise averaged for each evaluated image.
        tarflow: Official TarFlow state dict for the flow of a new run.
        compile: Compile the networks with `torch.compile`.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
        seed: Key of all noise drawn here (taken from seed_everything).
    """

    def __init__(
        self,
        flow: FlowShape,
        prior: PriorShape,
        patch_size: int,
        informative_channels: int,
        image_size: int = 256,
        channels: int = 3,
        levels: int = 256,
        num_classes: int = 1000,
        uniform_dequantization: bool = True,
        level_stretch: float = 0.0,
        noise_start: float = 0.1,
        noise_end: float = 0.005,
        noise_share: float = 1.0,
        prior_noise: float = 0.0,
        label_dropout: float = 0.1,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        warmup_steps: int = 5000,
        weight_decay: float = 0.03,
        beta2: float = 0.95,
        muon_lr: float | None = None,
        guidance: Guidance = UNGUIDED,
        inverse_chunk: int = 1,
        redundant_scale: float = 1.0,
        tweedie: bool = False,
        evaluation_draws: int = 1,
        tarflow: Path | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A checkpoint hands the shapes back as plain dictionaries.
        flow = FlowShape(**flow) if isinstance(flow, dict) else flow
        prior = PriorShape(**prior) if isinstance(prior, dict) else prior
        guidance = Guidance(**guidance) if isinstance(guidance, dict) else guidance
        self.save_hyperparameters(logger=False)
        self.hparams["tarflow"] = str(tarflow) if tarflow else None
        self.hparams.update(flow=asdict(flow), prior=asdict(prior), guidance=asdict(guidance))
        self.guidance = guidance
        self.network = FarmerNetwork(
            image_size,
            channels,
            num_classes,
            patch_size,
            informative_channels,
            flow,
            prior,
            activation_checkpointing,
        )
        self.stretch = LevelStretch(levels, level_stretch)
        self.dims = channels * image_size**2
        self.val_bits = MeanMetric()
        self.val_noisy = MeanMetric()
        self.test_bits = MeanMetric()

    def configure_model(self) -> None:
        """Read foreign weights, shard under FSDP2 and compile, each if asked for."""
        if self.hparams["tarflow"] and not self.trainer.ckpt_path:
            load_tarflow(self.network.flow, read_tarflow(Path(self.hparams["tarflow"])))
        if self.device_mesh is not None:
            shard_farmer(self.network, self.device_mesh["data_parallel"])
        if self.hparams["compile"]:
            self.network.flow.compile()
            self.network.prior.compile()

    def on_fit_start(self) -> None:
        """Fit the level stretch to the training pixels, unless a checkpoint brought it."""
        if self.stretch.strength and not self.stretch.fitted:
            loader = self.trainer.datamodule.train_eval_dataloader()  # type: ignore[attr-defined]
            counts = count_levels((batch["image"] for batch in loader), self.hparams["levels"])
            # Every rank has counted its own share of the images.
            total = self.trainer.strategy.reduce(counts.to(self.device), reduce_op="sum")
            self.stretch.fit(torch.as_tensor(total))

    @property
    def noise_sigma(self) -> float:
        """Standard deviation of the noise at this optimiser step."""
        total = int(self.hparams["noise_share"] * self.trainer.estimated_stepping_batches)
        start, end = self.hparams["noise_start"], self.hparams["noise_end"]
        return cosine(self.trainer.global_step, total, start, end)

    def continuous(
        self, images: Tensor, sigma: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Make images continuous: uniform noise, level stretch, Gaussian noise.

        Args:
            images: (B, C, H, W) in [-1, 1].
            sigma: Standard deviation of the Gaussian noise, added after the stretch.
            generator: Source of the noise.

        Returns:
            (B, C, H, W) what the network sees, and the stretch's log-determinant (B,).
        """
        values = images
        if self.hparams["uniform_dequantization"] or not self.training:
            uniform = torch.empty_like(images).uniform_(generator=generator)
            values = dequantize(images, self.hparams["levels"], uniform)
        values, log_det = self.stretch(values)
        if sigma:
            values = values + sigma * torch.empty_like(values).normal_(generator=generator)
        return values, log_det

    def likelihood(
        self, images: Tensor, labels: Tensor, sigma: float, generator: torch.Generator
    ) -> Likelihood:
        """Log-likelihood in nats of images made continuous, see `continuous`.

        Args:
            images: (B, C, H, W) in [-1, 1].
            labels: (B,) classes, -1 for none.
            sigma: Standard deviation of the Gaussian noise.
            generator: Source of the noise.
        """
        values, log_det = self.continuous(images, sigma, generator)
        largest = self.hparams["prior_noise"] if self.training else 0.0
        noise = self.network.prior.input_noise(values, largest, generator) if largest else None
        result: Likelihood = self.network(values, labels, noise)
        return result._replace(total=result.total + log_det, log_det=result.log_det + log_det)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Negative log-likelihood in nats per dimension (equation 14)."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        labels = batch["label"]
        chance = torch.empty(labels.shape, device=self.device).uniform_(generator=generator)
        labels = torch.where(chance < self.hparams["label_dropout"], -1, labels)
        sigma = self.noise_sigma
        parts = self.likelihood(batch["image"], labels, sigma, generator)
        terms = {
            "loss": -parts.total.mean() / self.dims,
            "informative_nats": -parts.informative.mean().detach() / self.dims,
            "redundant_nats": -parts.redundant.mean().detach() / self.dims,
            "log_det_nats": -parts.log_det.mean().detach() / self.dims,
        }
        if is_log_step(self.trainer):
            self.log("train/loss", terms["loss"], prog_bar=True)
            logged: dict[str, Metric | Tensor | int | float] = {
                f"train/{name}": value for name, value in terms.items() if name != "loss"
            }
            logged |= {"train/max_log_scale": parts.max_log_scale, "train/noise_sigma": sigma}
            self.log_dict(logged)
        return terms

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Bits per dimension, and noisy nats per dimension at the final noise level."""
        self._update_bits(self.val_bits, batch, batch_idx)
        self.log("val/bits_per_dim", self.val_bits, prog_bar=True)
        if self.hparams["noise_end"]:
            generator = self._evaluation_generator(batch_idx, -1)
            parts = self.likelihood(
                batch["image"], batch["label"], self.hparams["noise_end"], generator
            )
            self.val_noisy.update(-parts.total / self.dims)
            self.log("val/noisy_nats", self.val_noisy)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Bits per dimension of the test images."""
        self._update_bits(self.test_bits, batch, batch_idx)
        self.log("test/bits_per_dim", self.test_bits)

    def predict_step(self, batch: SampleRequest, batch_idx: int) -> dict[str, Tensor]:
        """Draw the requested samples: image (B, C, H, W) in [-1, 1], label and index (B,)."""
        key = int(batch["index"][0]) if len(batch["index"]) else 0
        images = self.draw_samples(batch["label"], key)
        return {"image": images, "label": batch["label"], "index": batch["index"]}

    @torch.no_grad()
    def draw_samples(self, labels: Tensor, seed: int, scale: float | None = None) -> Tensor:
        """Draw one image per label.

        Args:
            labels: (B,) int64 classes.
            seed: Key of the randomness beside the run's own seed.
            scale: Guidance scale; None takes the configured one.

        Returns:
            (B, C, H, W) images in [-1, 1] on the grid of the data's grey levels.
        """
        generator = device_generator(self.device, self.hparams["seed"], SAMPLES, seed)
        guidance = self.guidance if scale is None else self.guidance.with_scale(scale)
        shrink = self.hparams["redundant_scale"]
        latent = self.network.sample_latent(labels, guidance, generator, shrink)
        options = InverseOptions(self.hparams["inverse_chunk"])
        return self.finish_samples(self.network.decode(latent.tokens, labels, options), labels)

    def finish_samples(self, values: Tensor, labels: Tensor) -> Tensor:
        """Continuous, stretched images to images in [-1, 1] on the data's grey levels."""
        if self.hparams["tweedie"] and self.hparams["noise_end"]:
            values = self.network.denoise(values, labels, self.hparams["noise_end"])
        values = self.stretch.inverse(values.clamp(-1, 1))
        if self.hparams["uniform_dequantization"]:
            return requantize(values, self.hparams["levels"])
        return values

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay on matrices only; warm-up and cosine by optimiser step."""
        names = ("lr", "min_lr", "warmup_steps", "weight_decay", "beta2", "muon_lr")
        options = {name: self.hparams[name] for name in names}
        return adamw_warmup_cosine(self, self.network, **options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the configured learning rate win over the one stored with the schedule."""
        muon = self.hparams["muon_lr"]
        rates = [self.hparams["lr"]] * 2  # matrices and vectors
        keep_configured_rates(checkpoint, rates if muon is None else [muon, *rates])

    def _update_bits(self, metric: MeanMetric, batch: ImageBatch, batch_idx: int) -> None:
        for draw in range(self.hparams["evaluation_draws"]):
            generator = self._evaluation_generator(batch_idx, draw)
            parts = self.likelihood(batch["image"], batch["label"], 0.0, generator)
            metric.update(bits_per_dim(parts.total, self.dims, self.hparams["levels"]))

    def _evaluation_generator(self, batch_idx: int, draw: int) -> torch.Generator:
        key = (batch_idx, self.global_rank, draw + 1)
        return device_generator(self.device, self.hparams["seed"], EVALUATION, *key)
