"""Writes rendered camera paths as pictures and animations, and the scenes they came from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_modules.animation import HOW_TO_GET_MP4, check_speed, write_animation
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.clift import Clift
from models.clift.scene_file import StoredScene, network_identity, save_scene


class CameraPathWriter(BasePredictionWriter):
    """Writes ``<run>/predictions/<scene>/``: frames, an animation and the scene's tokens.

    ``frame-0000.png`` and on, ``path.gif`` (and ``path.mp4`` where imageio-ffmpeg is installed),
    and ``scene.safetensors``, from which ``python -m lightning_modules.scene_rendering`` makes
    other views later without the pictures.

    Args:
        folder: Name of the folder in the run directory.
        frames_per_second: Speed of the animation.
        half: Store tokens in float16, half the size.

    Raises:
        ValueError: ``frames_per_second`` is out of range.
    """

    def __init__(
        self, folder: str = "predictions", frames_per_second: float = 15.0, half: bool = False
    ) -> None:
        super().__init__(write_interval="batch")
        check_speed(frames_per_second)
        self.folder = folder
        self.frames_per_second = frames_per_second
        self.half = half
        self._identity = ""
        self._told = False

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Identify the network, whose tokens no other can render."""
        if not isinstance(pl_module, Clift):
            raise TypeError(f"{type(pl_module).__name__}: CameraPathWriter writes CLiFT only")
        self._identity = network_identity(pl_module.network)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write every scene of a batch."""
        if is_trial(trainer):
            return
        for row, name in enumerate(batch["scene"]):
            # A name is a stranger's: it must not lead out of the folder.
            safe = re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "scene"
            folder = Path(trainer.default_root_dir) / self.folder / safe
            shown = batch["target"]["valid"][row]
            frames = prediction["image"][row][shown]
            if not write_animation(folder, frames, self.frames_per_second) and not self._told:
                rank_zero_info(HOW_TO_GET_MP4)
                self._told = True
            stored = _stored_scene(prediction, batch, row, self._identity)
            save_scene(folder / "scene.safetensors", stored, self.half)


def _stored_scene(
    prediction: dict[str, Any], batch: dict[str, Any], row: int, identity: str
) -> StoredScene:
    stored, context = prediction["stored"], batch["context"]
    kept, shown = stored.valid[row], context["valid"][row]
    height, width = context["image"].shape[-2:]
    return StoredScene(
        tokens=stored.tokens[row][kept].float(),
        rays=stored.rays[row][kept],
        camera=stored.camera[row][kept],
        pose=context["pose"][row][shown],
        intrinsics=context["intrinsics"][row][shown],
        distortion=context["distortion"][row][shown],
        normalisation=batch["normalisation"][row],
        height=height,
        width=width,
        network=identity,
        notes={"scene": str(batch["scene"][row])},
    )
