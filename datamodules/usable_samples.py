"""Stepping over samples that cannot be used, and counting them over all worker processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from datamodules.errors import DataError, FaultPolicy, SampleError

_Sample = TypeVar("_Sample")


class UsableSamples:
    """Samples of a split; the next good one stands in for one that cannot be used.

    Args:
        count: samples of the split.
        faults: what happens at unusable samples.
        name: of the split, for messages.
    """

    def __init__(self, count: int, faults: FaultPolicy, name: str) -> None:
        self._count = count
        self._faults = faults
        self._name = name
        # Shared memory, so that the count covers all worker processes.
        self._skipped = torch.zeros(count if faults.on_error == "skip" else 0, dtype=torch.bool)
        self._skipped.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def num_skipped(self) -> int:
        """Unusable samples met so far by this process and its workers."""
        return int(self._skipped.sum())

    @property
    def skipped(self) -> list[int]:
        """Their indices, in ascending order."""
        found: list[int] = self._skipped.nonzero().flatten().tolist()
        return found

    def take(self, index: int, load: Callable[[int], _Sample]) -> tuple[_Sample, int]:
        """The sample of an index, or of the next usable one, and the index that it has.

        Args:
            index: of the sample that is wanted.
            load: gives the sample of an index, or raises SampleError.

        Raises:
            SampleError: at an unusable sample under on_error="raise".
            DataError: if more than ``max_skipped_share`` of the split is unusable.
        """
        for step in range(self._count):
            candidate = (index + step) % self._count
            if len(self._skipped) and self._skipped[candidate]:
                continue
            try:
                return load(candidate), candidate
            except SampleError as error:
                if self._faults.on_error == "raise":
                    raise
                self._skip(candidate, error)
        raise DataError(f"split {self._name}: none of its {self._count} samples is usable")

    def _skip(self, index: int, error: SampleError) -> None:
        self._skipped[index] = True
        allowed = self._faults.max_skipped_share
        if self.num_skipped > allowed * self._count:
            raise DataError(
                f"split {self._name}: {self.num_skipped} of {self._count} samples unusable, more "
                f"than max_skipped_share={allowed}; repair the data; last: {error}"
            ) from error
        warnings.warn(f"skipped {error}", stacklevel=2)
