"""Stored features of images: training without encoding the images again."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from datamodules.errors import DataError
from datamodules.feature_origin import FeatureOrigin
from datamodules.feature_shards import FeatureShard, open_cache
from datamodules.feature_split import FeatureSplit
from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
    keyed_generator,
)
from datamodules.module_loaders import ordered_loader, training_loader
from datamodules.readers.protocol import Split

_COMMAND = "python train.py predict --config configs/token_reduction/cache_features.yaml"
# A constant and not the seed: runs of any seed hold out, and never train on, the same images.
_HOLD_OUT_KEY = 0x5A11D
_AT_LEAST = {"batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "val_size": 1, "seed": 0}


class FeatureBatch(TypedDict):
    """Features of images and what is known of the images, as in ``DocumentBatch``.

    Attributes:
        tokens: (B, L, C) features in raster order, in the type they are stored in.
        kind: (B,) int64, kind or class of the image, -1 if unknown.
        region: (B, 4) int64, what is written in each quarter, -1 if unknown.
        item_token: (B, L) int64, class of the item whose ink covers the token, -1 if unknown.
        scene: (B,) int64, -1 if unknown.
        index: (B,) int64, position of the image in the split that was stored.
        complexity: (B,) float32, bytes of the image as a PNG; 0 if not measured.
        cls_attention: (B, L) float32, attention of the class token to each patch; only of encoders
            with a class token.
    """

    tokens: Tensor
    kind: Tensor
    region: Tensor
    item_token: Tensor
    scene: Tensor
    index: Tensor
    complexity: Tensor
    cls_attention: NotRequired[Tensor]


class TokenFeatures(LightningDataModule):
    """Features that ``FeatureCacheWriter`` has stored, in place of the images they are of.

    Batches come in the order in which the images themselves would. Validation is the stored split
    val, or ``val_size`` images held out of training by a fixed permutation; test is the stored
    split test or else the validation split.

    Args:
        root: folder with train/, val/ and test/, of which only train/ must be there.
        batch_size: training batch on each device.
        eval_batch_size: largest batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        val_size: images held out of training if there is no split val.
        allow_partial: take a split of which not all images are stored.
        verify: compare the features of every image with their checksum when they are read.
        seed: key of the data order.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root does not exist.
        DataError: if the root holds no features, or damaged ones, or some that do not fit the rest.
    """

    def __init__(
        self,
        root: Path,
        batch_size: int = 64,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        val_size: int = 500,
        allow_partial: bool = False,
        verify: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.allow_partial = allow_partial
        self.verify = verify
        self.seed = seed
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}={value}: must be >= {least} (data.init_args.{name})")
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data.init_args.root={root}: no such folder; make the features first: {_COMMAND}"
            )

    @cached_property
    def _shards(self) -> dict[Split, list[FeatureShard]]:
        splits = open_cache(self.root)
        if "train" not in splits:
            expected = self.root / "train" / "features-rank0-00000.safetensors"
            raise DataError(f"{self.root}: no {expected}; make the features first: {_COMMAND}")
        count = sum(len(shard.index) for shard in splits["train"])
        if "val" not in splits and self.val_size >= count:
            raise ValueError(
                f"val_size={self.val_size}: must be less than the {count} training images "
                "(data.init_args.val_size)"
            )
        return splits

    @property
    def origin(self) -> FeatureOrigin:
        """What the features were made of and by."""
        return self._shards["train"][0].origin

    @property
    def encoder_identity(self) -> str:
        """Identity of the encoder whose features these are."""
        return self.origin.encoder

    @property
    def channels(self) -> int:
        """Channels C of a token."""
        return self._shards["train"][0].channels

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens down and across an image."""
        return self.origin.grid

    @property
    def kind_names(self) -> tuple[str, ...]:
        """Names of ``kind``, as the images' data module gave them; so are the others."""
        return self.origin.kind_names

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the classes of ``region`` and ``item_token``."""
        return self.origin.region_names

    @property
    def scene_names(self) -> tuple[str, ...]:
        """Names of the classes of ``scene``."""
        return self.origin.scene_names

    @property
    def source_name(self) -> str:
        """What numbers on this data are to be labelled with."""
        return self.origin.source_name

    @cached_property
    def data_fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images, the encoder or the splits."""
        digest = hashlib.blake2b(f"{self.origin}, {self.val_size}".encode(), digest_size=8)
        for split, shards in self._shards.items():
            stored = torch.cat([shard.index for shard in shards]).sort().values
            digest.update(split.encode() + stored.numpy().tobytes())
        return digest.hexdigest()

    def setup(self, stage: str) -> None:
        """Open all shards and look at what they are, not at their features.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        _ = self._shards

    def _split(self, split: Split) -> FeatureSplit:
        """A split, or what stands in for it."""
        if split == "test" and "test" not in self._shards:
            split = "val"
        held_out = split != "test" and "val" not in self._shards
        shards = self._shards["train" if held_out else split]
        count = sum(len(shard.index) for shard in shards)
        if count < shards[0].num_images and not self.allow_partial:
            raise DataError(
                f"{shards[0].path.parent}: holds {count} of {shards[0].num_images} images; run the "
                "command that made it to its end, or set data.init_args.allow_partial"
            )
        positions = np.arange(count, dtype=np.int64)
        if held_out:
            order = torch.randperm(count, generator=keyed_generator(_HOLD_OUT_KEY, count)).numpy()
            positions = np.sort(
                order[: self.val_size] if split == "val" else order[self.val_size :]
            )
        return FeatureSplit(shards, positions, verify=self.verify)

    def _ordered(self, split: Split) -> OrderedLoader:
        dataset = self._split(split)
        return ordered_loader(self, dataset, self.eval_batch_size)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``FeatureBatch``es of ``batch_size``; resumes mid-epoch."""
        return training_loader(self, self._split("train"))

    def train_eval_dataloader(self) -> OrderedLoader:
        """The training split, not shuffled, every image once."""
        return self._ordered("train")

    def val_dataloader(self) -> OrderedLoader:
        """Validation ``FeatureBatch``es in order, every image once."""
        return self._ordered("val")

    def test_dataloader(self) -> OrderedLoader:
        """Test ``FeatureBatch``es in order, every image once."""
        return self._ordered("test")

    def predict_dataloader(self) -> OrderedLoader:
        """As ``test_dataloader``."""
        return self._ordered("test")
