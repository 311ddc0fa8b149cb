"""Segmentation of point clouds on a pre-trained encoder: linear probe, decoder or fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from datamodules.keyed_random import keyed_generator
from datamodules.paired_2d3d.labelled_batch import LabelledBatch
from lightning_modules.backbone_files import choose_backbone
from lightning_modules.feature_statistics import merge_statistics
from lightning_modules.logging_steps import is_log_step
from lightning_modules.lovasz import lovasz_softmax
from lightning_modules.metrics.segmentation_scores import segmentation_scores
from lightning_modules.optimizers import adamw_one_cycle, keep_configured_rates
from lightning_modules.point_segmentation_options import SegmentationOptimisation, check_probe
from lightning_modules.randomness import NOISE
from lightning_modules.schedules import one_cycle_momentum
from lightning_modules.segmented_clouds import SegmentedCloud, point_classes, segmented_clouds
from models.concerto.clouds import PointCloud
from models.concerto.decoder import DecoderShape
from models.concerto.encoder import EncoderShape
from models.concerto.segmenter import PointSegmenter, ProbeMode, single_clouds
from models.concerto.serialization import draw_orders

IGNORED = -1


class PointSegmentation(LightningModule):
    """Semantic segmentation on the features of Concerto (section 4 of arXiv 2510.23607).

    Logs ``train/loss``, ``train/cross_entropy`` and ``train/lovasz``; on the points of the files,
    after the nearest voxel, ``val/miou`` (mean over the classes that occur), ``val/macc``,
    ``val/allacc``, and the same for test.

    A cloud is encoded alone wherever its orders are fixed: its result does not depend on the
    clouds beside it.

    Args:
        num_classes: Number of classes (taken from the data).
        pretrained: Run directory, checkpoint or released file with the encoder; null starts from
            random weights.
        shape: Sizes of the encoder; with ``pretrained`` they may be left out, but given they let a
            trained checkpoint be tested where that file is not.
        mode: linear (one layer on the features of all levels of a frozen encoder), decoder (a
            decoder on a frozen encoder) or full (decoder and encoder are trained).
        decoder: Sizes of the decoder.
        optimisation: Optimiser, schedule and losses.
        drop_path: Whether branches are dropped at random in training, in a frozen encoder too, as
            in the released code.
        shuffle_orders: Whether the curves' order is drawn anew for every training batch.
        standardise: Whether each feature channel is brought to mean 0 and deviation 1 over the
            training clouds (ours; only linear).
        cache_features: Whether a training cloud is encoded only the first time (ours; only linear,
            with unchanging clouds, fixed orders and no drop path); the result is the same.
        label: What the run is called in tables; its directory's name without the time if empty.
        seed: Key of all randomness here (taken from seed_everything).

    Raises:
        ValueError: If options contradict each other.
        FileNotFoundError: If there is no ``pretrained`` and no ``shape``.
        CheckpointError: If ``pretrained`` cannot be used.
    """

    def __init__(
        self,
        num_classes: int,
        pretrained: Path | None = None,
        shape: EncoderShape | None = None,
        mode: ProbeMode = "linear",
        decoder: DecoderShape = DecoderShape(),  # noqa: B008 - frozen
        optimisation: SegmentationOptimisation = SegmentationOptimisation(),  # noqa: B008 - frozen
        drop_path: bool = True,
        shuffle_orders: bool = True,
        standardise: bool = False,
        cache_features: bool = False,
        label: str = "",
        seed: int = 0,
    ) -> None:
        super().__init__()
        shape = EncoderShape(**shape) if isinstance(shape, dict) else shape
        decoder = DecoderShape(**decoder) if isinstance(decoder, dict) else decoder
        if isinstance(optimisation, dict):
            optimisation = SegmentationOptimisation(**optimisation)
        self.save_hyperparameters(logger=False)
        check_probe(num_classes, mode, standardise, cache_features, drop_path or shuffle_orders)
        self.optimisation = optimisation
        pretrained = None if pretrained is None else Path(pretrained)
        self._lacks_weights = pretrained is not None and not pretrained.exists()
        backbone = choose_backbone(pretrained, shape)
        self.hparams.update(
            pretrained=None if pretrained is None else str(pretrained),
            shape=asdict(backbone.shape),
            decoder=asdict(decoder),
            optimisation=asdict(optimisation),
        )
        self.network = PointSegmenter(
            backbone, num_classes, mode, decoder, standardise=standardise, drop_path=drop_path
        )
        self.confusion = nn.ModuleDict(
            {
                stage: MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED)
                for stage in ("val", "test")
            }
        )
        self._cache: dict[int, Tensor] = {}

    def on_fit_start(self) -> None:
        """Measure the features' statistics, unless a checkpoint brought them.

        Raises:
            FileNotFoundError: If ``pretrained`` is gone, and no checkpoint makes up for it.
            ValueError: If features are to be cached, but training clouds change.
        """
        if self._lacks_weights:
            raise FileNotFoundError(
                f"model.init_args.pretrained={self.hparams['pretrained']}: no such file or run "
                "directory; correct the path, or leave it out to start from random weights"
            )
        data = cast("Any", self.trainer).datamodule
        if self.hparams["cache_features"] and not data.is_fixed:
            raise ValueError(
                "cache_features=true: training clouds change in every epoch; set "
                "data.init_args.augment to false (model.init_args.cache_features)"
            )
        self._cache = {}
        standardiser = self.network.standardiser
        if standardiser is None or bool(standardiser.fitted):
            return
        raw: dict[int, Tensor] = {}
        self.network.eval()
        for batch in data.train_eval_dataloader():
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            clouds = single_clouds(_joint_cloud(batch))
            for index, cloud in zip(batch["index"].tolist(), clouds, strict=True):
                features = self.network.raw_features(cloud)
                standardiser.update(features)
                if self.hparams["cache_features"]:
                    raw[index] = features.cpu()
        self.network.train()
        merge_statistics(standardiser, self.trainer.world_size)
        for index in list(raw):
            self._cache[index] = standardiser(raw.pop(index).to(self.device)).cpu()

    def forward(self, batch: LabelledBatch, orders: Tensor | None = None) -> Tensor:
        """Logits (N, classes) of the voxels of a batch.

        Args:
            batch: Clouds.
            orders: (levels, 4) permutations of the curves, for clouds that are encoded together;
                None encodes each alone in the fixed order.
        """
        if orders is not None:
            return cast("Tensor", self.network(_joint_cloud(batch), orders))
        if self.training and self.hparams["cache_features"]:
            parts = [self.network.head(own) for own in self._fixed_features(batch)]
        else:
            parts = [self.network(cloud) for cloud in single_clouds(_joint_cloud(batch))]
        return torch.cat(parts)

    def _fixed_features(self, batch: LabelledBatch) -> Iterator[Tensor]:
        """Features (n, C) of each training cloud alone, kept if they are to be cached."""
        clouds = single_clouds(_joint_cloud(batch))
        for index, cloud in zip(batch["index"].tolist(), clouds, strict=True):
            known = self._cache.get(index)
            features = self.network.features(cloud) if known is None else known.to(self.device)
            if known is None:
                self._cache[index] = features.cpu()
            yield features

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Cross-entropy and Lovász-softmax over the voxels with a class."""
        orders = None
        if self.hparams["shuffle_orders"]:
            key = (self.hparams["seed"], NOISE, self.current_epoch, batch_idx, self.global_rank)
            orders = draw_orders(self.network.backbone.shape.levels, keyed_generator(*key))
        loss, parts = self._loss(self(batch, orders), batch["segment"])
        if is_log_step(self.trainer):
            size = len(batch["offset"])
            self.log("train/loss", loss, prog_bar=True, batch_size=size)
            self.log_dict(parts, batch_size=size)
        return loss

    def _loss(self, logits: Tensor, segment: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = logits.float()
        counted = (segment != IGNORED).sum().clamp(min=1)
        entropy = F.cross_entropy(logits, segment, ignore_index=IGNORED, reduction="sum") / counted
        lovasz = lovasz_softmax(logits.softmax(1), segment, IGNORED)
        parts = {"train/cross_entropy": entropy.detach(), "train/lovasz": lovasz.detach()}
        return entropy + self.optimisation.lovasz * lovasz, parts

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        self.matrix("val").reset()

    def on_test_epoch_start(self) -> None:
        """Begin to count anew."""
        self.matrix("test").reset()

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Count the points of the files by class and predicted class."""
        self.matrix("val").update(self.predict_points(batch), batch["original_segment"])

    def test_step(  # type: ignore[override]  # Lightning hands any output to callbacks
        self, batch: LabelledBatch, batch_idx: int
    ) -> list[SegmentedCloud]:
        """The same; the predictions are for callbacks."""
        predicted = self.predict_points(batch)
        self.matrix("test").update(predicted, batch["original_segment"])
        return segmented_clouds(predicted, batch)

    def predict_points(self, batch: LabelledBatch) -> Tensor:
        """Classes (M,) of the points of the files; probabilities are averaged over copies."""
        return point_classes(self(batch).float().softmax(1), batch)

    def matrix(self, stage: Literal["val", "test"]) -> MulticlassConfusionMatrix:
        """Numbers of points by true and predicted class."""
        return cast("MulticlassConfusionMatrix", self.confusion[stage])

    def on_validation_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores."""
        self._log_scores("test")

    def _log_scores(self, stage: Literal["val", "test"]) -> None:
        scores = segmentation_scores(self.matrix(stage).compute())
        for name in ("miou", "macc", "allacc"):
            value = getattr(scores, name)
            self.log(f"{stage}/{name}", value, prog_bar=name == "miou", sync_dist=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the first momentum coefficient of this step."""
        step, total = self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
        beta1 = one_cycle_momentum(step, max(1, total), self.optimisation.warmup_share)
        for group in optimizer.param_groups:
            group["betas"] = (beta1, group["betas"][1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the one-cycle schedule by optimiser step."""
        options = self.optimisation
        total = max(1, int(self.trainer.estimated_stepping_batches))
        course = (options.warmup_share, options.start_divisor, options.end_divisor)
        return adamw_one_cycle(self._groups(), total, options.weight_decay, course)

    def _groups(self) -> list[dict[str, Any]]:
        """What is trained; in full fine-tuning blocks have a rate of their own."""
        options = self.optimisation
        blocks: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                is_block = self.network.mode == "full" and ".block" in name
                (blocks if is_block else others).append(parameter)
        groups: list[dict[str, Any]] = [{"params": others, "lr": options.lr}]
        if blocks:
            groups.append({"params": blocks, "lr": options.lr * options.block_factor})
        return groups

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let configured rates win; a checkpoint brings the encoder's weights along."""
        keep_configured_rates(checkpoint, [group["lr"] for group in self._groups()])
        self._lacks_weights = False


def _joint_cloud(batch: LabelledBatch) -> PointCloud:
    """All clouds of a batch as the encoder takes them: coordinates, colour, normal."""
    feat = torch.cat([batch["coord"], batch["colour"], batch["normal"]], 1)  # (N, 9)
    return PointCloud(batch["coord"], feat, batch["offset"], batch["grid_coord"])
