"""Training of the demo's vision tower and language model, on which Bifrost-1 is built there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

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
from lightning_modules.bifrost_tower_figures import (
    ChoiceOptions,
    SplitEncoding,
    choice_share,
    recall_figures,
)
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.logging_steps import is_log_step
from lightning_modules.metrics.image_quality import psnr
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import NOISE, device_generator
from lightning_modules.resident_pictures import ResidentPictures
from models.bifrost.demo_foundation_files import LANGUAGE, TOKENIZER_FILE, TOWER
from models.bifrost.demo_joint_training import (
    JointTraining,
    caption_nats,
    caption_targets,
    joint_loss,
)
from models.bifrost.demo_tokenizer import DemoTokenizer, TokenBatch, train_tokenizer
from models.bifrost.demo_tower import (
    DemoLanguageShape,
    TowerShape,
    build_language_model,
    build_tower,
    caption_logits,
    text_hidden,
)

_PIECE = 256


class BifrostTower(LightningModule):
    """A vision tower and a language model that know the same pictures, trained from nothing.

    Contrast of pictures and captions, pixels decoded from the latents, and captions told behind
    the latents. Logs ``train/loss`` and its terms; in validation ``val/psnr`` of the decoded
    pictures, ``val/caption_nats`` (cross-entropy of a token of a picture's own caption) and
    ``val/r1`` (share of held-out captions that find their picture among all held-out ones).

    Args:
        shape: Sizes of the tower; the side of its images is taken from the data.
        language: Sizes of the language model; as many tokenizer entries are learnt from the
            training captions.
        weights: Of contrast, pixels and captions in the loss.
        optimisation: Optimiser and schedule.
        shift: Training pictures are moved by up to this many pixels.
        choice: How the final figures let the model choose captions by their likelihood.
        image_size: Side of the images in pixels (taken from the data).
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If sizes do not fit one another.
    """

    def __init__(
        self,
        shape: TowerShape = TowerShape(image_size=64, patch_size=8),  # noqa: B008 - frozen
        language: DemoLanguageShape = DemoLanguageShape(),  # noqa: B008 - frozen
        weights: tuple[float, float, float] = (1.0, 5.0, 1.0),
        optimisation: FoundationOptimisation = FoundationOptimisation(),  # noqa: B008 - frozen
        shift: int = 4,
        choice: ChoiceOptions = ChoiceOptions(),  # noqa: B008 - frozen
        image_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = replace(rebuilt(TowerShape, shape), image_size=image_size)
        self.language = rebuilt(DemoLanguageShape, language)
        self.optimisation = rebuilt(FoundationOptimisation, optimisation)
        self.choice = rebuilt(ChoiceOptions, choice)
        if self.shape.latent_width != self.language.width:
            raise ValueError(
                f"latent_width={self.shape.latent_width}: must be language.width="
                f"{self.language.width}, latents stand in place of embeddings"
            )
        if shift < 0:
            raise ValueError(f"shift={shift}: must be >= 0 (model.shift)")
        self.save_hyperparameters(logger=False)
        self.hparams.update(
            shape=asdict(self.shape),
            language=asdict(self.language),
            optimisation=asdict(self.optimisation),
            choice=asdict(self.choice),
        )
        self.tower = build_tower(self.shape)
        self.language_model = build_language_model(self.language)
        self.training_parts = JointTraining(self.shape)
        self.val_psnr, self.val_nats = MeanMetric(), MeanMetric()
        self._held_out: list[SplitEncoding] = []

    def setup(self, stage: str) -> None:
        """Learn the tokenizer from the training captions."""
        captions = resident_data(self).whole("train").captions
        self.tokenizer = train_tokenizer(captions, self.language.vocabulary)

    def on_fit_start(self) -> None:
        """Put the training pictures and their tokens where the module is."""
        pixels, captions = resident_data(self).whole("train")
        self._pictures = ResidentPictures(pixels, self.device)
        self._tokens = self._encode(captions)

    def _encode(self, captions: Sequence[str]) -> TokenBatch:
        """Tokens (B, T) of captions and their mask."""
        return TokenBatch(*(part.to(self.device) for part in self.tokenizer.encode(captions)))

    def training_step(self, batch: PairPositions, batch_idx: int) -> Tensor:
        """The joint loss of one batch."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        index = batch["index"]
        images = self._pictures.take_shifted(index, self.hparams["shift"], generator)
        ids, mask = self._tokens.ids[index], self._tokens.mask[index]
        loss = joint_loss(
            self.tower,
            self.language_model,
            self.training_parts,
            images,
            ids,
            mask,
            weights=tuple(self.hparams["weights"]),
        )
        if is_log_step(self.trainer):
            self.log("train/loss", loss.total, prog_bar=True)
            terms = {"contrast": loss.contrast, "pixels": loss.pixels, "caption": loss.caption}
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        return loss.total

    def validation_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """Picture quality, likelihood of captions, and what retrieval needs."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Retrieval among the pictures that this process has seen, of all its batches."""
        self._log_recall("val")

    def test_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._log_recall("test")

    def _evaluate(self, stage: Literal["val", "test"], batch: TextImageBatch) -> None:
        encoding = self.encode(batch["image"], self._encode(batch["caption_full"]))
        self._held_out.append(encoding)
        self.val_psnr.update(encoding.psnr)
        self.val_nats.update(encoding.nats, encoding.told)
        self.log(f"{stage}/psnr", self.val_psnr, prog_bar=True)
        self.log(f"{stage}/caption_nats", self.val_nats)

    def _log_recall(self, stage: Literal["val", "test"]) -> None:
        encoding = SplitEncoding.join(self._held_out)
        self._held_out.clear()
        self.log(f"{stage}/r1", recall_figures(encoding)["r1"], prog_bar=True, sync_dist=True)

    @torch.no_grad()
    def encode(self, images: Tensor, tokens: TokenBatch) -> SplitEncoding:
        """What the figures are made of, of images (B, 3, S, S) and their captions' tokens."""
        model, parts = self.language_model, self.training_parts
        latents = self.tower(images)
        decoded = parts.decoder(latents).float()
        states = text_hidden(model, tokens.ids, tokens.mask)[:, -1]
        logits = caption_logits(model, latents, tokens.ids, tokens.mask)
        told = caption_targets(tokens.mask).sum(1)  # (B,)
        nats = caption_nats(logits, tokens.ids, tokens.mask).sum(1) / told.clamp(min=1)
        return SplitEncoding(
            pictures=parts.image_projection(latents.mean(1)).float(),
            captions=parts.text_projection(states).float(),
            psnr=psnr(decoded / 2 + 0.5, images / 2 + 0.5),
            nats=nats,
            told=told.float(),
        )

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """What the trained model reaches on whole splits, pictures unshifted.

        Of ``train_*`` and ``held_out_*``: ``r1`` and ``r1_of_100`` (captions that find their
        picture), ``psnr``, ``caption_nats`` and ``choice`` (pictures whose own caption is the
        likeliest of ``choice_of``).
        """
        found = {"choice_of": float(self.choice.captions)}
        for name, split in SPLITS.items():
            pixels, captions = resident_data(self).whole(split)
            pictures, tokens = ResidentPictures(pixels, self.device), self._encode(captions)
            pieces = pictures.pieces(_PIECE)
            encoding = SplitEncoding.join(
                [self.encode(pictures.take(i), tokens.rows(i)) for i in pieces]
            )
            shown = torch.cat(pieces)[: self.choice.pictures]
            latents, choices = self.tower(pictures.take(shown)), self.choice.captions
            share = choice_share(self.language_model, latents, tokens.rows(shown), choices)
            figures = recall_figures(encoding) | encoding.means() | {"choice": share}
            found |= {f"{name}_{key}": value for key, value in figures.items()}
        return found

    def parts(self) -> list[FoundationPart]:
        """Tower and language model."""
        return [
            FoundationPart(TOWER, self.tower, self.shape),
            FoundationPart(LANGUAGE, self.language_model, self.language),
        ]

    def recipe(self) -> Recipe:
        """How both were trained."""
        contrast, pixels, caption = self.hparams["weights"]
        return training_recipe(self, self.optimisation) | {
            "loss": f"{contrast} contrast + {pixels} pixels + {caption} caption",
            "shift": int(self.hparams["shift"]),
            "tokenizer_entries": len(self.tokenizer),
        }

    def save_texts(self, folder: Path) -> None:
        """Write the tokenizer."""
        self.tokenizer.save(folder / TOKENIZER_FILE)

    @torch.no_grad()
    def draw(self) -> list[tuple[str, Tensor]]:
        """Rows of pictures, and beneath them what the latents hold of them."""
        decoder = self.training_parts.decoder
        return gallery_rows(self, "from latents", lambda images: decoder(self.tower(images)))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; warm-up and cosine to zero by optimiser step."""
        options = self.optimisation
        return warmup_cosine_steps(self, self._groups(), options.warmup_steps, options.beta2)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.optimisation
        tables = r"pos_embed$"
        return parameter_groups(
            self.named_parameters(), options.lr, options.weight_decay, undecayed=tables
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the tokenizer, as embeddings are by its entries."""
        checkpoint["tokenizer"] = self.tokenizer.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win, and refuse weights that belong to other captions.

        Raises:
            CheckpointError: If the training captions were others.
        """
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        tokenizer = getattr(self, "tokenizer", None)
        if isinstance(tokenizer, DemoTokenizer) and checkpoint["tokenizer"] != tokenizer.to_json():
            raise CheckpointError(
                "tokenizer: the checkpoint's was learnt from other captions; give the same data "
                "(data.root), or train anew"
            )
