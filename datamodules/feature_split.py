"""One split of stored features as a data set that builds whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset

from datamodules.errors import DataError
from datamodules.feature_shards import COLUMNS, REMEDY, FeatureShard, row_checksums

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from datamodules.token_features import FeatureBatch


class FeatureSplit(Dataset["FeatureBatch"]):
    """Batches of stored features; images are in the order of their index, however they are stored.

    A shard is mapped into memory when first asked for, once in every process; only the pages that
    hold the wanted images are read.

    Args:
        shards: all shards of a split.
        positions: (N,) places of the wanted images in the order of index; None takes all.
        verify: whether every image read is compared with its checksum.
    """

    def __init__(
        self,
        shards: Sequence[FeatureShard],
        positions: NDArray[np.int64] | None = None,
        *,
        verify: bool = True,
    ) -> None:
        self._paths = [shard.path for shard in shards]
        columns = {name: torch.cat([s.columns[name] for s in shards]) for name in COLUMNS}
        chosen = columns["index"].argsort()
        if positions is not None:
            chosen = chosen[torch.from_numpy(positions)]
        self._columns = {name: column[chosen] for name, column in columns.items()}
        counts = [len(shard.index) for shard in shards]
        self._shard = np.repeat(np.arange(len(shards)), counts)[chosen.numpy()]
        self._row = np.concatenate([np.arange(count) for count in counts])[chosen.numpy()]
        self._verify = verify
        self._maps: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self._row)

    def __getitem__(self, pair: tuple[int, int]) -> FeatureBatch:
        """A batch of one image, addressed by (index, epoch)."""
        return self.__getitems__([pair])

    def __getitems__(self, pairs: list[tuple[int, int]]) -> FeatureBatch:
        """The batch of the images given as (index, epoch) pairs; the epoch is of no account.

        Raises:
            DataError: if a shard has vanished, or what it holds of an image is damaged.
        """
        chosen = np.fromiter((index for index, _ in pairs), dtype=np.int64, count=len(pairs))
        batch = {name: column[chosen] for name, column in self._columns.items()}
        stored = self._shard[chosen]
        for place, (shard, row) in enumerate(
            zip(stored.tolist(), self._row[chosen].tolist(), strict=True)
        ):
            for name, tensor in self._mapped(shard).items():
                if name not in batch:
                    batch[name] = tensor.new_empty((len(pairs), *tensor.shape[1:]))
                batch[name][place] = tensor[row]  # faster than indexing with all rows at once
        if self._verify:
            self._check(batch, stored)
        del batch["checksum"]
        return cast("FeatureBatch", batch)

    def _mapped(self, shard: int) -> dict[str, Tensor]:
        """The large tensors of a shard, mapped into memory."""
        if shard not in self._maps:
            path = self._paths[shard]
            try:
                with safe_open(path, "pt") as file:
                    names = sorted(set(file.keys()) - set(COLUMNS))
                    # On the CPU these are views of the mapped file, which they keep open.
                    self._maps[shard] = {name: file.get_tensor(name) for name in names}
            except (SafetensorError, OSError) as error:
                reason = " ".join(str(error).split())[:120]
                raise DataError(f"{path}: can no longer be read ({reason}); {REMEDY}") from None
        return self._maps[shard]

    def _check(self, batch: dict[str, Tensor], stored: NDArray[np.int64]) -> None:
        damaged = torch.nonzero(row_checksums(batch) != batch["checksum"]).flatten().tolist()
        if damaged:
            path, index = self._paths[stored[damaged[0]]], int(batch["index"][damaged[0]])
            raise DataError(f"{path}: what it holds of image {index} is damaged; {REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped files behind: another process maps them for itself."""
        return {**self.__dict__, "_maps": {}}
