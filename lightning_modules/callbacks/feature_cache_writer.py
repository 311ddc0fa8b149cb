"""Writes the features of all images of a split to disk, once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from torch import Tensor

from datamodules.errors import DataError
from datamodules.feature_origin import FeatureOrigin
from datamodules.feature_shards import (
    SPLITS,
    FeatureShard,
    next_number,
    open_cache,
    open_split,
    shard_path,
    write_shard,
)
from datamodules.readers.protocol import Split
from lightning_modules.callbacks.run_checkpoint import is_trial
from lightning_modules.feature_extraction import ExtractedFeatures, FeatureExtraction

_HALF_LIMIT = torch.finfo(torch.float16).max
# An image that is passed over gives None on purpose; an OrderedLoader has no indices to infer.
_EXPECTED = ("predict returned None", "Couldn't infer the batch indices")


class FeatureCacheWriter(BasePredictionWriter):
    """Writes ``<folder>/<split>/features-rank<r>-<number>.safetensors`` for `TokenFeatures`.

    The split is the data module's ``predict_split``. A shard appears when it is whole, so a
    stopped call goes on behind the last one, on any number of processes; these share the folder.
    Features of another encoder, layer, type or of other images are refused.

    Args:
        folder: Folder of the features of all splits.
        dtype: Type of the stored tokens; float16 is finer, but ends at 65504.
        shard_images: Images after which a shard is closed, with the batch that reaches them.
        train_config: Configuration that the closing line proposes for training on the features.

    Raises:
        ValueError: ``shard_images`` is out of range.
    """

    def __init__(
        self,
        folder: Path,
        dtype: Literal["bfloat16", "float16"] = "bfloat16",
        shard_images: int = 512,
        train_config: Path = Path("configs/token_reduction/demo.yaml"),
    ) -> None:
        super().__init__(write_interval="batch")
        if shard_images < 1:
            raise ValueError(f"shard_images={shard_images}: must be >= 1")
        self.folder = Path(folder)
        self.dtype = dtype
        self.shard_images = shard_images
        self.train_config = train_config
        self._split: Split = "train"
        self._num_images = 0
        self._origin: FeatureOrigin | None = None
        self._waiting: list[dict[str, Tensor]] = []
        self._is_complete = False

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what earlier calls have written.

        Raises:
            TypeError: The model is not `FeatureExtraction`, or the data not what it encodes.
            DataError: The folder holds damaged features, or others than this call would write.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, FeatureExtraction):
            raise TypeError(
                f"{type(pl_module).__name__}: FeatureCacheWriter needs FeatureExtraction"
            )
        if getattr(data, "predict_split", None) not in SPLITS:
            raise TypeError(
                f"{type(data).__name__}: FeatureCacheWriter needs data with predict_split, one of "
                f"{', '.join(SPLITS)}, as DocumentsAndPhotographs"
            )
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        self._split = cast("Any", data).predict_split
        self._num_images = len(cast("Any", trainer.predict_dataloaders).dataset)
        self._origin = self._describe(trainer, pl_module, data)
        self._waiting, self._is_complete = [], False
        shards = self._earlier_shards()
        for shard in shards:
            pl_module.pass_over(shard.index.tolist())
        trainer.strategy.barrier("FeatureCacheWriter.start")

    def _describe(
        self,
        trainer: Trainer,
        module: FeatureExtraction,
        data: Any,  # noqa: ANN401 - any data module with these attributes
    ) -> FeatureOrigin:
        return FeatureOrigin(
            layer=module.encoder.layer,
            encoder=module.encoder.identity,
            attention_layer=module.attention_layer,
            grid=tuple(data.grid),
            dtype=self.dtype,
            precision=str(trainer.precision),
            data=data.data_fingerprint,
            seed=getattr(data, "seed", 0),
            source_name=data.source_name,
            kind_names=tuple(data.kind_names),
            region_names=tuple(data.region_names),
            scene_names=tuple(data.scene_names),
        )

    def _earlier_shards(self) -> list[FeatureShard]:
        """Finished shards of this split, once it is clear that those of all splits fit."""
        splits = open_cache(self.folder)
        for shards in splits.values():
            difference = shards[0].origin.difference(cast("FeatureOrigin", self._origin))
            if difference is None and shards[0].split == self._split:
                sizes = (str(shards[0].num_images), str(self._num_images))
                difference = None if sizes[0] == sizes[1] else ("num_images", *sizes)
            if difference is not None:
                name, earlier, now = difference
                raise DataError(
                    f"{shards[0].path}: its features were made with {name}={earlier}, now it is "
                    f"{now}; name a new folder (FeatureCacheWriter.folder), or remove this one"
                )
        return splits.get(self._split, [])

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: ExtractedFeatures | None,
        batch_indices: Sequence[int] | None,
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Take the features of a batch, and write a shard when there are enough.

        Raises:
            ValueError: The type cannot hold a feature, or the labels are of another grid.
        """
        if prediction is None:
            return
        origin = cast("FeatureOrigin", self._origin)
        if prediction.grid != origin.grid:
            raise ValueError(
                f"grid={origin.grid}: the encoder gives {prediction.grid} tokens; set the data's "
                "patch_size to that of the encoder (data.init_args.patch_size)"
            )
        stored = cast("dict[str, Tensor]", dict(prediction.batch))
        stored["tokens"] = store_tokens(stored["tokens"], self.dtype)
        self._waiting.append({name: tensor.cpu() for name, tensor in stored.items()})
        if sum(len(part["index"]) for part in self._waiting) >= self.shard_images:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Write what is waiting as one shard."""
        parts, self._waiting = self._waiting, []
        if not parts or is_trial(trainer):
            return
        number = next_number(self.folder, self._split, trainer.global_rank)
        path = shard_path(self.folder, self._split, trainer.global_rank, number)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        origin = cast("FeatureOrigin", self._origin)
        write_shard(path, tensors, origin, self._split, self._num_images)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rest."""
        self._write(trainer)
        trainer.strategy.barrier("FeatureCacheWriter.end")
        self._is_complete = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what there is now, and how to train on it.

        Raises:
            DataError: What was written cannot be read again.
        """
        if not self._is_complete or not trainer.is_global_zero or is_trial(trainer):
            return
        self._is_complete = False
        shards = open_split(self.folder, self._split)
        count = sum(len(shard.index) for shard in shards)
        size = sum(shard.size for shard in shards)
        known = f"{count}" if count == self._num_images else f"{count} of {self._num_images}"
        line = (
            f"{self._split}: {known} images, {size / 1e6:.1f} MB in {self.folder}; train on them: "
            f"python train.py fit --config {self.train_config} "
            f"--data datamodules.token_features.TokenFeatures --data.root {self.folder}"
        )
        Console().print(line, soft_wrap=True, highlight=False, markup=False)


def store_tokens(tokens: Tensor, dtype: Literal["bfloat16", "float16"]) -> Tensor:
    """Tokens (B, L, C) in the type they are stored in.

    Raises:
        ValueError: If one is not finite, or beyond the type's range.
    """
    if not tokens.isfinite().all():
        raise ValueError("the encoder gives features that are NaN or infinite; check its weights")
    stored = tokens.to(getattr(torch, dtype))
    if not stored.isfinite().all():
        least, most = tokens.float().flatten(0, 1).aminmax(dim=0)  # (C,) each
        channel = int(torch.maximum(-least, most).argmax())
        raise ValueError(
            f"dtype={dtype}: channel {channel} of the features reaches from {least[channel]:.4g} "
            f"to {most[channel]:.4g}, beyond {_HALF_LIMIT:.0f}; store bfloat16 "
            "(FeatureCacheWriter.dtype)"
        )
    return stored
