"""Test metrics of class-conditional samples: accuracy by a judge, and Fréchet distance."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.metrics.frechet import FrechetDistance
from lightning_modules.metrics.judge import Judge, JudgedData, train_judge
from lightning_modules.metrics.sample_accuracy import SampleAccuracy
from lightning_modules.metrics.statistics import load_reference_statistics
from lightning_modules.pictures import draw_curves, write_png


class DrawsGuidedSamples(Protocol):
    """A module that draws class-conditional images at a chosen guidance scale."""

    def draw_samples(self, labels: Tensor, seed: int, scale: float | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] of labels (B,)."""


class SampleQuality(Callback):
    """Draws class-balanced samples at several guidance scales and measures them in ``test``.

    Logs, for each scale w: ``test/accuracy_w<w>``, the share of samples that a small classifier
    trained on the real train split assigns to the class asked for, and
    ``test/frechet_<extractor>_w<w>``; also the classifier's accuracy on real test images, above
    which an accuracy means typical rather than better samples, and the Fréchet distance of as many
    real training images, below which no sampler of so few images can be expected.

    Args:
        samples_per_class: Samples of each class for each scale.
        guidance_scales: Guidance scales w; 0 is unguided.
        judge: Whether to train and ask the classifier (images of 8 to 64 pixels).
        frechet_resolution: Resolution of EfficientNet-Lite0's view of the images; null for no
            Fréchet distance unless Inception weights are given.
        inception_weights: Weights file of torch-fidelity's Inception, to use it instead.
        reference: Statistics of the real images (npz with mu and sigma, as ADM ships them)
            instead of the test split.
        batch_size: Samples drawn at a time.
        judge_cache: Folder of trained judges; null keeps them beside the runs of the method.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        samples_per_class: int = 50,
        guidance_scales: Sequence[float] = (0.0, 1.0, 2.0),
        judge: bool = True,
        frechet_resolution: int | None = 96,
        inception_weights: Path | None = None,
        reference: Path | None = None,
        batch_size: int = 100,
        judge_cache: Path | None = None,
    ) -> None:
        if samples_per_class < 1 or batch_size < 1:
            raise ValueError(
                f"samples_per_class={samples_per_class}, batch_size={batch_size}: must be >= 1"
            )
        if any(scale < 0 for scale in guidance_scales):
            raise ValueError(f"guidance_scales={list(guidance_scales)}: must be >= 0")
        self.samples_per_class = samples_per_class
        self.guidance_scales = tuple(guidance_scales)
        self.judge = judge
        self.frechet_resolution = frechet_resolution
        self.inception_weights = inception_weights
        self.reference = reference
        self.batch_size = batch_size
        self.judge_cache = judge_cache
        self._judge: Judge | None = None
        self._frechet: FrechetDistance | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train the judge, or read it from its cache, and set up the Fréchet distance."""
        if self.judge:
            cache = self.judge_cache or Path(trainer.default_root_dir).parent / "judges"
            self._judge = train_judge(_datamodule(trainer), cache).to(pl_module.device)
        self._frechet = self._build_frechet(pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the real images to the Fréchet distance."""
        if self._frechet is not None and self.reference is None:
            self._frechet.update(batch["image"], real=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and measure the samples at every scale."""
        results = {}
        if self._judge is not None:
            results["test/judge_accuracy_on_real"] = self._judge.accuracy
        for scale in self.guidance_scales:
            results |= self._measure(trainer, pl_module, scale)
        if self._frechet is not None:
            results |= self._measure_floor(trainer, self._frechet)
        pl_module.log_dict(results)
        if self._judge is not None and len(self.guidance_scales) > 1 and trainer.is_global_zero:
            self._draw_curve(Path(trainer.default_root_dir), results)

    def _draw_curve(self, run: Path, results: dict[str, float]) -> None:
        """Write accuracy against guidance scale to ``pictures/guidance.png``."""
        judge = cast("Judge", self._judge)
        points = [(w, results[f"test/accuracy_w{w:g}"]) for w in sorted(self.guidance_scales)]
        picture = draw_curves(
            {"samples": points},
            "guidance scale w",
            "accuracy by the judge",
            levels={"real test images": judge.accuracy},
        )
        write_png(picture, run / "pictures" / "guidance.png")

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, scale: float
    ) -> dict[str, float]:
        accuracy = SampleAccuracy(self._judge).to(pl_module.device) if self._judge else None
        sampler = cast("DrawsGuidedSamples", pl_module)
        for first, labels in self._requests(trainer):
            labels = labels.to(pl_module.device)
            with trainer.precision_plugin.forward_context():
                images = sampler.draw_samples(labels, first, scale).float()
            if accuracy is not None:
                accuracy.update(images, labels)
            if self._frechet is not None:
                self._frechet.update(images, real=False)
        results = {}
        if accuracy is not None:
            results[f"test/accuracy_w{scale:g}"] = float(accuracy.compute())
        if self._frechet is not None:
            name = f"test/{self._frechet.metric_name}_w{scale:g}"
            results[name] = float(self._frechet.compute())
            self._frechet.reset_generated()
        return results

    def _measure_floor(self, trainer: Trainer, frechet: FrechetDistance) -> dict[str, float]:
        """Distance of as many real training images: few samples alone make it large."""
        wanted = sum(len(labels) for _, labels in self._requests(trainer))
        for batch in _datamodule(trainer).train_eval_dataloader():
            images = batch["image"][:wanted].to(frechet.device)
            if len(images):
                frechet.update(images, real=False)
            wanted -= len(images)
            if wanted <= 0:
                break
        results = {f"test/{frechet.metric_name}_real_train": float(frechet.compute())}
        frechet.reset_generated()
        return results

    def _requests(self, trainer: Trainer) -> Iterator[tuple[int, Tensor]]:
        """This rank's batches: index of the first sample, and labels that take turns."""
        classes = _datamodule(trainer).num_classes
        total = self.samples_per_class * classes
        per_rank = math.ceil(total / trainer.world_size)
        start = trainer.global_rank * per_rank
        for first in range(start, min(start + per_rank, total), self.batch_size):
            last = min(first + self.batch_size, start + per_rank, total)
            yield first, torch.arange(first, last) % classes

    def _build_frechet(self, pl_module: LightningModule) -> FrechetDistance | None:
        reference = load_reference_statistics(self.reference) if self.reference else None
        if self.inception_weights is not None:
            from models.layers.inception import InceptionFeatures

            inception = InceptionFeatures(self.inception_weights)
            return FrechetDistance(inception, reference=reference).to(pl_module.device)
        if self.frechet_resolution is None:
            return None
        from models.layers.efficientnet_lite0 import EfficientNetLite0Features

        lite = EfficientNetLite0Features(self.frechet_resolution)
        return FrechetDistance(lite, reference=reference).to(pl_module.device)


def _datamodule(trainer: Trainer) -> JudgedData:
    data = getattr(trainer, "datamodule", None)
    if data is None:
        raise ValueError("SampleQuality needs a datamodule: it gives the classes and real images")
    return cast("JudgedData", data)
