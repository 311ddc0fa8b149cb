"""Pictures of what a point-cloud encoder tells apart, while it is being pre-trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.callbacks.run_checkpoint import is_training_validation, is_trial
from lightning_modules.cloud_drawing import CloudView, draw_cloud, pca_colours
from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.pictures import draw_grid, from_bytes, write_png
from models.concerto.clouds import PointCloud, grid_coordinates
from models.concerto.encoder import up_cast


class DrawnCloud(NamedTuple):
    """A cloud with two sets of colours.

    Attributes:
        coord: (N, 3) metres.
        colour: (N, 3) bytes, as photographed.
        features: (N, 3) bytes, the three leading principal components of the student's features.
    """

    coord: NDArray[np.float32]
    colour: NDArray[np.uint8]
    features: NDArray[np.uint8]


class CloudPictures(Callback):
    """Writes ``<run>/pictures/clouds-step000123.png`` and sends the clouds to W&B as Object3D.

    A row is a validation cloud as photographed and in the colours of the student's features of all
    levels: points of one colour are alike to the encoder.

    Args:
        clouds: Most rows.
        most_points: Points of a cloud beyond which every k-th one is taken.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, clouds: int = 3, most_points: int = 60000) -> None:
        if clouds < 1:
            raise ValueError(f"clouds={clouds}: must be >= 1")
        if most_points < 1:
            raise ValueError(f"most_points={most_points}: must be >= 1")
        self.clouds, self.most_points = clouds, most_points

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw after every validation of training.

        Raises:
            TypeError: If the module is not `ConcertoPretraining`.
        """
        if not isinstance(pl_module, ConcertoPretraining):
            raise TypeError(f"{type(pl_module).__name__}: CloudPictures draws Concerto only")
        if not trainer.is_global_zero or is_trial(trainer) or not is_training_validation(trainer):
            return
        data = cast("Any", trainer).datamodule
        count = min(self.clouds, data.cloud_count())
        drawn = [self._colour(pl_module, data.whole_cloud(i)) for i in range(count)]
        rows = [
            ("", torch.stack([_draw(c.coord, c.colour), _draw(c.coord, c.features)])) for c in drawn
        ]
        picture = draw_grid(rows, columns=["photographed", "features"])
        name = f"clouds-step{trainer.global_step:06d}.png"
        write_png(picture, Path(trainer.default_root_dir) / "pictures" / name)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("val/clouds", [picture], step=trainer.global_step)
                _log_objects(logger, drawn, trainer.global_step)

    @torch.no_grad()
    def _colour(self, module: ConcertoPretraining, cloud: Any) -> DrawnCloud:  # noqa: ANN401
        """Colours of a whole cloud (coord, colour in [0, 1], normal)."""
        stride = -(-len(cloud.coord) // self.most_points)
        coord, colour, normal = (
            torch.from_numpy(np.ascontiguousarray(part[::stride])).float().to(module.device)
            for part in (cloud.coord, cloud.colour, cloud.normal)
        )
        lowest, highest = coord.amin(0), coord.amax(0)
        middle = torch.cat(((lowest + highest)[:2] / 2, lowest[2:]))  # as the views are centred
        centred = coord - middle
        points = PointCloud(
            coord=centred,
            feat=torch.cat((centred, colour, normal), 1),  # (N, 9)
            offset=torch.tensor([len(coord)], device=module.device),
            grid_coord=grid_coordinates(centred, module.hparams["grid_size"]),
            origin_coord=None,
        )
        backbone = module.network.student.backbone
        was_training = backbone.training
        levels = backbone.eval()(points)
        backbone.train(was_training)
        features = up_cast(levels, len(levels) - 1)  # (N, sum of channels)
        shown = (255 * colour.clamp(0, 1)).round().to(torch.uint8).cpu().numpy()
        return DrawnCloud(coord.cpu().numpy(), shown, pca_colours(features.float()))


def _draw(coord: NDArray[np.float32], colour: NDArray[np.uint8]) -> Tensor:
    """Picture (3, H, W) in [-1, 1]."""
    image = draw_cloud(coord, colour, view=CloudView(elevation=50.0))
    return from_bytes(torch.from_numpy(image).permute(2, 0, 1))


def _log_objects(logger: WandbLogger, drawn: list[DrawnCloud], step: int) -> None:
    import wandb

    objects = [wandb.Object3D(np.concatenate([c.coord, c.features], 1)) for c in drawn]
    logger.experiment.log({"val/features": objects, "trainer/global_step": step})
