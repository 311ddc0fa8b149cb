"""Second stage of FARMER: a student that inverts the flow in one pass per block."""

import time
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.imagenet import ImageBatch
from datamodules.sample_requests import SampleRequest
from lightning_modules.cli.checkpoint_files import read_checkpoint
from lightning_modules.farmer import Farmer
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import adamw_warmup_cosine, keep_configured_rates
from lightning_modules.randomness import EVALUATION, NOISE, SAMPLES, device_generator
from models.farmer.affine_block import FlowShape
from models.farmer.distillation import (
    build_student,
    distillation_losses,
    invert_one_step,
    one_step_inverses,
    teacher_states,
)
from models.farmer.patches import patchify


class FarmerDistillation(LightningModule):
    """One-step distillation of a trained FARMER's flow inverse (algorithm 2).

    The teacher is frozen; its prior goes on drawing latent tokens. After distillation the
    sampler is no longer the inverse of the likelihood model: bits per dimension are the teacher's.

    Logs ``train/loss`` (mean over blocks of the squared error), ``val/reconstruction_mse`` (data
    tokens through teacher and student) and, in test, time and sequential steps of both inverses.

    Args:
        teacher: Checkpoint of a trained `Farmer`.
        image_size: Side of the images (taken from the data; must be the teacher's).
        channels: Colour channels (taken from the data; must be the teacher's).
        levels: Grey levels (taken from the data; must be the teacher's).
        num_classes: Number of classes (taken from the data; must be the teacher's).
        latent_noise: Largest standard deviation of the noise on the latent tokens; per image
            uniform in [0, latent_noise].
        lr: Highest learning rate (the paper gives none of the following five).
        min_lr: Learning rate at both ends of the schedule.
        warmup_steps: Optimiser steps until ``lr`` is reached.
        weight_decay: AdamW's weight decay on matrices.
        beta2: AdamW's second momentum coefficient.
        muon_lr: Highest rate of Muon on the transformers' matrices (ours; fewer steps at
            demo scale); null trains them by AdamW, as the paper does.
        seed: Key of all noise drawn here (taken from seed_everything).
    """

    def __init__(
        self,
        teacher: Path,
        image_size: int = 256,
        channels: int = 3,
        levels: int = 256,
        num_classes: int = 1000,
        latent_noise: float = 0.3,
        lr: float = 1e-4,
        min_lr: float = 1e-6,
        warmup_steps: int = 1000,
        weight_decay: float = 0.0,
        beta2: float = 0.95,
        muon_lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hparams["teacher"] = str(teacher)
        self.teacher = load_teacher(Path(teacher))
        for name in ("image_size", "channels", "levels", "num_classes"):
            expected = self.teacher.hparams[name]
            if self.hparams[name] != expected:
                raise ValueError(
                    f"{name}={self.hparams[name]}: the teacher {teacher} was trained with "
                    f"{expected}; give the same data"
                )
        flow = self.teacher.network.flow
        tokens, width = self.teacher.network.prior.tokens, self.teacher.dims
        shape = FlowShape(**self.teacher.hparams["flow"])
        self.student = build_student(shape, tokens, width // tokens, flow)
        self.val_mse = MeanMetric()
        self.test_mse = MeanMetric()

    def train(self, mode: bool = True) -> "FarmerDistillation":
        """Switch the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Mean over blocks of the student's squared error."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        losses = self._losses(batch, generator, self.hparams["latent_noise"])
        loss = losses.mean()
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/first_block_mse", losses[0])
        return {"loss": loss, "first_block_mse": losses[0].detach()}

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Reconstruction error of data tokens, without latent noise."""
        self.val_mse.update(self._losses(batch, self._evaluation_generator(batch_idx), 0.0)[0])
        self.log("val/reconstruction_mse", self.val_mse, prog_bar=True)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Reconstruction error; time and sequential steps of both inverses on the first batch."""
        generator = self._evaluation_generator(batch_idx)
        self.test_mse.update(self._losses(batch, generator, 0.0)[0])
        self.log("test/reconstruction_mse", self.test_mse)
        if batch_idx == 0:
            self.log_dict(self._time_inverses(batch, generator))

    def predict_step(self, batch: SampleRequest, batch_idx: int) -> dict[str, Tensor]:
        """Draw the requested samples with the one-step inverse, as `Farmer.predict_step`."""
        images = self.draw_samples(batch["label"], int(batch["index"][0]))
        return {"image": images, "label": batch["label"], "index": batch["index"]}

    @torch.no_grad()
    def draw_samples(self, labels: Tensor, seed: int, scale: float | None = None) -> Tensor:
        """Draw one image per label; the latent tokens are those the teacher would draw."""
        teacher = self.teacher
        generator = device_generator(self.device, self.hparams["seed"], SAMPLES, seed)
        guidance = teacher.guidance if scale is None else teacher.guidance.with_scale(scale)
        latent = teacher.network.sample_latent(labels, guidance, generator)
        patches = invert_one_step(self.student, latent.tokens)
        return teacher.finish_samples(teacher.network.to_images(patches), labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW on the student alone."""
        names = ("lr", "min_lr", "warmup_steps", "weight_decay", "beta2", "muon_lr")
        options = {name: self.hparams[name] for name in names}
        return adamw_warmup_cosine(self, self.student, **options)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the configured learning rate win over the one stored with the schedule."""
        muon = self.hparams["muon_lr"]
        rates = [self.hparams["lr"]] * 2  # matrices and vectors
        keep_configured_rates(checkpoint, rates if muon is None else [muon, *rates])

    def _losses(self, batch: ImageBatch, generator: torch.Generator, largest: float) -> Tensor:
        """(n,) squared error behind each block, as in `distillation_losses`."""
        with torch.no_grad():
            states = teacher_states(self.teacher.network.flow, self._tokens(batch, generator))
        sigma = states[-1].new_empty(len(states[-1]), 1, 1)
        sigma.uniform_(0, largest, generator=generator)
        noise = sigma * torch.empty_like(states[-1]).normal_(generator=generator)
        return distillation_losses(one_step_inverses(self.student), states, noise)

    def _tokens(self, batch: ImageBatch, generator: torch.Generator) -> Tensor:
        """Data tokens (B, N, d) at the noise level the teacher ended with."""
        sigma = self.teacher.hparams["noise_end"]
        values, _ = self.teacher.continuous(batch["image"], sigma, generator)
        return patchify(values, self.teacher.network.patch_size)

    @torch.no_grad()
    def _time_inverses(self, batch: ImageBatch, generator: torch.Generator) -> dict[str, float]:
        """CPU seconds per image and sequential network evaluations of both inverses."""
        flow = self.teacher.network.flow
        latent = teacher_states(flow, self._tokens(batch, generator))[-1]
        start = time.process_time()
        _, steps = flow.inverse(latent)
        middle = time.process_time()
        invert_one_step(self.student, latent)
        end = time.process_time()
        return {
            "test/inverse_steps_teacher": float(steps),
            "test/inverse_steps_student": float(len(flow.blocks)),
            "test/inverse_seconds_teacher": (middle - start) / len(latent),
            "test/inverse_seconds_student": (end - middle) / len(latent),
        }

    def _evaluation_generator(self, batch_idx: int) -> torch.Generator:
        key = (batch_idx, self.global_rank)
        return device_generator(self.device, self.hparams["seed"], EVALUATION, *key)


def load_teacher(path: Path) -> Farmer:
    """Read a frozen teacher, weights only.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointError: If it is damaged or holds more than tensors and plain values.
        ValueError: If it is not a checkpoint of `Farmer`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; model.teacher must be a FARMER checkpoint, such as "
            "runs/latest/checkpoints/last.ckpt"
        )
    read_checkpoint(path)  # compares it with its digest
    try:
        # LightningCLI keeps the arguments of the class it builds in a context variable, which the
        # teacher would take for its own.
        load = partial(Farmer.load_from_checkpoint, map_location="cpu", weights_only=True)
        teacher: Farmer = Context().run(load, path)
    except (RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a checkpoint of Farmer ({reason})") from error
    return teacher.eval().requires_grad_(False)
