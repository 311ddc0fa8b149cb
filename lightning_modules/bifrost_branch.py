"""Training of Bifrost-1, stage A: captions to the latents of a frozen vision tower."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.keyed_random import keyed_generator
from datamodules.text_image.batch import PromptBatch, TextImageBatch
from lightning_modules.bifrost_frozen import Foundation
from lightning_modules.bifrost_generation import LatentGenerator, build_branch
from lightning_modules.bifrost_latent_scores import ValidationLatents, latent_scores, reveal_errors
from lightning_modules.bifrost_options import BifrostOptimisation, BranchShape, rebuilt
from lightning_modules.bifrost_parts import latent_part, text_part
from lightning_modules.bifrost_rows import FrozenRows, check_identities, text_of_rows
from lightning_modules.callbacks.reduction_table import gather_objects
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import EVALUATION, NOISE, device_generator
from models.bifrost.checkpoint import load_branch
from models.bifrost.decoding import DecodingOptions
from models.bifrost.generator import latent_loss, predict
from models.bifrost.masking import MaskRatio, training_mask
from models.bifrost.sharding import shard_branch
from models.bifrost.text_states import TextStates

# Matrices between the layers, and tables that are never decayed.
HIDDEN, TABLES = r"(^|\.)layers\.", r"(^|\.)(mask_token|positions)$"


class BifrostBranch(LightningModule):
    """The vision generation branch of Bifrost-1 (arXiv 2508.05954) beside a frozen language model.

    Logs ``train/loss``; in validation ``val/loss`` under training's masks, of latents generated
    from captions ``val/mse``, ``val/cosine`` (of the tokens), ``val/r1`` and ``val/r5`` (own
    latents found among the true ones by cosine, mean latent subtracted), beside ``val/chance_r1``
    and ``val/mse_mean`` (what the mean latent would reach); and ``val/reveal_<k>``: error of the
    hidden tokens when k true ones are shown with an empty caption.

    Args:
        foundation: Frozen language model and vision tower; no part of the checkpoint, but their
            identities are.
        shape: Options of the branch.
        mask_ratio: Share of hidden tokens in training.
        loss_on: Tokens that the squared error is taken over; all, as released.
        latent_noise: Standard deviation of noise on the latents that training shows (ours), so
            that the branch bears with errors of its own; 0 shows true ones, as released.
        optimisation: Optimiser and schedule.
        decoding: How latents are generated in validation and predict.
        pretrained: Branch in the released layout that a new run starts from.
        memory_mb: Latents, and text states, of the training samples are kept in memory if they
            need no more than this each; otherwise they are read from the data's features or made
            for each batch.
        validation_items: Validation samples that latents are generated for.
        statistics_items: Training samples that give the mean latent.
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If a number is out of range.
    """

    latent_mean: Tensor
    latent_mean_known: Tensor

    def __init__(
        self,
        foundation: Foundation,
        shape: BranchShape = BranchShape(),  # noqa: B008 - frozen
        mask_ratio: MaskRatio = MaskRatio(),  # noqa: B008 - frozen
        loss_on: Literal["all", "masked"] = "all",
        latent_noise: float = 0.0,
        optimisation: BifrostOptimisation = BifrostOptimisation(),  # noqa: B008 - frozen
        decoding: DecodingOptions = DecodingOptions(),  # noqa: B008 - frozen
        pretrained: Path | None = None,
        memory_mb: int = 1024,
        validation_items: int = 256,
        statistics_items: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["foundation"], logger=False)
        self.shape = rebuilt(BranchShape, shape)
        self.mask_ratio = rebuilt(MaskRatio, mask_ratio)
        self.optimisation = rebuilt(BifrostOptimisation, optimisation)
        self.decoding = rebuilt(DecodingOptions, decoding)
        self.hparams.update(
            shape=asdict(self.shape),
            mask_ratio=asdict(self.mask_ratio),
            optimisation=asdict(self.optimisation),
            decoding=asdict(self.decoding),
            pretrained=pretrained and str(pretrained),
        )
        # In a tuple, so that its weights are no part of the checkpoint.
        self._foundation = (foundation,)
        tower = foundation.tower
        _check(self.decoding, tower.tokens, latent_noise, validation_items, statistics_items)
        self.branch = build_branch(foundation, self.shape)
        self.loss_on = loss_on
        self.generator = LatentGenerator(self.branch, foundation, seed)
        self.register_buffer("latent_mean", torch.zeros(tower.tokens, tower.width))
        self.register_buffer("latent_mean_known", torch.tensor(False))
        self.frozen_rows = FrozenRows([latent_part(foundation), text_part(foundation)], memory_mb)
        self.val_loss = MeanMetric()
        self._validated: list[ValidationLatents] = []

    @property
    def foundation(self) -> Foundation:
        """The frozen language model and tower."""
        return self._foundation[0]

    def configure_model(self) -> None:
        """Read foreign weights and shard under FSDP2, each if asked for.

        Raises:
            CheckpointError: The weights do not fit.
        """
        path = self.hparams["pretrained"]
        if path and not self.trainer.ckpt_path and self.trainer.global_step == 0:
            try:
                load_branch(self.branch, Path(path), self.foundation.language_model)
            except (FileNotFoundError, ValueError) as error:
                raise CheckpointError(f"{error} (model.pretrained)") from None
        if self.device_mesh is not None:
            shard_branch(self.branch, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Let the frozen parts read the training samples; measure the mean latent."""
        self._place()
        self.frozen_rows.fill(self.trainer, self)
        if not bool(self.latent_mean_known):
            self._measure_mean()

    def _place(self) -> None:
        self.foundation.to(self.device)

    on_validation_start = on_test_start = on_predict_start = _place

    def _measure_mean(self) -> None:
        """Mean of the latents of the first training samples, over all ranks."""
        loader = self.trainer.datamodule.train_eval_dataloader()  # type: ignore[attr-defined]
        left = -(-self.hparams["statistics_items"] // self.trainer.world_size)
        total, count = torch.zeros_like(self.latent_mean, dtype=torch.float64), 0
        for batch in loader:
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            latents = self.latents(batch, training=True)[:left]
            total += latents.double().sum(0)
            count += len(latents)
            left -= len(latents)
            if left <= 0:
                break
        sums = gather_objects(self.trainer, (total.cpu(), count))
        whole = sum(part for part, _ in sums) / sum(number for _, number in sums)
        self.latent_mean.copy_(cast("Tensor", whole))
        self.latent_mean_known.fill_(True)

    def latents(self, batch: TextImageBatch, training: bool = False) -> Tensor:
        """True latents (B, N, C) float32 of a batch's images.

        Args:
            batch: Of any split.
            training: Whether it is of the training split, whose latents may be in memory.
        """
        return self.frozen_rows.rows("latents", batch, training)["latents"].float()

    def text(self, batch: TextImageBatch, training: bool = False) -> TextStates:
        """Text states of a batch's captions, see `latents`."""
        return text_of_rows(self.frozen_rows.rows("text", batch, training))

    def training_step(self, batch: TextImageBatch, batch_idx: int) -> Tensor:
        """Squared error of the predicted latents, some of which are shown."""
        key = (self.hparams["seed"], NOISE, self.current_epoch, batch_idx, self.global_rank)
        latents, text = self.latents(batch, training=True), self.text(batch, training=True)
        generator = keyed_generator(*key)
        mask = training_mask(len(latents), self.branch.tokens, generator, self.mask_ratio)
        loss = self._loss(latents, mask.to(self.device), text, self._noisy(latents, key))
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def _noisy(self, latents: Tensor, key: tuple[int, ...]) -> Tensor:
        """Latents as training shows them."""
        deviation = float(self.hparams["latent_noise"])
        if not deviation:
            return latents
        generator = device_generator(self.device, *key, 1)
        noise = torch.empty_like(latents).normal_(generator=generator)
        return latents + deviation * noise

    def _loss(self, latents: Tensor, mask: Tensor, text: TextStates, shown: Tensor) -> Tensor:
        model = self.foundation.language_model
        prediction = predict(self.branch, model, shown, mask, text)
        return latent_loss(prediction, latents, mask, self.loss_on)

    def on_validation_epoch_start(self) -> None:
        """Forget an earlier validation."""
        self._validated = []

    def validation_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """Error under masks that are the same every time; generated latents of the first items."""
        latents, text = self.latents(batch), self.text(batch)
        numbers = batch["index"].tolist()
        generator = keyed_generator(self.hparams["seed"], EVALUATION, *numbers[:1])
        mask = training_mask(len(latents), self.branch.tokens, generator, self.mask_ratio)
        self.val_loss.update(self._loss(latents, mask.to(self.device), text, latents), len(latents))
        self.log("val/loss", self.val_loss, prog_bar=True)
        # Decided by the number of batches, which all ranks share: sharded weights need them all.
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        share = data.eval_batch_size * self.trainer.world_size
        if batch_idx * share < self.hparams["validation_items"]:
            keys = [(number,) for number in numbers]
            generated = self.generator.decode(text, keys, self.decoding)
            shown = [(self.hparams["seed"], EVALUATION, number) for number in numbers]
            errors = reveal_errors(self.branch, self.foundation, latents, shown)
            errors = {count: error.cpu() for count, error in errors.items()}
            found = ValidationLatents(latents.cpu(), generated.cpu(), errors)
            self._validated.append(found)

    def on_validation_epoch_end(self) -> None:
        """Compare generated latents with the true ones of all ranks."""
        parts = [p for rank in gather_objects(self.trainer, self._validated) for p in rank]
        self._validated = []
        if not parts:
            return
        for name, value in latent_scores(parts, self.latent_mean.cpu()).items():
            self.log(f"val/{name}", value, sync_dist=self.trainer.world_size > 1)

    def test_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """Nothing of its own: `LatentTable` makes the table."""

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Latents (B, N, C) of prompts; `BifrostControlNet` makes pictures of them."""
        keys = [(number,) for number in batch["index"].tolist()]
        latents = self.generator.generate(batch["caption"], keys, self.decoding)
        return {"latents": latents, "index": batch["index"], "name": batch["name"]}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; warm-up and cosine by optimiser step."""
        return warmup_cosine_steps(self, self._groups(), *self.optimisation.course)

    def _groups(self) -> list[dict[str, Any]]:
        rates = self.optimisation.rates
        named = self.branch.named_parameters()
        return parameter_groups(named, *rates, hidden=HIDDEN, undecayed=TABLES)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the frozen parts' identities in place of their weights."""
        checkpoint["frozen_identities"] = self.foundation.identities

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win, and refuse a checkpoint of other frozen parts.

        Raises:
            CheckpointError: It was trained beside another language model or tower.
        """
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        stored = checkpoint.get("frozen_identities")
        check_identities(stored, self.foundation.identities, "model.foundation")


def _check(
    decoding: DecodingOptions, tokens: int, noise: float, items: int, statistics: int
) -> None:
    if decoding.steps > tokens:
        raise ValueError(
            f"steps={decoding.steps}: must be at most the {tokens} image tokens "
            "(model.decoding.steps)"
        )
    if noise < 0:
        raise ValueError(f"latent_noise={noise}: must be >= 0 (model.latent_noise)")
    for name, value in (("validation_items", items), ("statistics_items", statistics)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1 (model.{name})")
