"""Documents and photographs: images whose text, scene and light are known, or any from disk."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule

from datamodules.documents.argument_checks import check_arguments
from datamodules.documents.drawing import KINDS, SCENE_NAMES
from datamodules.documents.embedded import (
    EvaluationPictures,
    TrainingPictures,
    embedded_fingerprint,
)
from datamodules.documents.from_disk import DiskSplit, ImagesFromDisk, Layout
from datamodules.documents.glyphs import REGION_NAMES
from datamodules.errors import FaultPolicy
from datamodules.image_transforms import PixelFormat
from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
)
from datamodules.module_loaders import is_overfitting, ordered_loader, training_loader
from datamodules.readers.protocol import Split

_Pictures = TrainingPictures | EvaluationPictures | DiskSplit


class DocumentsAndPhotographs(LightningDataModule):
    """Pages and photographs with known writing, drawn from embedded data, or images from disk.

    The embedded images are half sheets of paper and half crops of photographs, with up to four
    handwritten digits or printed words on each, lit from one side. Training draws new ones in
    every epoch; validation and test are fixed, and use photographs and digits of their own.

    Of images from disk only the class is known, if they have any. Validation is the data's own
    split or ``val_size`` images held out of training by a fixed permutation; test is the data's
    own split or else the validation split.

    Args:
        root: file, folder, shard pattern such as train-{0000..1023}.tar, or hub data set
            owner/name; none takes the embedded images.
        format: layout of the root: flat (images directly in the folder, or in train* and val*
            below it), folder (one folder per class), parquet, webdataset (tar shards) or npz;
            auto finds out.
        image_size: height and width in pixels; 96 for the embedded images.
        patch_size: height and width of the square patches that ``item_token`` and ``grid`` tell
            of; divides the image size.
        crop: of images from disk: resize (bilinear, centre) or adm (halve by averaging, bicubic,
            centre).
        batch_size: training batch on each device.
        eval_batch_size: largest batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        train_size: embedded images of a training epoch.
        val_size: embedded validation images; images from disk held out of training if the data
            has no validation split.
        test_size: embedded test images.
        on_error: raise stops at an unusable image from disk; skip uses the next good one in its
            place.
        max_skipped_share: largest share of a split that may be skipped before stopping.
        cache_decoded_mb: splits from disk that need no more memory than this are decoded once.
        predict_split: split whose images predict takes; of train, those of the first epoch.
        predict_count: how many of them, the first ones; none takes all.
        seed: key of the data order and of the embedded training images.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root does not exist.
        DataError: if the root holds no data of the format.
    """

    def __init__(
        self,
        root: Path | None = None,
        format: Literal["auto", "flat", "folder", "parquet", "webdataset", "npz"] = "auto",
        image_size: int = 96,
        patch_size: int = 8,
        crop: Literal["resize", "adm"] = "resize",
        batch_size: int = 64,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        train_size: int = 8192,
        val_size: int = 512,
        test_size: int = 1000,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped_share: float = 0.01,
        cache_decoded_mb: int = 512,
        predict_split: Split = "test",
        predict_count: int | None = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root)
        self.format: Layout = format
        self.image_size = image_size
        self.patch_size = patch_size
        self.crop = crop
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size
        self.on_error = on_error
        self.max_skipped_share = max_skipped_share
        self.cache_decoded_mb = cache_decoded_mb
        self.predict_split = predict_split
        self.predict_count = predict_count
        self.seed = seed
        self._evaluated: dict[Split, EvaluationPictures | DiskSplit] = {}
        check_arguments(self)

    @cached_property
    def _from_disk(self) -> ImagesFromDisk | None:
        if self.root is None:
            return None
        return ImagesFromDisk(
            self.root,
            self.format,
            PixelFormat(self.image_size, 3, 256, self.crop),
            tokens=self.grid[0] * self.grid[1],
            val_size=self.val_size,
            cache_bytes=self.cache_decoded_mb * 2**20,
            faults=FaultPolicy(self.on_error, self.max_skipped_share),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across an image."""
        return self.image_size // self.patch_size, self.image_size // self.patch_size

    @property
    def kind_names(self) -> tuple[str, ...]:
        """Names of ``kind``: page and photograph, or the classes of the data on disk, if any."""
        return KINDS if self._from_disk is None else self._from_disk.class_names

    @property
    def region_names(self) -> tuple[str, ...]:
        """Names of the classes of ``region`` and ``item_token``; none for images from disk."""
        return REGION_NAMES if self.root is None else ()

    @property
    def scene_names(self) -> tuple[str, ...]:
        """Names of the classes of ``scene``; none for images from disk."""
        return SCENE_NAMES if self.root is None else ()

    @property
    def source_name(self) -> str:
        """What numbers on this data are to be labelled with."""
        if self.root is None:
            return "procedural pages, real digits and photographs"
        return self.root.resolve().name

    @cached_property
    def data_fingerprint(self) -> str:
        """16 hexadecimal digits that change with the data, its splits or its pixel format."""
        found = self._from_disk
        if found is None:
            text = f"{embedded_fingerprint()}, {self.train_size}, {self.val_size}, {self.test_size}"
        else:
            text = found.fingerprint
        text = f"{text}, {self.patch_size}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def setup(self, stage: str) -> None:
        """Draw or open the images of a stage that are kept in memory.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        if stage in ("fit", "validate"):
            self._evaluation("val")
        if stage == "test":
            self._evaluation("test")
        if stage == "predict" and self.predict_split != "train":
            self._evaluation(self.predict_split)

    def _evaluation(self, split: Split) -> EvaluationPictures | DiskSplit:
        if split not in self._evaluated:
            found = self._from_disk
            size = self.val_size if split == "val" else self.test_size
            self._evaluated[split] = (
                EvaluationPictures(split, size, self.patch_size)
                if found is None
                else found.split(split)
            )
        return self._evaluated[split]

    def _training(self, *, fresh: bool) -> TrainingPictures | DiskSplit:
        if self._from_disk is not None:
            return self._from_disk.split("train")
        return TrainingPictures(self.train_size, self.patch_size, seed=self.seed, fresh=fresh)

    def _ordered(self, dataset: _Pictures, count: int | None = None) -> OrderedLoader:
        return ordered_loader(self, dataset, self.eval_batch_size, count)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``DocumentBatch``es of ``batch_size``; resumes mid-epoch."""
        dataset = self._training(fresh=not is_overfitting(self.trainer))
        return training_loader(self, dataset)

    def train_eval_dataloader(self) -> OrderedLoader:
        """The training images of the first epoch, not shuffled, every one once."""
        return self._ordered(self._training(fresh=False))

    def val_dataloader(self) -> OrderedLoader:
        """Validation ``DocumentBatch``es in order, every image once."""
        return self._ordered(self._evaluation("val"))

    def test_dataloader(self) -> OrderedLoader:
        """Test ``DocumentBatch``es in order, every image once."""
        return self._ordered(self._evaluation("test"))

    def predict_dataloader(self) -> OrderedLoader:
        """``DocumentBatch``es of the first ``predict_count`` images of ``predict_split``."""
        split = self.predict_split
        dataset = self._training(fresh=False) if split == "train" else self._evaluation(split)
        return self._ordered(dataset, self.predict_count)
