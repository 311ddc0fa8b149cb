"""Coloured clouds of a segmentation test: what is there, and what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.cloud_drawing import class_colours, draw_cloud, label_colours
from lightning_modules.cloud_writing import write_ply
from lightning_modules.pictures import draw_grid, from_bytes, write_png
from lightning_modules.segmented_clouds import SegmentedCloud

_FONT_SIZE = 15


class SegmentationClouds(Callback):
    """Writes the first clouds of ``test`` as PLY files in class colours, and a picture of them.

    The files are <run>/clouds/<split>/<scene>-{truth,prediction}.ply, each with the property
    label, and <run>/pictures/segmentation-<split>.png. Grey points have no class.

    Args:
        clouds: Most clouds.
        size: Width and height of a drawn cloud in pixels.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, clouds: int = 4, size: tuple[int, int] = (360, 270)) -> None:
        if clouds < 1:
            raise ValueError(f"clouds={clouds}: must be >= 1")
        if min(size) < 16:
            raise ValueError(f"size={tuple(size)}: must be a width and a height >= 16")
        self.clouds, self.size = clouds, (size[0], size[1])
        self._kept: list[SegmentedCloud] = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._kept = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's own signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the clouds of this batch that are among the first.

        Raises:
            TypeError: If ``test_step`` did not return segmented clouds.
        """
        if not isinstance(outputs, list) or not all(
            isinstance(cloud, SegmentedCloud) for cloud in outputs
        ):
            raise TypeError(
                f"{type(pl_module).__name__}.test_step returned {type(outputs).__name__}: "
                "SegmentationClouds needs a list of SegmentedCloud, as of PointSegmentation"
            )
        # The first rank has the first scenes.
        if trainer.is_global_zero:
            self._kept += outputs[: self.clouds - len(self._kept)]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was kept."""
        kept, self._kept = self._kept, []
        if not kept or is_trial(trainer):
            return
        data = cast("Any", trainer).datamodule
        run, classes = Path(trainer.default_root_dir), data.num_classes
        for cloud in kept:
            _write(cloud, run / "clouds" / data.test_name, classes)
        columns = [cloud.name for cloud in kept]
        picture = draw_grid(self._draw(kept, classes), columns=columns, scale=1)
        picture = _with_legend(picture, data.class_names)
        file = run / "pictures" / f"segmentation-{data.test_name}.png"
        write_png(picture, file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("test/clouds", [str(file)])

    def _draw(self, clouds: Sequence[SegmentedCloud], classes: int) -> list[tuple[str, Tensor]]:
        """A row of true and one of predicted classes, images in [-1, 1]."""
        rows = []
        for title, name in (("truth", "truth"), ("prediction", "predicted")):
            images = []
            for cloud in clouds:
                colour = label_colours(getattr(cloud, name).numpy(), classes)
                image = draw_cloud(cloud.coord.numpy(), colour, self.size)
                images.append(from_bytes(torch.from_numpy(image).permute(2, 0, 1)))
            rows.append((title, torch.stack(images)))
        return rows


def _with_legend(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """The picture with the names of classes, each behind its colour, in lines below it."""
    font = ImageFont.load_default(_FONT_SIZE)
    places, x, y = [], _FONT_SIZE, picture.height
    for name in names:
        width = round(font.getlength(name)) + 3 * _FONT_SIZE
        if x + width > picture.width and x > _FONT_SIZE:
            x, y = _FONT_SIZE, y + 2 * _FONT_SIZE
        places.append((x, y))
        x += width
    paper = Image.new("RGB", (picture.width, y + 2 * _FONT_SIZE), "white")
    paper.paste(picture)
    draw = ImageDraw.Draw(paper)
    for name, colour, (x, y) in zip(names, class_colours(len(names)), places, strict=True):
        draw.rectangle((x, y, x + _FONT_SIZE, y + _FONT_SIZE), fill=tuple(colour.tolist()))
        draw.text((x + 1.4 * _FONT_SIZE, y), name, fill="black", font=font)
    return paper


def _write(cloud: SegmentedCloud, folder: Path, classes: int) -> None:
    for title, labels in (("truth", cloud.truth), ("prediction", cloud.predicted)):
        numbers = labels.numpy()
        write_ply(
            folder / f"{cloud.name}-{title}.ply",
            cloud.coord.numpy(),
            label_colours(numbers, classes),
            scalars={"label": numbers.astype("i4")},
        )
