"""Training of a token selector: keep what the rest can be rebuilt from."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from datamodules.documents.batch import DocumentBatch
from datamodules.token_features import FeatureBatch
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.feature_statistics import merge_statistics
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import NOISE, device_generator
from lightning_modules.token_reduction_options import ReductionOptimisation, ReductionShape
from models.image_encoders.frozen_encoder import EncodedImage, FrozenEncoder
from models.token_reduction.losses import all_token_nmse, reduction_loss
from models.token_reduction.reconstructor import TokenReconstructor
from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selection import Selection
from models.token_reduction.selector import keep_scores, sample_mask

# Matrices of the two transformers.
HIDDEN = r"\.blocks\."
# More kinds of images than these have no curve each.
_MOST_KINDS = 16


class TokenReduction(LightningModule):
    """Selector and reconstructor of "When Less is Enough" (arXiv 2503.16660), trained together.

    Logs ``train/loss``, ``train/reconstruction`` (mean squared error over all tokens of
    standardised features), ``train/keep`` (share kept by the sampled masks), ``train/keep_std``
    over images and ``train/keep_argmax`` (share kept without noise); in validation ``val/nmse_<r>``
    and ``val/keep``, and where the data has labels ``val/text_recall_<r>`` (share of the tokens
    under digits and words that are kept) and ``val/keep_<kind>``.

    Args:
        encoder: Frozen encoder of the images; its weights are no part of the checkpoint, its
            identity is.
        shape: Sizes of selector and reconstructor.
        floor: Share p of kept tokens below which keeping costs nothing (eq. 7), drawn for each
            batch between the two; equal numbers fix it.
        floor_per_image: Whether the floor holds for each image instead of the batch's mean.
        price: Cost of keeping all tokens, against a reconstruction error of 1 for dropping all.
        temperature: Gumbel-softmax temperature at the first and at the last step.
        optimisation: Optimiser and schedule.
        shares: Retained shares that validation measures.
        statistics_images: Images whose features give the channels' mean and deviation.
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        shape: ReductionShape = ReductionShape(),  # noqa: B008 - frozen
        floor: tuple[float, float] = (0.4, 0.4),
        floor_per_image: bool = False,
        price: float = 1.0,
        temperature: tuple[float, float] = (1.0, 1.0),
        optimisation: ReductionOptimisation = ReductionOptimisation(),  # noqa: B008 - frozen
        shares: tuple[float, ...] = (0.1, 0.3, 0.5),
        statistics_images: int = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__()
        shape = ReductionShape(**shape) if isinstance(shape, dict) else shape
        if isinstance(optimisation, dict):
            optimisation = ReductionOptimisation(**optimisation)
        _check(floor, temperature, shares)
        self.save_hyperparameters(ignore=["encoder"], logger=False)
        self.hparams.update(shape=asdict(shape), optimisation=asdict(optimisation))
        self.optimisation = optimisation
        # In a tuple, so that its weights are no part of the checkpoint.
        self._encoder = (encoder,)
        origin = ReducerOrigin(
            type(encoder).__name__, encoder.identity, encoder.layer, (floor[0] + floor[1]) / 2
        )
        sizes = shape.for_tokens(encoder.channels, encoder.grid(*encoder.image_size))
        self.reducer = TokenReducer(sizes, origin)
        self.reconstructor = TokenReconstructor(sizes)
        names = [f"{share:g}".replace(".", "_") for share in shares]
        self.val_nmse = nn.ModuleDict({name: MeanMetric() for name in names})
        self.val_recall = nn.ModuleDict({name: MeanMetric() for name in names})
        self.val_keep = MeanMetric()
        self.val_keep_kind = nn.ModuleDict()

    @property
    def encoder(self) -> FrozenEncoder:
        """The frozen encoder."""
        return self._encoder[0]

    def setup(self, stage: str) -> None:
        """Learn what kinds of images there are."""
        kinds = getattr(self.trainer.datamodule, "kind_names", ())  # type: ignore[attr-defined]
        if len(kinds) <= _MOST_KINDS:
            self.val_keep_kind = nn.ModuleDict({name: MeanMetric() for name in kinds})

    def on_fit_start(self) -> None:
        """Measure the features' statistics, unless a checkpoint brought them.

        Raises:
            CheckpointError: If the data holds features of another encoder.
        """
        stored = getattr(self.trainer.datamodule, "encoder_identity", None)  # type: ignore[attr-defined]
        self.check_encoder({"encoder_identity": stored})
        if bool(self.reducer.standardiser.fitted):
            return
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        left = -(-self.hparams["statistics_images"] // self.trainer.world_size)
        for batch in loader:
            tokens = self.tokens(self.transfer_batch_to_device(batch, self.device, 0))
            self.reducer.standardiser.update(tokens)
            left -= len(tokens)
            if left <= 0:
                break
        merge_statistics(self.reducer.standardiser, self.trainer.world_size)

    @torch.no_grad()
    def tokens(self, batch: DocumentBatch | FeatureBatch) -> Tensor:
        """Features (B, L, C) of a batch of images, or those that it already holds."""
        if "tokens" in batch:
            return cast("FeatureBatch", batch)["tokens"].float()
        encoded: EncodedImage = self.encoder(batch["image"])
        return encoded.tokens.float()

    def training_step(
        self, batch: DocumentBatch | FeatureBatch, batch_idx: int
    ) -> dict[str, Tensor]:
        """Sample masks, rebuild all tokens from the kept ones, and pay for what is kept."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        tokens = self.reducer.standardiser(self.tokens(batch))
        logits = self.reducer.selector(tokens)
        mask = sample_mask(logits, self._temperature(), generator)  # (B, L)
        rebuilt = self.reconstructor(tokens, mask)
        floor = self._draw_floor(generator)
        per_image = self.hparams["floor_per_image"]
        loss, parts = reduction_loss(
            rebuilt, tokens, mask, floor, self.hparams["price"], per_image=per_image
        )
        keep = mask.detach().mean(1)  # (B,)
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/keep", keep.mean(), prog_bar=True)
            argmax = (keep_scores(logits) > 0).float().mean()
            reconstruction = parts["reconstruction"].detach()
            self.log_dict({"train/reconstruction": reconstruction, "train/keep_argmax": argmax})
            self.log("train/keep_std", keep.std(correction=0))
        return {
            "loss": loss,
            "keep": keep.mean(),
            "reconstruction": parts["reconstruction"].detach(),
        }

    def _temperature(self) -> float:
        """Temperature of this step, linear from the first to the last."""
        start, end = self.hparams["temperature"]
        total = max(1, int(self.trainer.estimated_stepping_batches) - 1)
        return float(start + (end - start) * min(1.0, self.trainer.global_step / total))

    def _draw_floor(self, generator: torch.Generator) -> float:
        least, most = self.hparams["floor"]
        chance = torch.rand((), generator=generator, device=generator.device)
        return float(least + (most - least) * float(chance))

    def validation_step(self, batch: DocumentBatch | FeatureBatch, batch_idx: int) -> None:
        """Error from a share of the tokens, and what is kept of what."""
        raw = self.tokens(batch)
        tokens = self.reducer.standardiser(raw)
        for share in self.hparams["shares"]:
            selection = self.reducer.reduce(raw, share=share)
            mask = selection.mask.to(tokens)
            error = all_token_nmse(self.reconstructor(tokens, mask), tokens, mask)
            self.log_mean(self.val_nmse, f"val/nmse_{share:g}", error, len(raw))
            self._log_recall(share, selection, batch)
        self._log_keep(selection.scores > 0, batch)

    def _log_recall(
        self, share: float, selection: Selection, batch: DocumentBatch | FeatureBatch
    ) -> None:
        """Share of the tokens under text that are kept, where the data says which those are."""
        if bool((batch["item_token"] < 0).all()):
            return
        text = batch["item_token"] > 0  # (B, L)
        self.log_mean(
            self.val_recall, f"val/text_recall_{share:g}", selection.mask.float(), text.float()
        )

    def _log_keep(self, mask: Tensor, batch: DocumentBatch | FeatureBatch) -> None:
        """Share of the tokens with a positive score, over all images and by kind."""
        keep = mask.float().mean(1)  # (B,)
        self.val_keep.update(keep)
        self.log("val/keep", self.val_keep, prog_bar=True)
        for number, (name, metric) in enumerate(self.val_keep_kind.items()):
            cast("MeanMetric", metric).update(keep, (batch["kind"] == number).float())
            self.log(f"val/keep_{name}", cast("MeanMetric", metric))

    def log_mean(
        self, metrics: nn.ModuleDict, name: str, value: Tensor, weight: Tensor | float
    ) -> None:
        """Update and log the metric whose share ends the name."""
        metric = cast("MeanMetric", metrics[name.rsplit("_", 1)[1].replace(".", "_")])
        metric.update(value, weight)
        self.log(name, metric)

    def test_step(self, batch: DocumentBatch | FeatureBatch, batch_idx: int) -> None:
        """Nothing of its own: `ReductionTable` compares the selector with others."""

    def predict_step(self, batch: DocumentBatch, batch_idx: int) -> Selection:
        """Selection of the first of ``shares``."""
        return self.reducer.reduce(self.tokens(batch), share=self.hparams["shares"][0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or Muon; warm-up and cosine to zero by optimiser step."""
        options = self.optimisation
        return warmup_cosine_steps(self, self._groups(), options.warmup_steps, options.beta2)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.optimisation
        rates = (options.lr, options.weight_decay, options.muon_lr)
        return parameter_groups(
            self.named_parameters(), *rates, hidden=HIDDEN, undecayed=r"\.positions\."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the encoder's identity in place of its weights."""
        checkpoint["encoder_identity"] = self.encoder.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win, and refuse features of another encoder.

        Raises:
            CheckpointError: If the checkpoint was trained on another encoder's features.
        """
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        self.check_encoder(checkpoint)

    def check_encoder(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another encoder's features.

        Raises:
            CheckpointError: One line with both identities.
        """
        stored = checkpoint.get("encoder_identity")
        if stored is not None and stored != self.encoder.identity:
            raise CheckpointError(
                f"encoder {self.encoder.identity}: the model or data hold features of "
                f"{stored}; give the same encoder weights, layer and normalisation (model.encoder)"
            )


def _check(
    floor: tuple[float, float], temperature: tuple[float, float], shares: tuple[float, ...]
) -> None:
    if not 0 <= floor[0] <= floor[1] <= 1:
        raise ValueError(f"floor={tuple(floor)}: must be two shares in [0, 1], smaller first")
    if min(temperature) < 0.1:
        raise ValueError(f"temperature={tuple(temperature)}: must be >= 0.1; smaller ones overflow")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares={tuple(shares)}: must be shares in (0, 1]")
