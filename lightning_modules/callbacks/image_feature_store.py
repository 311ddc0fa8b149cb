"""Encodes the images of paired scenes once, so that training need not encode them again."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.errors import DataError
from datamodules.paired_2d3d.image_features import FEATURES, write_description
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.concerto import ConcertoPretraining
from lightning_modules.progress import progress_bar


class ImageFeatureStore(Callback):
    """Writes ``features.npy`` and ``features.json`` of all images of the data, then reads those.

    Only for images that are not augmented, which is the paper's main setting. The folder's name
    changes with the encoder and with names and sizes of the images, so neither another encoder nor
    other data ever meets these features, and it appears only when it is whole. All processes share
    the work; runs that begin at once do not disturb each other.

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
        """Encode the images unless that is done, and let the data module read the features.

        Raises:
            TypeError: If the module is not `ConcertoPretraining`.
            ValueError: If images are augmented, or the encoder has another grid of patches.
            DataError: If there is no room for the features.
        """
        if not isinstance(pl_module, ConcertoPretraining):
            raise TypeError(
                f"{type(pl_module).__name__}: ImageFeatureStore serves ConcertoPretraining"
            )
        if not pl_module.weights.cross or pl_module.encoder is None or is_trial(trainer):
            return
        data = cast("Any", trainer).datamodule
        if not data.image_paths():
            return
        pl_module.check_patch_grid(data)
        if data.image_augmentation.is_on:
            raise ValueError(
                f"image_augmentation={data.image_augmentation}: stored features are of unchanged "
                "images; switch the chances off, or leave ImageFeatureStore out"
            )
        root = Path(data.root_folder).resolve()
        parent = Path(self.folder or root.with_name(f"{root.name}-features"))
        images = _image_digest(root, data.image_paths(), data.patch_pixels)
        folder = parent / f"{pl_module.encoder.identity}-{images}"
        # Decided by one process: the folder may appear between two looks.
        if trainer.strategy.broadcast(not folder.is_dir()):
            self._encode(trainer, pl_module, folder)
        data.use_image_features(folder)

    def _encode(self, trainer: Trainer, module: ConcertoPretraining, folder: Path) -> None:
        """Write the folder under a name of its own, then give it its name."""
        data, encoder = cast("Any", trainer).datamodule, cast("Any", module.encoder)
        paths: tuple[str, ...] = data.image_paths()
        grid, number = module.shape.patch_grid, trainer.strategy.broadcast(uuid.uuid4().hex)
        temporary = folder.with_name(f".{folder.name}.{number}.partial")
        try:
            if trainer.is_global_zero:
                _make_room(temporary, (len(paths), grid[0] * grid[1], encoder.channels))
            trainer.strategy.barrier("ImageFeatureStore.open")
            self._write_rows(trainer, module, temporary / FEATURES, paths)
            trainer.strategy.barrier("ImageFeatureStore.close")
            if trainer.is_global_zero:
                write_description(
                    temporary,
                    encoder=encoder.identity,
                    grid=grid,
                    channels=encoder.channels,
                    images=paths,
                )
                _publish(temporary, folder)
        finally:
            if trainer.is_global_zero:
                shutil.rmtree(temporary, ignore_errors=True)
        trainer.strategy.barrier("ImageFeatureStore.done")

    @torch.no_grad()
    def _write_rows(
        self, trainer: Trainer, module: ConcertoPretraining, file: Path, paths: tuple[str, ...]
    ) -> None:
        """Encode this process's share of the images."""
        device = trainer.strategy.root_device
        stored = np.lib.format.open_memmap(file, mode="r+")
        loader = cast("Any", trainer).datamodule.image_batches(paths, self.batch_size)
        with progress_bar(trainer.is_global_zero and bool(trainer.progress_bar_callback)) as bar:
            for batch in bar.track(loader, total=len(loader), description="Encoding images"):
                tokens = module.encode_images(batch["image"].to(device))
                stored[batch["image_index"].numpy()] = tokens.half().cpu().numpy()
        stored.flush()


def _image_digest(root: Path, paths: tuple[str, ...], patch_pixels: int) -> str:
    """16 hexadecimal digits that change with what the images are and how they are resized."""
    digest = hashlib.sha256(f"{patch_pixels}\n".encode())
    for path in paths:
        digest.update(f"{path}\t{(root / path).stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _make_room(folder: Path, shape: tuple[int, int, int]) -> None:
    """Make a folder with a file for features of this shape.

    Raises:
        DataError: If the disk is too full.
    """
    folder.mkdir(parents=True)
    needed = shape[0] * shape[1] * shape[2] * np.dtype(np.float16).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder.parent}: the features of {shape[0]} images need {needed / 2**30:.1f} GiB, "
            f"but {free / 2**30:.1f} GiB are free; choose another ImageFeatureStore.folder, or "
            "leave it out"
        )
    np.lib.format.open_memmap(folder / FEATURES, mode="w+", dtype=np.float16, shape=shape).flush()


def _publish(temporary: Path, folder: Path) -> None:
    """Give a folder its name, unless another run was first."""
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
