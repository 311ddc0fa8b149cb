"""Writes predicted features of clouds, and clouds in their colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from rich.console import Console

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.cloud_drawing import draw_cloud, pca_colours
from lightning_modules.cloud_features import PredictedFeatures
from lightning_modules.cloud_writing import write_npz, write_ply
from lightning_modules.pictures import write_png


class CloudFeatureWriter(BasePredictionWriter):
    """Writes <run>/predictions/<cloud>.npz, <cloud>-features.ply and <cloud>-features.png.

    The npz holds coord (M, 3) as in the file and feat (M, C); the PLY the same points, coloured by
    the three leading principal components of the features: alike is what the encoder finds alike.

    Args:
        folder: Name of the folder in the run directory.
        dtype: Type of the stored features.
        per_point: Whether every point of the file gets a row; otherwise feat has a row for each
            voxel, and inverse (M,) says which is whose.
        size: Width and height of the picture in pixels.
    """

    def __init__(
        self,
        folder: str = "predictions",
        dtype: Literal["float16", "float32"] = "float16",
        per_point: bool = True,
        size: tuple[int, int] = (960, 720),
    ) -> None:
        super().__init__(write_interval="batch")
        self.folder, self.dtype, self.per_point = folder, dtype, per_point
        self.size = (size[0], size[1])

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401 - Lightning's own signature
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one cloud.

        Raises:
            TypeError: If ``predict_step`` did not return features of a cloud.
            ValueError: If a feature is not finite, or beyond the type's range.
        """
        if not isinstance(prediction, PredictedFeatures):
            raise TypeError(
                f"{type(pl_module).__name__}.predict_step returned {type(prediction).__name__}: "
                "CloudFeatureWriter needs PredictedFeatures, as of CloudFeatures"
            )
        for note in prediction.notes:
            Console().print(note, soft_wrap=True, highlight=False, markup=False)
        if is_trial(trainer):
            return
        stem = Path(trainer.default_root_dir) / self.folder / prediction.name
        coord, inverse = prediction.coord.cpu().numpy(), prediction.inverse.cpu().numpy()
        feat = self._stored(prediction)
        if self.per_point:
            arrays = {"coord": coord, "feat": feat[inverse]}
        else:
            arrays = {"coord": coord, "feat": feat, "inverse": inverse}
        write_npz(stem.with_name(f"{stem.name}.npz"), arrays)
        colour = pca_colours(prediction.feat)[inverse]
        write_ply(stem.with_name(f"{stem.name}-features.ply"), coord, colour)
        picture = Image.fromarray(draw_cloud(coord, colour, self.size))
        write_png(picture, stem.with_name(f"{stem.name}-features.png"))

    def _stored(self, prediction: PredictedFeatures) -> np.ndarray[Any, np.dtype[Any]]:
        """Features (n, C) in the type they are stored in."""
        stored = prediction.feat.cpu().to(getattr(torch, self.dtype))
        if not bool(stored.isfinite().all()):
            most = float(prediction.feat.abs().max())
            raise ValueError(
                f"{prediction.name}: features reach {most:.4g}, not finite as {self.dtype}; store "
                "float32 (CloudFeatureWriter.dtype), or check the encoder's weights"
            )
        return stored.numpy()
