"""Encodes the images of paired scenes once, so that training need not encode them again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.paired_2d3d.image_features import (
    DESCRIPTION,
    FEATURES,
    ImageFeatures,
    write_description,
)
from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.progress import progress_bar


class ImageFeatureStore(Callback):
    """Writes ``features.npy`` and ``features.json`` of all images of the data, then reads those.

    Only for images that are not augmented, which is the paper's main setting. The folder is named
    after the encoder's identity, so another encoder never meets these features; what is there
    already is used as it is, and appears only when it is whole. All processes share the work.

    Args:
        folder: Parent of the features; none takes ``<root>-features`` beside the data's root.
        batch_size: Images encoded at a time.

    Raises:
        ValueError: If ``batch_size`` is out of range.
    """

    def __init__(self, folder: Path | None = None, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be >= 1")
        self.folder = folder
        self.batch_size = batch_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Encode what is missing and let the data module read it.

        Raises:
            TypeError: If the module is not `ConcertoPretraining`.
        """
        if not isinstance(pl_module, ConcertoPretraining):
            raise TypeError(
                f"{type(pl_module).__name__}: ImageFeatureStore serves ConcertoPretraining"
            )
        if not pl_module.weights.cross or pl_module.encoder is None or stage == "predict":
            return
        data = cast("Any", trainer).datamodule
        root = Path(data.root_folder).resolve()
        parent = self.folder or root.with_name(f"{root.name}-features")
        folder = Path(parent) / pl_module.encoder.identity
        if not _covers(folder, data.image_paths()):
            self._encode(trainer, pl_module, folder)
        trainer.strategy.barrier("ImageFeatureStore.setup")
        data.use_image_features(folder)

    @torch.no_grad()
    def _encode(self, trainer: Trainer, module: ConcertoPretraining, folder: Path) -> None:
        """Write the features of all images; the file that names them comes last."""
        data, encoder = cast("Any", trainer).datamodule, cast("Any", module.encoder)
        encoder.to(trainer.strategy.root_device)
        paths: tuple[str, ...] = data.image_paths()
        # A name of its own for each run: two may begin at once.
        number = trainer.strategy.broadcast(os.getpid())
        temporary = folder / f".{FEATURES}.{number}.partial"
        grid = encoder.grid(*encoder.image_size)
        shape = (len(paths), grid[0] * grid[1], encoder.channels)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape).flush()
        trainer.strategy.barrier("ImageFeatureStore.open")
        stored = np.lib.format.open_memmap(temporary, mode="r+")
        loader = data.image_batches(paths, self.batch_size)
        with progress_bar(trainer.is_global_zero and bool(trainer.progress_bar_callback)) as bar:
            for batch in bar.track(loader, total=len(loader), description="Encoding images"):
                images = batch["image"].to(trainer.strategy.root_device) * 2 - 1
                tokens = encoder(images).tokens.half().cpu().numpy()
                stored[batch["image_index"].numpy()] = tokens
        stored.flush()
        trainer.strategy.barrier("ImageFeatureStore.close")
        if trainer.is_global_zero:
            os.replace(temporary, folder / FEATURES)
            write_description(
                folder, encoder=encoder.identity, grid=grid, channels=encoder.channels, images=paths
            )


def _covers(folder: Path, paths: tuple[str, ...]) -> bool:
    """Whether all images have been encoded; images that came to the data since have not."""
    if not (folder / DESCRIPTION).is_file():
        return False
    return set(paths) <= set(ImageFeatures(folder).images)
