"""Items to batches: rows of all views one below the other, correspondences to one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.batch import PairedBatch
    from datamodules.paired_2d3d.views import View


class PairedSample(NamedTuple):
    """One item, ready for a batch.

    Attributes:
        global_views: principal and second global view, n points together.
        local_views: the local views.
        correspondence: (n, V, 2) float32 places in each photograph; V may be 0.
        image_index: (V,) int64, numbers of the photographs.
        image: (V, 3, H, W) float32 in [0, 1]; None if tokens are used.
        image_tokens: (V, P, C) float16; None if photographs are used.
        item: position of the item in its split.
    """

    global_views: Sequence[View]
    local_views: Sequence[View]
    correspondence: NDArray[np.float32]
    image_index: NDArray[np.int64]
    image: Tensor | None
    image_tokens: Tensor | None
    item: int


def collate(samples: Sequence[PairedSample]) -> PairedBatch:
    """The batch of samples, in their order.

    Args:
        samples: at least one; all with photographs or all with tokens.
    """
    global_views = [view for sample in samples for view in sample.global_views]
    local_views = [view for sample in samples for view in sample.local_views]
    batch: PairedBatch = {
        "global_coord": _rows([view.coord for view in global_views]),
        "global_origin_coord": _rows([view.origin_coord for view in global_views]),
        "global_colour": _rows([view.colour for view in global_views]),
        "global_normal": _rows([view.normal for view in global_views]),
        "global_offset": _ends(global_views),
        "local_coord": _rows([view.coord for view in local_views]),
        "local_origin_coord": _rows([view.origin_coord for view in local_views]),
        "local_colour": _rows([view.colour for view in local_views]),
        "local_normal": _rows([view.normal for view in local_views]),
        "local_offset": _ends(local_views),
        "correspondence": _correspondence([sample.correspondence for sample in samples]),
        "image_number": torch.tensor([len(sample.image_index) for sample in samples]),
        "image_index": torch.from_numpy(np.concatenate([s.image_index for s in samples])),
        "index": torch.tensor([sample.item for sample in samples]),
    }
    images = [sample.image for sample in samples if sample.image is not None]
    tokens = [sample.image_tokens for sample in samples if sample.image_tokens is not None]
    if images:
        batch["image"] = torch.cat(images)
    if tokens:
        batch["image_tokens"] = torch.cat(tokens)
    return batch


def _rows(parts: Sequence[NDArray[np.float32]]) -> Tensor:
    if not parts:
        return torch.zeros((0, 3))
    return torch.from_numpy(np.concatenate(parts))


def _ends(views: Sequence[View]) -> Tensor:
    return torch.from_numpy(np.cumsum([len(view.rows) for view in views], dtype=np.int64))


def _correspondence(parts: Sequence[NDArray[np.float32]]) -> Tensor:
    """Places (N, V, 2) of all items, filled up with -1 to the most photographs, at least 1."""
    most = max(1, *(part.shape[1] for part in parts))
    places = np.full((sum(map(len, parts)), most, 2), -1, dtype=np.float32)
    start = 0
    for part in parts:
        places[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return torch.from_numpy(places)
