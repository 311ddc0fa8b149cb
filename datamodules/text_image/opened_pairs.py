"""The splits of text-image data, and what stands in for those that it does not have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datamodules.errors import DataError, FaultPolicy
from datamodules.keyed_random import keyed_generator
from datamodules.readers.protocol import Split
from datamodules.tensor_store import TensorStore
from datamodules.tensor_store_files import INDEX
from datamodules.text_image.pair_reader import PairReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Constants and not the seed: runs of any seed hold out, and show, the same pairs.
_HOLD_OUT_KEY = 0x5A11D
_GALLERY_KEY = 0x6A11E


class OpenedPairs:
    """Readers of the splits on disk; validation and test may share one, or be held out.

    Args:
        readers: of the splits found.
        val_size: pairs held out of training if there is neither validation nor test data.

    Raises:
        ValueError: if as many pairs as there are would be held out.
    """

    def __init__(self, readers: Mapping[Split, PairReader], val_size: int) -> None:
        self._readers = readers
        self._val_size = val_size
        count = len(readers["train"])
        if self._is_held_out and val_size >= count:
            raise ValueError(
                f"val_size={val_size}: must be less than the {count} training pairs "
                "(data.init_args.val_size)"
            )

    @property
    def _is_held_out(self) -> bool:
        return "val" not in self._readers and "test" not in self._readers

    @property
    def category_names(self) -> tuple[str, ...]:
        """Those of the training split, in alphabetical order."""
        return self._readers["train"].category_names

    @property
    def fingerprint(self) -> str:
        """Text that changes with the data or its splits."""
        parts = [f"{split}={reader.fingerprint}" for split, reader in self._readers.items()]
        held_out = self._val_size if self._is_held_out else 0
        return hashlib.blake2b(f"{parts}, {held_out}".encode(), digest_size=16).hexdigest()

    def stored(self, split: Split) -> Split:
        """The split itself, or validation and test standing in for each other."""
        if split == "train" or split in self._readers:
            return split
        other: Split = "test" if split == "val" else "val"
        return other if other in self._readers else "val"

    def locate(self, split: Split) -> tuple[PairReader, NDArray[np.int64]]:
        """The reader that holds a split, and the split's positions in it."""
        split = self.stored(split)
        if split in self._readers and not (split == "train" and self._is_held_out):
            reader = self._readers[split]
            return reader, np.arange(len(reader), dtype=np.int64)
        reader = self._readers["train"]
        generator = keyed_generator(_HOLD_OUT_KEY, len(reader))
        order = torch.randperm(len(reader), generator=generator).numpy()
        chosen = order[: self._val_size] if split == "val" else order[self._val_size :]
        return reader, np.sort(chosen)


def gallery_indices(count: int, wanted: int) -> list[int]:
    """Fixed indices, spread over a split of ``count`` samples, that are the same in every run."""
    order = torch.randperm(count, generator=keyed_generator(_GALLERY_KEY, count))
    return order[:wanted].tolist()


def open_stores(folder: Path, split: str, data: str, faults: FaultPolicy) -> list[TensorStore]:
    """Stores of all identities in a folder, of one split.

    Args:
        folder: holds a folder for each identity.
        split: wanted.
        data: fingerprint that the stores' samples must have.
        faults: samples may be missing under on_error="skip", up to its share.

    Raises:
        DataError: if there is none, or one is damaged, of other data or incomplete, or two give a
            tensor the same name.
    """
    places = sorted(place.parent for place in folder.glob(f"*/{INDEX}"))
    if not places:
        raise DataError(
            f"{folder}: no <identity>/{INDEX}; make the features first (data.init_args.features)"
        )
    stores: list[TensorStore] = []
    owners: dict[str, Path] = {}
    for place in places:
        store = TensorStore(place, split)
        if store.index.data != data:
            raise DataError(
                f"{place}: made of other data ({store.index.data[:40]}, now {data}); make the "
                "features again, or give the data's arguments the values that they had"
            )
        for name in store.index.tensors:
            if name in owners:
                raise DataError(
                    f"{place}: gives {name}, as does {owners[name]}; move one of the two elsewhere"
                )
            owners[name] = place
        _check_complete(store, faults)
        stores.append(store)
    return stores


def _check_complete(store: TensorStore, faults: FaultPolicy) -> None:
    missing = store.num_samples - len(store)
    allowed = faults.max_skipped_share if faults.on_error == "skip" else 0.0
    if not len(store) or missing > allowed * store.num_samples:
        raise DataError(
            f"{store.folder}: holds {len(store)} of {store.num_samples} samples of split "
            f"{store.split}; run the command that made it to its end"
        )
