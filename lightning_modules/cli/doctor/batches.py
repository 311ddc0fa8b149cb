"""First batches of every split: whether they can be read, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer

from lightning_modules.cli.checkpoint_files import readable_size
from lightning_modules.cli.doctor.findings import Finding
from lightning_modules.cli.failures import describe, one_line

_SPLITS = (("train", "fit"), ("val", "fit"), ("test", "test"))
_FURTHER = 2


class BatchReader:
    """Reads a few batches of each split of a data module.

    Attributes:
        largest: Bytes of the largest batch met so far.
        can_train: Whether the data for training could be opened.
    """

    def __init__(self, data: LightningDataModule, trainer: Trainer) -> None:
        self.largest = 0
        self.can_train = True
        self._data = data
        data.trainer = trainer

    def examine(self) -> Iterator[Finding]:
        """A finding for each split; training needs ``train`` and ``val`` alone."""
        prepared: set[str] = set()
        for split, stage in _SPLITS:
            name = f"{split}_dataloader"
            if getattr(type(self._data), name) is getattr(LightningDataModule, name):
                continue
            try:
                if not prepared:
                    self._data.prepare_data()
                if stage not in prepared:
                    self._data.setup(stage)
                    prepared.add(stage)
                detail = self._read(getattr(self._data, name)())
            except Exception as error:
                problem = describe(error) or f"{type(error).__name__}: {one_line(str(error))}"
                yield Finding("warn" if split == "test" else "fail", f"data, {split}", problem)
                if "fit" not in prepared:
                    self.can_train = False
                    return
            else:
                yield Finding("ok", f"data, {split}", detail)

    def _read(self, loader: Iterable[Any]) -> str:
        batches = iter(loader)
        began = time.perf_counter()
        first = next(batches, None)
        if first is None:
            raise ValueError("no batch in it; lower --data.batch_size or look at --data.root")
        seconds = time.perf_counter() - began
        size = batch_bytes(first)
        self.largest = max(self.largest, size)
        began = time.perf_counter()
        further = sum(1 for _ in islice(batches, _FURTHER))
        text = f"first batch {readable_size(size)} in {seconds:.2f} s"
        if further:
            text += f", then {(time.perf_counter() - began) / further:.3f} s each"
        length = len(loader) if isinstance(loader, Sized) else None
        return f"{text}; {length} batches" if length is not None else text


def batch_bytes(batch: object) -> int:
    """Bytes of the tensors and arrays in a batch, however it is nested."""
    if hasattr(batch, "nbytes"):
        return int(batch.nbytes)
    if isinstance(batch, dict):
        return sum(map(batch_bytes, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(batch_bytes, batch))
    if is_dataclass(batch):
        return sum(batch_bytes(getattr(batch, field.name)) for field in fields(batch))
    return 0
