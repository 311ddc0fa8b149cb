"""Text-image pairs: images with their captions from any of the usual layouts, and prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

from lightning.pytorch import LightningDataModule

from datamodules.errors import FaultPolicy
from datamodules.loading import (
    OrderedLoader,
    ResumableLoader,
)
from datamodules.module_loaders import is_overfitting, ordered_loader, training_loader
from datamodules.readers.protocol import Split
from datamodules.text_image.argument_checks import check_arguments
from datamodules.text_image.batch import TextImageBatch
from datamodules.text_image.detection import PairLayout, open_pairs
from datamodules.text_image.embedded import open_emoji
from datamodules.text_image.opened_pairs import OpenedPairs, gallery_indices, open_stores
from datamodules.text_image.pair_split import PairOptions, PairSplit
from datamodules.text_image.prompts import Prompts, captions_of, read_prompts


class TextImagePairs(LightningDataModule):
    """Images with captions from tar shards, parquet, jsonl or image folders, or embedded emoji.

    Of the embedded emoji of Google's Noto font 1,724 are training data, every tenth of a category
    (186) is test data. Without a validation split of its own, validation is the test split; without
    both, ``val_size`` pairs held out of training by a fixed permutation. Without a test split, test
    is validation. So choose nothing by the validation loss that the test is to judge.

    Args:
        root: file, folder, shard pattern such as train-{0000..1023}.tar, or hub data set
            owner/name; none takes the embedded emoji (64 x 64).
        format: layout of the root: webdataset (tars with KEY.jpg|jpeg|png|webp and KEY.txt|json),
            parquet (image and caption), jsonl (image|img_path|file_name and caption) or
            imagefolder (metadata.jsonl beside the images); a caption may be called caption, text,
            txt or prompt. auto finds out.
        image_root: folder that the image names in jsonl files start from; none takes the files'
            own.
        image_size: height and width in pixels; the short side is scaled to it, the centre cut out.
        resampling: filter of the scaling, with antialiasing.
        random_crop: cut a square out anywhere in training; off, since captions may name sides.
        random_flip: mirror half of the training images; off for the same reason.
        caption_dropout: share of training captions replaced by "", by (seed, epoch, index).
        batch_size: training batch on each device.
        eval_batch_size: largest batch on each device outside training.
        num_workers: loading processes for each loader; 0 loads in the training process. The
            batches do not depend on it.
        val_size: pairs held out of training if the data has neither validation nor test split.
        on_error: raise stops at an unusable pair; skip uses the next good one in its place.
        max_skipped_share: largest share of a split that may be skipped before stopping.
        cache_decoded_mb: decoded images of splits that need no more memory than this are kept.
        features: folder of tensor stores (datamodules.tensor_store), whose tensors are added to
            the batches.
        decode: whether images are decoded; may be false with features.
        prompts: what predict draws: a text file with a prompt in each line, a jsonl file with the
            key prompt, or a folder of .txt files; none takes the captions of the test split.
        predict_count: how many of them, the first ones; none takes all.
        seed: key of the data order and of the random choices.

    Raises:
        ValueError: if an argument is out of range.
        FileNotFoundError: if the root, the features or the prompts do not exist.
        DataError: if the root holds no data of the format.
    """

    def __init__(
        self,
        root: Path | None = None,
        format: PairLayout = "auto",
        image_root: Path | None = None,
        image_size: int = 64,
        resampling: Literal["bicubic", "lanczos"] = "bicubic",
        random_crop: bool = False,
        random_flip: bool = False,
        caption_dropout: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        val_size: int = 500,
        on_error: Literal["raise", "skip"] = "raise",
        max_skipped_share: float = 0.01,
        cache_decoded_mb: int = 256,
        features: Path | None = None,
        decode: bool = True,
        prompts: Path | None = None,
        predict_count: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = None if root is None else Path(root)
        self.format: PairLayout = format
        self.image_root = None if image_root is None else Path(image_root)
        self.image_size = image_size
        self.resampling = resampling
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.caption_dropout = caption_dropout
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.val_size = val_size
        self.on_error = on_error
        self.max_skipped_share = max_skipped_share
        self.cache_decoded_mb = cache_decoded_mb
        self.features = None if features is None else Path(features)
        self.decode = decode
        self.prompts = None if prompts is None else Path(prompts)
        self.predict_count = predict_count
        self.seed = seed
        self._evaluated: dict[Split, PairSplit] = {}
        check_arguments(self)

    @cached_property
    def _opened(self) -> OpenedPairs:
        readers = (
            open_emoji()
            if self.root is None
            else open_pairs(self.root, self.format, self.image_root, self._faults)
        )
        return OpenedPairs(readers, self.val_size)

    @property
    def _faults(self) -> FaultPolicy:
        return FaultPolicy(self.on_error, self.max_skipped_share)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Names of ``category``, from a parquet column of this name; none if there is none."""
        return self._opened.category_names

    @property
    def num_captions(self) -> int:
        """Number of training captions, unusable ones included."""
        return len(self._opened.locate("train")[1])

    @property
    def source_name(self) -> str:
        """What numbers on this data are to be labelled with."""
        return "Noto emoji" if self.root is None else self.root.resolve().name

    @cached_property
    def data_fingerprint(self) -> str:
        """16 hexadecimal digits that change with the data, its splits or its pixels.

        Stored features are kept with it: it says of which images they are.
        """
        text = f"{self._opened.fingerprint}, {self.image_size}, {self.resampling}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def fingerprint(self) -> str:
        """As ``data_fingerprint``."""
        return self.data_fingerprint

    @cached_property
    def feature_identities(self) -> Mapping[str, str]:
        """Hash of what made them, for each stored tensor by name; empty without ``features``."""
        if self.features is None:
            return {}
        stores = open_stores(self.features, "train", self.data_fingerprint, self._faults)
        return {name: store.index.identity for store in stores for name in store.index.tensors}

    def use_features(self, folder: Path) -> None:
        """Read stored tensors from now on, as if they had been given as ``features``."""
        self.features = Path(folder)
        check_arguments(self)
        self._evaluated.clear()
        self.__dict__.pop("feature_identities", None)

    def stored_split(self, split: Split) -> Split:
        """The split under whose name tensors of a split's samples are to be stored."""
        return self._opened.stored(split)

    def setup(self, stage: str) -> None:
        """Open the splits of a stage.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        _ = self._opened
        if stage in ("fit", "validate"):
            self._evaluation("val")
        if stage == "test":
            self._evaluation("test")

    def _evaluation(self, split: Split) -> PairSplit:
        if split not in self._evaluated:
            self._evaluated[split] = self._split(split, PairOptions(*self._plain))
        return self._evaluated[split]

    @property
    def _plain(self) -> tuple[int, Literal["bicubic", "lanczos"], bool]:
        return self.image_size, self.resampling, self.decode

    def _split(self, split: Split, options: PairOptions) -> PairSplit:
        reader, positions = self._opened.locate(split)
        stored = self._opened.stored(split)
        return PairSplit(
            reader,
            positions,
            options,
            faults=self._faults,
            category_names=self.category_names,
            stores=()
            if self.features is None
            else open_stores(self.features, stored, self.data_fingerprint, self._faults),
            cache_bytes=self.cache_decoded_mb * 2**20,
            name=split,
        )

    def _ordered(self, dataset: PairSplit | Prompts, count: int | None = None) -> OrderedLoader:
        return ordered_loader(self, dataset, self.eval_batch_size, count)

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled ``TextImageBatch``es of ``batch_size``; resumes mid-epoch."""
        random = (0.0, False, False)
        if not is_overfitting(self.trainer):
            random = (self.caption_dropout, self.random_crop, self.random_flip)
        dataset = self._split("train", PairOptions(*self._plain, *random, seed=self.seed))
        return training_loader(self, dataset)

    def train_eval_dataloader(self) -> OrderedLoader:
        """The training pairs as they are: whole captions, centre crops, in order, each once."""
        return self._ordered(self._evaluation("train"))

    def val_dataloader(self) -> OrderedLoader:
        """Validation ``TextImageBatch``es in order, every pair once."""
        return self._ordered(self._evaluation("val"))

    def test_dataloader(self) -> OrderedLoader:
        """Test ``TextImageBatch``es in order, every pair once."""
        return self._ordered(self._evaluation("test"))

    def predict_dataloader(self) -> OrderedLoader:
        """``PromptBatch``es of ``prompts``, or of the captions of the test split."""
        if self.prompts is not None:
            return self._ordered(Prompts(read_prompts(self.prompts)), self.predict_count)
        reader, positions = self._opened.locate("test")
        wanted = positions[: self.predict_count].tolist()
        captions = captions_of(reader, wanted, skip=self.on_error == "skip")
        return self._ordered(Prompts(captions))

    def gallery(self, split: Literal["train", "test"], count: int) -> TextImageBatch:
        """Fixed pairs of a split to look at, the same in every run.

        Args:
            split: where they are from.
            count: number of pairs, at most as many as the split has.

        Returns:
            One batch: whole captions, centre crops.
        """
        dataset = self._evaluation(split)
        chosen = gallery_indices(len(dataset), count)
        return dataset.__getitems__([(index, 0) for index in chosen])
