"""Training of Bifrost-1, stage B: latents and caption to a picture, through a frozen FLUX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.text_image.batch import PromptBatch, TextImageBatch
from lightning_modules.bifrost_drawing import Drawing, build_controlnet
from lightning_modules.bifrost_frozen import Foundation
from lightning_modules.bifrost_generation import LatentGenerator, read_branch
from lightning_modules.bifrost_options import BifrostOptimisation, ControlNetShape, rebuilt
from lightning_modules.bifrost_painter import Painter
from lightning_modules.bifrost_parts import flux_text_part, latent_part, pixel_part
from lightning_modules.bifrost_rows import FrozenRows, check_identities
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import EVALUATION, NOISE, device_generator
from models.bifrost.controlnet import check_fits
from models.bifrost.controlnet_checkpoint import read_controlnet
from models.bifrost.decoding import DecodingOptions
from models.bifrost.flow import (
    Condition,
    FluxText,
    SigmaDraw,
    draw_noise,
    draw_sigmas,
    flow_loss,
)
from models.bifrost.flow_sampling import SamplingOptions
from models.bifrost.sharding import shard_controlnet

# Matrices inside the blocks.
HIDDEN = r"transformer_blocks\."


class BifrostControlNet(LightningModule):
    """The latent ControlNet of Bifrost-1 (arXiv 2508.05954) on a frozen FLUX.

    It learns from true latents of the pictures. Latents from a trained branch are used in
    evaluation alone. Logs ``train/loss``; in validation ``val/loss`` with noise and sigmas that
    are the same every time, and ``val/loss_text_alone``, that of FLUX without the ControlNet.

    Args:
        foundation: Frozen language model and vision tower; no part of the checkpoint, but their
            identities are.
        painter: Frozen FLUX, autoencoder and text encoders, likewise.
        shape: Sizes of the ControlNet.
        sigmas: How the noise levels of training are drawn.
        guidance: Value for FLUX's guidance embedding in training.
        optimisation: Optimiser and schedule.
        sampling: How pictures are drawn.
        branch: Run directory, checkpoint or released folder of a branch, whose latents test and
            predict make pictures of.
        decoding: How the branch generates latents.
        pretrained: Folder of a ControlNet in the released layout that a new run starts from.
        pictures_per_prompt: Pictures that predict draws of each prompt.
        chunk: Most pictures drawn at a time.
        memory_mb: Latents, packed pictures and text of the training samples are kept in memory if
            they need no more than this each.
        image_size: Side of the pictures (taken from the data).
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If a number is out of range, or the grids of latents and FLUX do not meet.
    """

    def __init__(
        self,
        foundation: Foundation,
        painter: Painter,
        shape: ControlNetShape = ControlNetShape(),  # noqa: B008 - frozen
        sigmas: SigmaDraw = SigmaDraw(),  # noqa: B008 - frozen
        guidance: float = 3.5,
        optimisation: BifrostOptimisation = BifrostOptimisation(lr=1e-5),  # noqa: B008 - frozen
        sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 - frozen
        branch: Path | None = None,
        decoding: DecodingOptions = DecodingOptions(),  # noqa: B008 - frozen
        pretrained: Path | None = None,
        pictures_per_prompt: int = 1,
        chunk: int = 50,
        memory_mb: int = 1024,
        image_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["foundation", "painter"], logger=False)
        self.shape = rebuilt(ControlNetShape, shape)
        self.sigmas = rebuilt(SigmaDraw, sigmas)
        self.optimisation = rebuilt(BifrostOptimisation, optimisation)
        self.sampling = rebuilt(SamplingOptions, sampling)
        self.decoding = rebuilt(DecodingOptions, decoding)
        for name in ("shape", "sigmas", "optimisation", "sampling", "decoding"):
            self.hparams[name] = asdict(getattr(self, name))
        for name, path in (("branch", branch), ("pretrained", pretrained)):
            self.hparams[name] = path and str(path)
        for name, value in (("pictures_per_prompt", pictures_per_prompt), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be >= 1 (model.{name})")
        # In a tuple, so that their weights are no part of the checkpoint.
        self._frozen = (foundation, painter)
        self.generator: LatentGenerator | None = None
        self.grid = painter.grid(image_size)
        self.controlnet = build_controlnet(foundation, painter, self.grid, self.shape)
        self.drawing = Drawing(painter, self.controlnet, self.grid, self.sampling, chunk, seed)
        parts = [latent_part(foundation), pixel_part(painter, image_size), flux_text_part(painter)]
        self.frozen_rows = FrozenRows(parts, memory_mb)
        self.val_loss = MeanMetric()
        self.val_loss_text_alone = MeanMetric()

    @property
    def foundation(self) -> Foundation:
        """The frozen language model and tower."""
        return self._frozen[0]

    @property
    def painter(self) -> Painter:
        """The frozen FLUX with autoencoder and text encoders."""
        return self._frozen[1]

    @property
    def identities(self) -> dict[str, str]:
        """Hashes of what the ControlNet was trained beside."""
        return {"tower": self.foundation.identities["tower"], **self.painter.identities}

    def configure_model(self) -> None:
        """Read a foreign ControlNet and shard under FSDP2, each if asked for.

        Raises:
            CheckpointError: The weights do not fit.
        """
        path = self.hparams["pretrained"]
        if path and not self.trainer.ckpt_path and self.trainer.global_step == 0:
            self._read(Path(path))
        if self.device_mesh is not None:
            shard_controlnet(self.controlnet, self.device_mesh["data_parallel"])

    def _read(self, path: Path) -> None:
        try:
            given = read_controlnet(path, torch.float32)
            check_fits(given, self.painter.flux)
            self.controlnet.load_state_dict(given.state_dict())
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path}: {reason} (model.pretrained)") from None

    def setup(self, stage: str) -> None:
        """Read the branch whose latents are to be painted.

        Raises:
            CheckpointError: It cannot be read, or is of another foundation.
        """
        path, seed = self.hparams["branch"], self.hparams["seed"]
        if path and self.generator is None:
            branch = read_branch(Path(path), self.foundation)
            self.generator = LatentGenerator(branch, self.foundation, seed)

    def on_fit_start(self) -> None:
        """Let the frozen parts read the training samples."""
        self._place()
        self.frozen_rows.fill(self.trainer, self)

    def _place(self) -> None:
        self.foundation.to(self.device)
        self.painter.to(self.device)
        if self.generator is not None:
            self.generator.branch.to(self.device)

    on_validation_start = on_test_start = on_predict_start = _place

    def latents(self, batch: TextImageBatch, training: bool = False) -> Tensor:
        """True latents (B, N, C) float32 of a batch's images."""
        return self.frozen_rows.rows("latents", batch, training)["latents"].float()

    def training_step(self, batch: TextImageBatch, batch_idx: int) -> Tensor:
        """Flow-matching error of FLUX as the ControlNet steers it."""
        key = (self.hparams["seed"], NOISE, self.current_epoch, batch_idx, self.global_rank)
        clean, condition = self._inputs(batch, training=True)
        generator = device_generator(self.device, *key)
        sigmas = draw_sigmas(len(clean), self.sigmas, generator)
        noise = torch.empty_like(clean).normal_(generator=generator)
        loss = self._loss(clean, noise, sigmas, condition).mean()
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def _inputs(self, batch: TextImageBatch, training: bool = False) -> tuple[Tensor, Condition]:
        """Packed pictures (B, L, K) and their condition."""
        clean = self.frozen_rows.rows("packed", batch, training)["packed"].float()
        text = self.frozen_rows.rows("flux_text", batch, training)
        latents = self.latents(batch, training)
        return clean, Condition(FluxText(text["flux_states"], text["flux_pooled"]), latents)

    def _loss(
        self,
        clean: Tensor,
        noise: Tensor,
        sigmas: Tensor,
        condition: Condition,
        controlled: bool = True,
    ) -> Tensor:
        """Loss (B,) with or without the ControlNet."""
        controlnet = self.controlnet if controlled else None
        return flow_loss(
            self.painter.flux,
            controlnet,
            clean,
            noise,
            sigmas,
            condition,
            self.grid,
            guidance=self.hparams["guidance"],
        )

    def validation_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """The training loss with noise keyed by the samples; also that of the text alone."""
        clean, condition = self._inputs(batch)
        numbers = batch["index"].tolist()
        generators = self._generators([(EVALUATION, number) for number in numbers])
        sigmas = torch.cat([draw_sigmas(1, self.sigmas, generator) for generator in generators])
        noise = draw_noise(generators, tuple(clean.shape[1:]))
        for metric, controlled in ((self.val_loss, True), (self.val_loss_text_alone, False)):
            metric.update(self._loss(clean, noise, sigmas, condition, controlled))
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/loss_text_alone", self.val_loss_text_alone)

    def _generators(self, keys: Sequence[tuple[int, ...]]) -> list[torch.Generator]:
        seed = self.hparams["seed"]
        return [device_generator(self.device, seed, *key) for key in keys]

    def test_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """Nothing of its own: `BifrostTable` makes the table."""

    def branch_generator(self) -> LatentGenerator:
        """Generates latents of captions by the branch.

        Raises:
            CheckpointError: There is no branch.
        """
        if self.generator is None:
            raise CheckpointError(
                "branch=None: pictures from captions need a trained branch; give the run directory "
                "or checkpoint of a BifrostBranch run (model.branch)"
            )
        return self.generator

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Pictures (B, R, 3, H, W) of prompts, with what is known of the prompts."""
        copies = self.hparams["pictures_per_prompt"]
        captions = [caption for caption in batch["caption"] for _ in range(copies)]
        keys = [(number, copy) for number in batch["index"].tolist() for copy in range(copies)]
        generator, chunk, pictures = self.branch_generator(), self.hparams["chunk"], []
        for start in range(0, len(captions), chunk):
            part = slice(start, start + chunk)
            latents = generator.generate(captions[part], keys[part], self.decoding)
            pictures.append(self.drawing.paint(captions[part], latents, keys[part]))
        image = torch.unflatten(torch.cat(pictures), 0, (-1, copies))
        settings = {"decoding": self.hparams["decoding"], "sampling": self.hparams["sampling"]}
        return {**batch, "image": image, "settings": settings}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; warm-up and cosine by optimiser step."""
        return warmup_cosine_steps(self, self._groups(), *self.optimisation.course)

    def _groups(self) -> list[dict[str, Any]]:
        named = self.controlnet.named_parameters()
        return parameter_groups(named, *self.optimisation.rates, hidden=HIDDEN)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen parts' identities in place of their weights."""
        checkpoint["frozen_identities"] = self.identities

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win, and refuse a checkpoint of other frozen parts.

        Raises:
            CheckpointError: It was trained beside another tower, FLUX or autoencoder.
        """
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        remedy = "model.foundation, model.painter"
        check_identities(checkpoint.get("frozen_identities"), self.identities, remedy)
