"""Tensors of the samples of a data set on disk: made once, then read at random.

``<folder>/<identity>/index.json`` says what a row is and of which data;
``<folder>/<identity>/<split>/shard-rank<r>-<number>.safetensors`` hold the rows of some samples,
with the samples' indices in the tensor index. The identity is a hash of whatever made the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from datamodules.errors import DataError
from datamodules.tensor_store_files import (
    DTYPES,
    INDEX,
    REMEDY,
    ROW_INDEX,
    RowTensor,
    StoreIndex,
    check_name,
    read_index,
    read_shard_rows,
    shard_file,
    shard_files,
    write_index,
    write_shard,
)

if TYPE_CHECKING:
    from torch import Tensor


class TensorStore:
    """Stored tensors of one split, addressed by the samples' indices.

    A shard is mapped into memory when first asked for, once in every process.

    Args:
        folder: ``<folder>/<identity>``.
        split: name of the split.

    Raises:
        DataError: if the index or a shard is damaged, or they do not fit each other.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self.split = split
        if folder.name != self.index.identity:
            raise DataError(
                f"{folder}: its {INDEX} is of {self.index.identity[:80]}; rename the folder back"
            )
        self._paths = shard_files(folder, split)
        self.num_samples = self.index.splits.get(split, 0)
        self._places = self._find_rows()  # (num_samples, 2): shard and row, -1 if not stored
        self._maps: dict[int, dict[str, Tensor]] = {}

    def _find_rows(self) -> Tensor:
        places = torch.full((self.num_samples, 2), -1, dtype=torch.int64)
        for number, path in enumerate(self._paths):
            rows = read_shard_rows(path, self.index)
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_samples:
                raise DataError(
                    f"{path}: samples {int(rows.min())} .. {int(rows.max())} of "
                    f"{self.num_samples}; {REMEDY}"
                )
            if len(set(rows.tolist())) < len(rows) or bool((places[rows, 0] >= 0).any()):
                raise DataError(f"{path}: holds a sample that is stored already; {REMEDY}")
            places[rows, 0] = number
            places[rows, 1] = torch.arange(len(rows))
        return places

    def __len__(self) -> int:
        """Number of samples that are stored."""
        return len(self.stored)

    def __contains__(self, index: int) -> bool:
        """Whether a sample is stored."""
        return 0 <= index < self.num_samples and bool(self._places[index, 0] >= 0)

    @cached_property
    def stored(self) -> Tensor:
        """Indices (n,) int64 of the samples that are stored, in ascending order."""
        return (self._places[:, 0] >= 0).nonzero().flatten()

    def __getstate__(self) -> dict[str, Any]:
        """State without the maps: a process that unpickles the store maps the files itself."""
        return {**self.__dict__, "_maps": {}}

    def _mapped(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._maps:
            path = self._paths[shard]
            try:
                with safe_open(path, "pt") as file:
                    # On the CPU these are views of the mapped file, which they keep open.
                    self._maps[shard] = {name: file.get_tensor(name) for name in self.index.tensors}
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())[:120]
                raise DataError(f"{path}: can no longer be read ({reason}); {REMEDY}") from None
        return self._maps[shard]

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Stored tensors of some samples.

        Args:
            indices: (B,) int64.

        Returns:
            Copies (B, *shape) of every tensor, by name.

        Raises:
            DataError: naming the first sample that is not stored.
        """
        wanted = indices.tolist()
        absent = next((index for index in wanted if index not in self), None)
        if absent is not None:
            raise DataError(
                f"{self.folder}: sample {absent} of split {self.split} is not stored; run the "
                "command that made it again, which makes only what is missing"
            )
        found = {
            name: torch.empty((len(wanted), *row.shape), dtype=DTYPES[row.dtype])
            for name, row in self.index.tensors.items()
        }
        for place, (shard, row) in enumerate(self._places[indices].tolist()):
            for name, tensor in self._mapped(shard).items():
                found[name][place] = tensor[row]
        return found


class TensorStoreWriter:
    """Writes the tensors of one split; what an earlier call has stored is not written again.

    A shard appears when it is whole, so a stopped call loses what was added since the last one,
    and goes on behind it, on any number of processes; these share the folder.

    Args:
        folder: that of all stores.
        identity: hash of what makes the tensors; name of the store's own folder.
        split: name of the split.
        num_samples: size of the split.
        data: fingerprint of the samples.
        rank: of this process.
        shard_bytes: a shard is closed with the batch that brings it to this size.

    Raises:
        ValueError: if the identity or the split cannot be the name of a folder.
        DataError: if the folder holds damaged tensors, or those of other samples.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        split: str,
        num_samples: int,
        *,
        data: str,
        rank: int = 0,
        shard_bytes: int = 2**28,
    ) -> None:
        self.folder = folder / check_name(identity, "identity")
        self.split = check_name(split, "split")
        self._identity = identity
        self._num_samples = num_samples
        self._data = data
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._index = self._earlier_index()
        self._done = torch.zeros(num_samples, dtype=torch.bool)
        if self._index is not None and split in self._index.splits:
            self._done[TensorStore(self.folder, split).stored] = True
        self._waiting: list[dict[str, Tensor]] = []
        self._waiting_bytes = 0

    def _earlier_index(self) -> StoreIndex | None:
        """The index of an earlier call, once it is clear that it was on the same samples."""
        if not (self.folder / INDEX).exists():
            return None
        index = read_index(self.folder)
        now = {"data": self._data, self.split: str(self._num_samples)}
        size = index.splits.get(self.split, self._num_samples)
        for name, earlier in (("data", index.data), (self.split, str(size))):
            if earlier != now[name]:
                raise DataError(
                    f"{self.folder}: made of other samples ({name}={earlier[:60]}, now "
                    f"{now[name][:60]}); name another folder, or remove this one"
                )
        return index

    @property
    def missing(self) -> Tensor:
        """Indices (n,) int64 of the samples that were not added yet, in ascending order."""
        return (~self._done).nonzero().flatten()

    def add(self, indices: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of a batch, and write a shard when there is enough.

        Args:
            indices: (B,) int64 of the samples; those that are stored already are passed over.
            tensors: (B, ...) by name, equal in kind for all batches; of any device.

        Raises:
            ValueError: if an index is out of range, or the tensors are not of the store's kind.
            DataError: if a shard cannot be written.
        """
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._num_samples:
            raise ValueError(
                f"index {int(indices.max())}: split {self.split} has {self._num_samples} samples"
            )
        index = self._index_for(indices, tensors)
        new = [row for row, i in enumerate(indices.tolist()) if self._is_new(i)]
        if not new:
            return
        rows = {name: tensors[name].detach().cpu()[new].contiguous() for name in index.tensors}
        self._waiting.append({**rows, ROW_INDEX: indices[new]})
        self._waiting_bytes += len(new) * sum(row.num_bytes for row in index.tensors.values())
        if self._waiting_bytes >= self._shard_bytes:
            self.flush()

    def _is_new(self, index: int) -> bool:
        """Whether a sample comes for the first time; from now on it does not."""
        is_new = not self._done[index]
        self._done[index] = True
        return is_new

    def _index_for(self, indices: Tensor, tensors: Mapping[str, Tensor]) -> StoreIndex:
        """The store's index, made of these tensors if they are the first."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        for name, tensor in tensors.items():
            if len(tensor) != len(indices) or tensor.dtype not in names or name == ROW_INDEX:
                raise ValueError(
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)} for {len(indices)} samples; "
                    f"expected one row each, of {', '.join(DTYPES)}, not called {ROW_INDEX}"
                )
        found = {n: RowTensor(tuple(t.shape[1:]), names[t.dtype]) for n, t in tensors.items()}
        if self._index is None or self.split not in self._index.splits:
            splits = dict(self._index.splits) if self._index else {}
            splits[self.split] = self._num_samples
            kinds = self._index.tensors if self._index else found
            self._index = StoreIndex(self._identity, self._data, kinds, splits)
            write_index(self.folder, self._index)
        if found != self._index.tensors:
            raise ValueError(
                f"{self.folder}: holds {dict(self._index.tensors)}, not {found}; give what makes "
                "other tensors another identity"
            )
        return self._index

    def flush(self) -> None:
        """Write what is waiting, also if it is little; called at the end.

        Raises:
            DataError: if the shard cannot be written.
        """
        if not self._waiting:
            return
        rows = {name: torch.cat([w[name] for w in self._waiting]) for name in self._waiting[0]}
        write_shard(shard_file(self.folder, self.split, self._rank), rows)
        self._waiting, self._waiting_bytes = [], 0
