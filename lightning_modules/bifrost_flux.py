"""Training of the demo's base FLUX: pictures from the frozen language model's states of text."""

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

from datamodules.readers.protocol import Split
from datamodules.text_image.batch import TextImageBatch
from datamodules.text_image.resident_pairs import PairPositions
from lightning_modules.bifrost_caption_split import taught_captions
from lightning_modules.bifrost_flux_pairs import EncodedPairs, FluxGround
from lightning_modules.bifrost_foundation_options import (
    FoundationOptimisation,
    FoundationPart,
    Recipe,
    rebuilt,
    resident_data,
    training_recipe,
)
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.logging_steps import is_log_step
from lightning_modules.metrics.retrieval import grouped_ranks, recall
from lightning_modules.optimizers import (
    keep_configured_rates,
    parameter_groups,
    warmup_cosine_steps,
)
from lightning_modules.randomness import EVALUATION, NOISE, SAMPLES, device_generator
from lightning_modules.resident_pictures import ResidentPictures
from models.bifrost.demo_foundation_files import FLUX, LANGUAGE, VAE
from models.bifrost.demo_foundations import FluxShape, build_flux
from models.bifrost.flow import Condition, FluxText, SigmaDraw, draw_noise, draw_sigmas, flow_loss
from models.bifrost.flow_sampling import SamplingOptions, sample
from models.bifrost.flux_attention import use_lean_attention

_SHOWN = 12
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


class BifrostFlux(LightningModule):
    """diffusers' FLUX at toy size, trained by rectified flow on a part of the captions.

    Pictures whose caption is withheld are learnt with the empty caption. Logs ``train/loss``; in
    validation ``val/loss``, the flow loss of held-out pairs, mean over noise levels .1, .3 .. .9.

    Args:
        folder: Files of the frozen language model and its tokenizer; null takes the shipped ones.
        vae_folder: Files of the frozen autoencoder; null takes ``folder``.
        shape: Sizes; channels of tokens and width of text are those of the frozen networks.
        sigmas: How noise levels are drawn in training.
        caption_share: Share of the captions taught, see `taught_captions`.
        caption_dropout: Share of those replaced by the empty one in training.
        optimisation: Optimiser and schedule.
        sampling: How pictures are drawn from text alone.
        figure_pictures: Pictures drawn for the final figures, of taught captions and of withheld.
        image_size: Side of the images in pixels (taken from the data).
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        FileNotFoundError: If a file of the frozen networks is missing.
        ValueError: If a share is out of range, or a file is damaged.
    """

    def __init__(
        self,
        folder: Path | None = None,
        vae_folder: Path | None = None,
        shape: FluxShape = FluxShape(),  # noqa: B008 - frozen
        sigmas: SigmaDraw = SigmaDraw("logit_normal", 0.3),  # noqa: B008 - frozen
        caption_share: float = 0.5,
        caption_dropout: float = 0.1,
        optimisation: FoundationOptimisation = FoundationOptimisation(),  # noqa: B008 - frozen
        sampling: SamplingOptions = SamplingOptions(steps=16),  # noqa: B008 - frozen
        figure_pictures: int = 100,
        image_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, share in (("caption_share", caption_share), ("caption_dropout", caption_dropout)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: must be 0 .. 1 (model.{name})")
        self.optimisation = rebuilt(FoundationOptimisation, optimisation)
        self.sigmas, self.sampling = rebuilt(SigmaDraw, sigmas), rebuilt(SamplingOptions, sampling)
        self.ground = FluxGround(folder, vae_folder)
        shape, channels = rebuilt(FluxShape, shape), self.ground.channels
        self.shape = replace(shape, in_channels=channels, text_width=self.ground.text_width)
        self.save_hyperparameters(ignore=["folder", "vae_folder"], logger=False)
        self.hparams.update(
            shape=asdict(self.shape),
            sigmas=asdict(self.sigmas),
            optimisation=asdict(self.optimisation),
            sampling=asdict(self.sampling),
        )
        self.grid = self.ground.grid(image_size)
        self.flux = build_flux(self.shape)
        self.val_loss = MeanMetric()

    def setup(self, stage: str) -> None:
        """Put the frozen networks where the module is."""
        self.ground.to(self.device)

    def on_fit_start(self) -> None:
        """Encode the training pairs once, and the empty caption."""
        self.ground.to(self.device)
        if self.device.type == "cpu":
            use_lean_attention(self.flux)
        self._train = self.encode_split("train")
        self._empty = self.ground.read([""])

    def encode(self, images: Tensor, captions: Sequence[str]) -> EncodedPairs:
        """Pairs of images (B, 3, S, S) in [-1, 1] and captions."""
        taught = taught_captions(captions, self.hparams["caption_share"])
        ground = self.ground
        return EncodedPairs(ground.tokens(images), ground.read(captions), taught.to(self.device))

    def encode_split(self, split: Split) -> EncodedPairs:
        """All pairs of a split."""
        self.ground.to(self.device)  # after training, Lightning moves the module without them
        pixels, captions = resident_data(self).whole(split)
        pictures = ResidentPictures(pixels, self.device)
        return self.encode(pictures.take(torch.arange(len(pictures), device=self.device)), captions)

    def training_step(self, batch: PairPositions, batch_idx: int) -> Tensor:
        """Flow loss of one batch; withheld and dropped captions are empty."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        generator = device_generator(self.device, self.hparams["seed"], NOISE, *key)
        pairs = self._train.rows(batch["index"])
        sigmas = draw_sigmas(len(pairs.tokens), self.sigmas, generator)
        noise = torch.randn(pairs.tokens.shape, generator=generator, device=self.device)
        chance = torch.rand(len(sigmas), generator=generator, device=self.device)
        is_read = pairs.taught & (chance >= self.hparams["caption_dropout"])  # (B,)
        text = FluxText(
            torch.where(is_read[:, None, None], pairs.text.states, self._empty.states),
            torch.where(is_read[:, None], pairs.text.pooled, self._empty.pooled),
        )
        condition = Condition(text)
        loss = flow_loss(self.flux, None, pairs.tokens, noise, sigmas, condition, self.grid).mean()
        if is_log_step(self.trainer):
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """Flow loss of held-out pairs under noise that is the same every time."""
        self._evaluate("val", batch)

    def test_step(self, batch: TextImageBatch, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: Literal["val", "test"], batch: TextImageBatch) -> None:
        pairs = self.encode(batch["image"], batch["caption_full"])
        self.val_loss.update(self.level_losses(pairs, batch["index"]).mean(1))
        self.log(f"{stage}/loss", self.val_loss, prog_bar=True)

    @torch.no_grad()
    def level_losses(self, pairs: EncodedPairs, index: Tensor) -> Tensor:
        """Flow losses (B, 5) at fixed noise levels, each with its own caption.

        Args:
            pairs: Encoded.
            index: (B,) their positions, key of the noise.
        """
        noise = self._noise(EVALUATION, index)
        losses = []
        for level in _LEVELS:
            sigmas = noise.new_full((len(noise),), level)
            condition = Condition(pairs.text)
            losses.append(
                flow_loss(self.flux, None, pairs.tokens, noise, sigmas, condition, self.grid)
            )
        return torch.stack(losses, 1)

    def _noise(self, stream: int, index: Tensor) -> Tensor:
        """Noise (B, L, K), each item's by its position."""
        seed, tokens = self.hparams["seed"], self.grid[0] * self.grid[1]
        generators = [device_generator(self.device, seed, stream, i) for i in index.tolist()]
        return draw_noise(generators, (tokens, self.shape.in_channels))

    def paint(self, text: FluxText, index: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] from text alone; their noise is keyed by position."""
        noise = self._noise(SAMPLES, index)
        tokens = sample(self.flux, None, Condition(text), noise, self.grid, self.sampling)
        return self.ground.pictures(tokens, self.grid)

    def figures(self) -> dict[str, float]:
        """Flow losses of held-out, taught and withheld pairs, and how well text alone draws them.

        ``*_pixel_r1_of_100`` is the share of pictures, drawn from a training caption alone, that
        are nearer to that caption's own picture than to 99 others, by their pixels.
        """
        held_out = self.encode_split("test")
        positions = torch.arange(len(held_out.tokens))
        losses = self.level_losses(held_out, positions)
        names = [f"held_out_flow_loss_at_{level:g}" for level in _LEVELS]
        found = dict(zip(names, losses.mean(0).tolist(), strict=True))
        found["held_out_flow_loss"] = float(losses.mean())
        taught = self._train.taught.cpu()
        found["taught_captions"] = float(taught.sum())
        for name, chosen in (("taught", taught), ("withheld", ~taught)):
            index = chosen.nonzero().flatten()[: self.hparams["figure_pictures"]]
            if len(index) >= 2:
                found |= {f"{name}_{key}": v for key, v in self._text_alone(index).items()}
        return found

    def _text_alone(self, index: Tensor) -> dict[str, float]:
        """What FLUX makes of some training pairs (M,)."""
        pairs = self._train.rows(index.to(self.device))
        drawn = self.paint(pairs.text, index)
        pictures = self.ground.pictures(pairs.tokens, self.grid)
        ranks = grouped_ranks(drawn, pictures, torch.arange(len(index)), centre=pictures.mean(0))
        return {
            "flow_loss": float(self.level_losses(pairs, index).mean()),
            "pixel_r1_of_100": recall(ranks, 1),
        }

    def parts(self) -> list[FoundationPart]:
        """FLUX."""
        return [FoundationPart(FLUX, self.flux, self.shape)]

    def recipe(self) -> Recipe:
        """How it was trained, and on which frozen networks."""
        return training_recipe(self, self.optimisation) | {
            "caption_share": float(self.hparams["caption_share"]),
            "caption_dropout": float(self.hparams["caption_dropout"]),
            "sigmas": f"{self.sigmas.kind}, mean {self.sigmas.mean}, std {self.sigmas.std}",
            "language_model_sha256": self.ground.identities[LANGUAGE],
            "vae_sha256": self.ground.identities[VAE],
        }

    def save_texts(self, folder: Path) -> None:
        """Nothing: the tokenizer is the language model's."""

    def draw(self) -> list[tuple[str, Tensor]]:
        """Rows of pictures, and beneath them what FLUX draws of their captions alone."""
        rows: list[tuple[str, Tensor]] = []
        held_out, taught = self.encode_split("test"), self._train.taught
        everything = torch.ones_like(held_out.taught)
        groups = {
            "taught": (self._train, taught),
            "withheld": (self._train, ~taught),
            "unseen": (held_out, everything),
        }
        for name, (source, chosen) in groups.items():
            pairs = source.rows(chosen.nonzero().flatten()[:_SHOWN])
            if not len(pairs.tokens):
                continue
            drawn = self.paint(pairs.text, torch.arange(len(pairs.tokens)))
            pictures = self.ground.pictures(pairs.tokens, self.grid)
            rows += [(name, pictures), ("text alone", drawn)]
        return rows

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; warm-up and cosine to zero by optimiser step."""
        options = self.optimisation
        return warmup_cosine_steps(self, self._groups(), options.warmup_steps, options.beta2)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.optimisation
        return parameter_groups(self.named_parameters(), options.lr, options.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the identities of the frozen networks in place of their weights."""
        checkpoint["foundation_identities"] = dict(self.ground.identities)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win, and refuse other frozen networks.

        Raises:
            CheckpointError: If the checkpoint was trained on others.
        """
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        for name, stored in checkpoint.get("foundation_identities", {}).items():
            if stored != self.ground.identities[name]:
                raise CheckpointError(
                    f"{name} {self.ground.identities[name][:12]}: the checkpoint learnt from "
                    f"{str(stored)[:12]}; give the same files (model.folder, model.vae_folder)"
                )
