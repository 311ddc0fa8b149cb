"""Writes generated images as files with an index of what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.pictures import to_pil, write_png

_IMAGE_KEYS = ("image", "label", "index")


class PredictionWriter(BasePredictionWriter):
    """Writes ``<run>/predictions/000042.png`` for sample 42, and ``index.json`` when all are there.

    ``predict_step`` returns image (B, C, H, W) in [-1, 1], label (B,) and index (B,), the number
    of each sample among those of all ranks. Anything else in its dict, such as guidance settings,
    goes into the index once as it is.

    The index reads ``{"settings": {...}, "samples": [{"index", "label", "class", "file"}, ...]}``.
    Every rank writes its images and its part of the index; rank 0 merges the parts, so the run
    directory has to be on a file system that all ranks share.

    Args:
        folder: name of the folder in the run directory.
    """

    def __init__(self, folder: str = "predictions") -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._samples: list[dict[str, Any]] = []
        self._settings: dict[str, Any] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an earlier call wrote."""
        self._samples, self._settings = [], {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,  # noqa: ANN401  # whatever predict_step returned
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401  # whatever the datamodule yields
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes the images of one batch.

        Raises:
            TypeError: ``predict_step`` did not return image, label and index.
        """
        _check(prediction, pl_module)
        if is_trial(trainer):
            return
        names = getattr(getattr(trainer, "datamodule", None), "class_names", ())
        columns = (prediction[key].cpu() for key in _IMAGE_KEYS)
        for image, label, index in zip(*columns, strict=True):
            file = f"{int(index):06d}.png"
            write_png(to_pil(image), self._directory(trainer) / file)
            name = names[int(label)] if int(label) < len(names) else str(int(label))
            sample = {"index": int(index), "label": int(label), "class": str(name), "file": file}
            self._samples.append(sample)
        self._settings |= {k: v for k, v in prediction.items() if k not in _IMAGE_KEYS}

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the index; a picture that only an earlier index lists is removed."""
        if is_trial(trainer):
            return
        directory = self._directory(trainer)
        parts = [directory / f"index-rank{rank}.json" for rank in range(trainer.world_size)]
        own = {"settings": self._settings, "samples": self._samples}
        _write_json(parts[trainer.global_rank], own)
        trainer.strategy.barrier("predictions")
        if trainer.is_global_zero:
            _merge(parts, directory / "index.json")

    def _directory(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.folder


def _check(prediction: object, pl_module: LightningModule) -> None:
    if not isinstance(prediction, Mapping) or not all(
        isinstance(prediction.get(key), Tensor) for key in _IMAGE_KEYS
    ):
        raise TypeError(
            f"{type(pl_module).__name__}.predict_step returned {type(prediction).__name__}: "
            "PredictionWriter needs a dict with tensors image, label and index"
        )


def _merge(parts: Sequence[Path], index: Path) -> None:
    contents = [json.loads(part.read_text(encoding="utf-8")) for part in parts]
    settings = {key: value for content in contents for key, value in content["settings"].items()}
    # A sampler that evens out the ranks may hand the same sample to two of them.
    samples = {sample["index"]: sample for content in contents for sample in content["samples"]}
    kept = {sample["file"] for sample in samples.values()}
    for file in _listed_files(index) - kept:
        (index.parent / file).unlink(missing_ok=True)
    ordered = [samples[number] for number in sorted(samples)]
    _write_json(index, {"settings": settings, "samples": ordered})
    for part in parts:
        part.unlink()


def _listed_files(index: Path) -> set[str]:
    """Names in an earlier index, if there is one that can be read; never a path elsewhere."""
    try:
        samples = json.loads(index.read_text(encoding="utf-8"))["samples"]
        return {Path(sample["file"]).name for sample in samples}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
