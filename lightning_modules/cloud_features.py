"""Features of the user's own clouds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from datamodules.clouds import CloudFileBatch
from lightning_modules.backbone_files import read_backbone
from models.concerto.clouds import PointCloud
from models.concerto.encoder import EncodedLevel, up_cast


class PredictedFeatures(NamedTuple):
    """Features of one cloud: n voxels of C channels, M points of the file.

    Attributes:
        name: Of the cloud.
        feat: (n, C) float32 of each voxel.
        inverse: (M,) int64, voxel of each point of the file.
        coord: (M, 3) float64, as in the file.
        notes: Lines about what the file lacked.
    """

    name: str
    feat: Tensor
    inverse: Tensor
    coord: Tensor
    notes: list[str]


class CloudFeatures(LightningModule):
    """Encodes the clouds that predict goes through; there is nothing to train.

    The curves keep their order, so equal files give equal features.

    Args:
        pretrained: Run directory, checkpoint or released file with the encoder.
        levels: Times that features are laid beside those of the next finer level, counted from
            the coarsest; further down they are only repeated. 2 as in the released demo; null
            takes all.

    Raises:
        ValueError: If ``levels`` is more than the encoder has.
        FileNotFoundError: If there is no such file.
        CheckpointError: If it holds no encoder of points.
    """

    def __init__(self, pretrained: Path, levels: int | None = 2) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hparams["pretrained"] = str(pretrained)
        self.backbone = read_backbone(Path(pretrained)).requires_grad_(False).eval()
        most = self.backbone.shape.levels - 1
        if levels is not None and not 0 <= levels <= most:
            raise ValueError(
                f"levels={levels}: the encoder has {most} levels to go up (model.init_args.levels)"
            )
        self.levels: int = most if levels is None else levels

    def predict_step(self, batch: CloudFileBatch, batch_idx: int) -> PredictedFeatures:
        """Features of one cloud."""
        feat = torch.cat([batch["coord"], batch["colour"], batch["normal"]], 1)  # (n, 9)
        cloud = PointCloud(batch["coord"], feat, batch["offset"], batch["grid_coord"])
        features = finest_features(self.backbone(cloud), self.levels)
        return PredictedFeatures(
            batch["name"],
            features.float(),
            batch["inverse"],
            batch["original_coord"],
            batch["notes"],
        )

    def setup(self, stage: str) -> None:
        """Say what this class is for.

        Raises:
            ValueError: If this is no prediction.
        """
        if stage != "predict":
            self.training_step()

    def training_step(self, *args: Any) -> NoReturn:  # noqa: ANN401 - Lightning's own signature
        """Say what this class is for.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "CloudFeatures only encodes clouds, it does not train: call predict; to train use "
            "lightning_modules.concerto.ConcertoPretraining or PointSegmentation"
        )

    # Lightning asks for both before it calls setup.
    configure_optimizers = training_step


def finest_features(levels: list[EncodedLevel], count: int) -> Tensor:
    """Features of every row of the finest level.

    Args:
        levels: Of an encoder, finest first.
        count: Up-casts that lay features side by side; those after them only repeat.

    Returns:
        (N, sum of the widths of the ``count + 1`` coarsest levels).
    """
    features = up_cast(levels, count)
    for number in range(len(levels) - 1 - count, 0, -1):
        inverse = levels[number].inverse
        if inverse is None:
            raise ValueError(f"level {number} has no inverse: pass the levels finest first")
        features = features[inverse]
    return features
