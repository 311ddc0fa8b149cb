"""The test of a latent ControlNet: are its pictures those of the latents and captions?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules.bifrost_controlnet import BifrostControlNet
from lightning_modules.bifrost_drawing import PartClock
from lightning_modules.bifrost_results import GenerationRow, log_generation, report_generation
from lightning_modules.callbacks.latent_table import SPLITS, Split, check_sweep, decoding_sweep
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.metrics.picture_retrieval import PictureJudge

TRUE, WRONG_TEXT, GENERATED = "true latents", "true latents, another's text", "generated latents"
TEXT_ALONE, AUTOENCODER = "text alone", "autoencoder"


class _Samples(NamedTuple):
    """Pictures of a split: all are the gallery, the first ones are drawn.

    Attributes:
        captions: Of those that are drawn.
        images: (P, 3, H, W) the true ones of these.
        keys: Of their noise.
        judge: Knows all pictures of the gallery.
        gallery: Number of these.
    """

    captions: list[str]
    images: Tensor
    keys: list[tuple[int, ...]]
    judge: PictureJudge
    gallery: int


class BifrostTable(Callback):
    """Draws pictures of training and held-out captions and lets a foreign encoder find them.

    Rows: the autoencoder's own reconstruction; pictures from true latents; the same with the
    caption of another picture; from latents that the branch generates of the caption, for each
    number of steps and guidance; and by FLUX from the caption alone. The encoder is EfficientNet-
    Lite0 with its ImageNet weights. Prints the table and writes it to ``<run>/bifrost``. All
    processes do the same work: test on one.

    Args:
        steps: Decoding steps K of the branch; null stands for N, one for each token.
        guidance: Weights of the caption in decoding; 1 is without guidance.
        pictures: Pictures of each split that are drawn for every row.
        gallery: True pictures of each split among which they are looked for.
        stride: Of the encoder's feature map, see `PictureJudge`.
        judge_size: Side in pixels at which the encoder sees pictures.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        steps: tuple[int | None, ...] = (1, 8, None),
        guidance: tuple[float, ...] = (1.0, 1.5),
        pictures: int = 100,
        gallery: int = 2000,
        stride: Literal[8, 16, 32] = 16,
        judge_size: int = 96,
    ) -> None:
        check_sweep(steps, guidance)
        if not 1 <= pictures <= gallery:
            raise ValueError(f"pictures={pictures}: must be from 1 to gallery={gallery}")
        self.steps, self.guidance = tuple(steps), tuple(guidance)
        self.pictures, self.gallery = pictures, gallery
        self.stride: Literal[8, 16, 32] = stride
        self.judge_size = judge_size

    @torch.no_grad()
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, print the table and write it."""
        if not isinstance(pl_module, BifrostControlNet) or is_trial(trainer):
            return
        rows: list[GenerationRow] = []
        notes: list[str] = []
        with trainer.precision_plugin.forward_context():
            for name, split in SPLITS:
                samples = self._samples(trainer, pl_module, split)
                found = list(self._rows(pl_module, name, samples))
                rows += found
                notes += _notes(name, found, samples)
        for row in rows:
            pl_module.log(f"test/r1_group_{row.name}", row.figures["r1_group"])
            pl_module.log(f"test/r1_{row.name}", row.figures["r1"])
        if pl_module.generator is None:
            notes.append("no branch was given: no pictures from generated latents (model.branch)")
        if trainer.is_global_zero:
            self._report(trainer, pl_module, rows, notes)

    def _report(
        self,
        trainer: Trainer,
        module: BifrostControlNet,
        rows: list[GenerationRow],
        notes: list[str],
    ) -> None:
        extra = {
            "source": cast("Any", trainer).datamodule.source_name,
            "sampling": module.hparams["sampling"],
            "judge": f"EfficientNet-Lite0, stride {self.stride}, {self.judge_size} pixels",
        }
        report_generation(rows, Path(trainer.default_root_dir), "pictures", notes, extra)
        log_generation(trainer.loggers, rows, "test/bifrost")

    def _samples(self, trainer: Trainer, module: BifrostControlNet, split: Split) -> _Samples:
        batch = cast("Any", trainer).datamodule.gallery(split, self.gallery)
        images = batch["image"].to(module.device)
        return _Samples(
            batch["caption_full"][: self.pictures],
            images[: self.pictures],
            [(number,) for number in batch["index"][: self.pictures].tolist()],
            PictureJudge(images, self.stride, self.judge_size),
            len(images),
        )

    def _rows(
        self, module: BifrostControlNet, split: str, samples: _Samples
    ) -> Iterator[GenerationRow]:
        painter, drawing = module.painter, module.drawing
        captions, keys, count = samples.captions, samples.keys, len(samples.captions)
        parts = torch.split(samples.images, drawing.chunk)
        encoded = [painter.encode(part) for part in parts]
        restored = torch.cat([painter.decode(part, module.grid) for part in encoded])
        yield GenerationRow(split, AUTOENCODER, samples.judge.rate(restored), {})
        latents = torch.cat([module.foundation.latents(part) for part in parts])
        others = captions[1:] + captions[:1]
        for source, texts, given in (
            (TRUE, captions, latents),
            (WRONG_TEXT, others, latents),
            (TEXT_ALONE, captions, None),
        ):
            clock = PartClock()
            pictures = drawing.paint(texts, given, keys, clock)
            seconds = clock.seconds_each(count)
            yield GenerationRow(split, source, samples.judge.rate(pictures), seconds)
        if module.generator is None:
            return
        for options in decoding_sweep(module.foundation.tower.tokens, self.steps, self.guidance):
            clock = PartClock()
            with clock.measure("latents"):
                generated = module.generator.generate(captions, keys, options, drawing.chunk)
            pictures = drawing.paint(captions, generated, keys, clock)
            seconds = clock.seconds_each(count)
            figures = samples.judge.rate(pictures)
            settings = (options.steps, options.guidance)
            yield GenerationRow(split, GENERATED, figures, seconds, *settings)


def _notes(split: str, rows: list[GenerationRow], samples: _Samples) -> list[str]:
    """What the rows of a split say."""
    first = {row.source: row.figures["r1_group"] for row in reversed(rows)}
    gain = 100 * (first[TRUE] - first[TEXT_ALONE])
    return [
        f"{split}: R@1 by chance {100 / samples.gallery:.2f} % of {samples.gallery}, "
        f"{len(samples.captions)} drawn; the ControlNet's gain over text alone "
        f"{gain:+.1f} points of R@1 among 100"
    ]
