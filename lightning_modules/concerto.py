"""Pre-training of Concerto: a point-cloud encoder learns from itself and from images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from datamodules.paired_2d3d.batch import PairedBatch
from lightning_modules.cli.errors import CheckpointError
from lightning_modules.concerto_batches import (
    pretraining_views,
    sum_over_ranks,
    training_features,
)
from lightning_modules.concerto_options import ConcertoCourse, ConcertoOptimisation, rebuilt
from lightning_modules.concerto_schedules import (
    layer_rates,
    linear_warmup,
)
from lightning_modules.feature_statistics import merge_statistics
from lightning_modules.logging_steps import is_log_step
from lightning_modules.optimizers import adamw_one_cycle, keep_configured_rates
from lightning_modules.randomness import EVALUATION, NOISE, device_generator
from lightning_modules.schedules import cosine, one_cycle_momentum
from models.concerto.pretraining import (
    Concerto,
    LossWeights,
    PretrainingShape,
    PretrainingTerms,
    PretrainingViews,
    StepDraws,
    StepSettings,
)
from models.image_encoders.frozen_encoder import FrozenEncoder
from models.layers.standardiser import FeatureStandardiser

# Terms of the loss, and the names of their weights.
_TERMS = {"mask": "mask", "roll_mask": "roll", "unmask": "unmask", "cross": "cross"}


class ConcertoPretraining(LightningModule):
    """Joint 2D-3D self-supervised pre-training (arXiv 2510.23607).

    Logs the sum of the losses and each term unweighted (``train/loss``, ``train/mask``,
    ``train/roll_mask``, ``train/unmask``, ``train/cross``), what they are made of (``train/cosine``
    of predicted and encoded patches, ``train/prototypes_used``: exponential of the entropy of the
    prototypes nearest to the teacher's points) and the values in force, ``course/*``; in validation
    the same terms.

    Args:
        shape: Sizes of encoder, heads and patch grid.
        encoder: Frozen image encoder of the cross-modal loss; its weights are no part of the
            checkpoint, its identity is. Not needed if the loss has no cross-modal term.
        weights: Weights of the four losses; terms of weight 0 are not computed, so that
            (2/8, 2/8, 4/8, 0) is Sonata and (0, 0, 0, 4/8) learns from images alone.
        optimisation: Optimiser and schedule.
        course: Masks, teacher temperature and teacher momentum by step.
        standardise_targets: Whether each channel of the image features is brought to mean 0 and
            deviation 1 over the training images first (ours, for encoders whose features are not
            normalised; the paper's are).
        statistics_images: Images that give these means and deviations.
        grid_size: Side of the voxels in metres (taken from the data).
        seed: Key of all randomness here (taken from seed_everything).
    """

    def __init__(
        self,
        shape: PretrainingShape,
        encoder: FrozenEncoder | None = None,
        weights: LossWeights = LossWeights(),  # noqa: B008 - frozen
        optimisation: ConcertoOptimisation = ConcertoOptimisation(),  # noqa: B008 - frozen
        course: ConcertoCourse = ConcertoCourse(),  # noqa: B008 - frozen
        standardise_targets: bool = False,
        statistics_images: int = 256,
        grid_size: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["encoder"], logger=False)
        shape = rebuilt(PretrainingShape, shape)
        self.weights = rebuilt(LossWeights, weights)
        self.optimisation = rebuilt(ConcertoOptimisation, optimisation)
        self.course = rebuilt(ConcertoCourse, course)
        if self.weights.cross and encoder is None:
            raise ValueError(
                "encoder=null: the cross-modal loss needs an image encoder; give one "
                "(model.encoder) or set its weight to 0 (model.weights.cross)"
            )
        # In a tuple, so that its weights are no part of the checkpoint.
        self._encoder = (encoder,)
        if encoder is not None:
            grid = encoder.grid(*encoder.image_size)
            shape = replace(shape, image_channels=encoder.channels, patch_grid=grid)
        self.hparams.update(
            shape=asdict(shape),
            weights=asdict(self.weights),
            optimisation=asdict(self.optimisation),
            course=asdict(self.course),
        )
        self.shape = shape
        self.network = Concerto(shape, self.weights)
        self.target_standardiser = (
            FeatureStandardiser(shape.image_channels) if standardise_targets else None
        )
        computed = [name for name, weight in _TERMS.items() if getattr(self.weights, weight)]
        self.val_terms = nn.ModuleDict({name: MeanMetric() for name in ("loss", *computed)})

    @property
    def encoder(self) -> FrozenEncoder | None:
        """The frozen image encoder."""
        return self._encoder[0]

    def setup(self, stage: str) -> None:
        """See `check_patch_grid`."""
        self.check_patch_grid(cast("Any", self.trainer).datamodule)

    def check_patch_grid(self, data: Any) -> None:  # noqa: ANN401 - any data of paired scenes
        """Compare the patches of the data with those of the image encoder.

        Raises:
            ValueError: If points are linked to patches of another grid than the encoder's.
        """
        grid = tuple(getattr(data, "patch_grid", self.shape.patch_grid))
        if self.weights.cross and grid != self.shape.patch_grid:
            raise ValueError(
                f"patch_grid={grid}: the image encoder gives {self.shape.patch_grid} patches; set "
                f"data.init_args.patch_grid to {list(self.shape.patch_grid)}"
            )

    def on_fit_start(self) -> None:
        """Measure the statistics of the image features, unless a checkpoint brought them."""
        standardiser = self.target_standardiser
        if standardiser is None or not self.weights.cross or bool(standardiser.fitted):
            return
        data, images = cast("Any", self.trainer).datamodule, self.hparams["statistics_images"]
        for tokens in training_features(data, images, self.encode_images, self.device):
            standardiser.update(tokens)
        merge_statistics(standardiser, self.trainer.world_size)

    @torch.no_grad()
    def image_tokens(self, batch: PairedBatch) -> Tensor:
        """Features (I, P, D) of the images of a batch, or those that it already holds."""
        if "image_tokens" in batch:
            return batch["image_tokens"].float()
        return self.encode_images(batch["image"])

    def encode_images(self, images: Tensor) -> Tensor:
        """Features (I, P, D) of images (I, 3, H, W) in [0, 1]."""
        encoder = cast("FrozenEncoder", self.encoder)
        if not len(images):
            return images.new_zeros(0, math.prod(self.shape.patch_grid), encoder.channels)
        tokens: Tensor = encoder(images * 2 - 1).tokens
        return tokens.float()

    def views(self, batch: PairedBatch) -> PretrainingViews:
        """The batch as the network takes it: 9 channels (coordinates, colour, normal)."""
        tokens = None
        if self.weights.cross:
            tokens = self.image_tokens(batch)
            if self.target_standardiser is not None and len(tokens):
                tokens = self.target_standardiser(tokens)
        return pretraining_views(batch, tokens)

    def settings(self, step: int | None = None) -> StepSettings:
        """Mask and temperature of an optimiser step, counted from 0; None takes the last ones."""
        course, total = self.course, 1 if step is None else self._total_steps()
        at = (total if step is None else step, total, course.warmup_share)
        return StepSettings(
            mask_size=linear_warmup(*at, *course.mask_size),
            mask_ratio=linear_warmup(*at, *course.mask_ratio),
            teacher_temperature=linear_warmup(*at, *course.teacher_temperature),
            grid_size=self.hparams["grid_size"],
        )

    def _total_steps(self) -> int:
        return max(1, int(self.trainer.estimated_stepping_batches))

    def training_step(self, batch: PairedBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses of one batch."""
        key = (self.current_epoch, batch_idx, self.global_rank)
        draws = StepDraws(device_generator(self.device, self.hparams["seed"], NOISE, *key))
        settings = self.settings(self.trainer.global_step)
        reduce = sum_over_ranks if self.trainer.world_size > 1 else None
        terms: PretrainingTerms = self.network(self.views(batch), settings, draws, reduce=reduce)
        if is_log_step(self.trainer):
            self._log_terms(terms, settings)
        return terms.loss

    def _log_terms(self, terms: PretrainingTerms, settings: StepSettings) -> None:
        self.log("train/loss", terms.loss, prog_bar=True)
        for name, value in terms.measured().items():
            self.log(f"train/{name}", value)
        for name in ("mask_size", "mask_ratio", "teacher_temperature"):
            self.log(f"course/{name}", float(getattr(settings, name)))
        self.log("course/momentum", self.momentum(self.trainer.global_step))

    def momentum(self, step: int) -> float:
        """Momentum of the teacher after an optimiser step, counted from 0."""
        return cosine(step, self._total_steps(), *self.course.momentum)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set weight decay and first momentum coefficient of this step."""
        options, step, total = self.optimisation, self.trainer.global_step, self._total_steps()
        beta1 = one_cycle_momentum(step, total, options.warmup_share)
        for group in optimizer.param_groups:
            group["weight_decay"] = cosine(step, total, *options.weight_decay)
            if options.cycle_momentum:
                group["betas"] = (beta1, group["betas"][1])

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Make a step and let the teacher follow, ahead of anything that saves both."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.network.update_teacher(self.momentum(self.trainer.global_step))

    def validation_step(self, batch: PairedBatch, batch_idx: int) -> None:
        """The losses of the validation rooms, under masks that are the same every time."""
        self._evaluate("val", batch)

    def test_step(self, batch: PairedBatch, batch_idx: int) -> None:
        """As in validation."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: PairedBatch) -> None:
        numbers = batch["index"].tolist()
        key = (self.hparams["seed"], EVALUATION, *numbers)
        draws = StepDraws(device_generator(self.device, *key))
        terms: PretrainingTerms = self.network(self.views(batch), self.settings(), draws)
        values = {"loss": terms.loss, **terms.measured()}
        for name, module in self.val_terms.items():
            metric = cast("MeanMetric", module)
            # Also where a batch shows no images, as the other processes wait for this one.
            metric.update(values.get(name, 0.0), len(numbers) if name in values else 0)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "loss")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a rate for each block; the one-cycle schedule by optimiser step."""
        options, total = self.optimisation, self._total_steps()
        course = (options.warmup_share, options.start_divisor, options.end_divisor)
        return adamw_one_cycle(self._groups(), total, options.weight_decay[0], course)

    def _groups(self) -> list[dict[str, Any]]:
        options = self.optimisation
        named = [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]
        rates = layer_rates(named, self.shape.encoder.depths, options.lr, options.layer_decay)
        groups: dict[float, list[nn.Parameter]] = {}
        for (_, parameter), rate in zip(named, rates, strict=True):
            groups.setdefault(rate, []).append(parameter)
        return [{"params": groups[rate], "lr": rate} for rate in sorted(groups)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the image encoder's identity in place of its weights."""
        checkpoint["encoder_identity"] = None if self.encoder is None else self.encoder.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win, and refuse the features of another image encoder.

        Raises:
            CheckpointError: If the checkpoint was trained on another encoder's features.
        """
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        stored = checkpoint.get("encoder_identity")
        own = None if self.encoder is None else self.encoder.identity
        if stored is not None and own is not None and stored != own:
            raise CheckpointError(
                f"encoder {own}: the checkpoint learnt from features of {stored}; give the same "
                "image encoder, weights and layer (model.encoder)"
            )
