"""From probabilities of voxels to classes of the points of the files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.paired_2d3d.labelled_batch import LabelledBatch


@dataclass(frozen=True)
class SegmentedCloud:
    """One cloud with true and predicted classes, on the CPU.

    Attributes:
        index: Position of the scene in its split.
        name: Of the scene.
        coord: (m, 3) float32.
        truth: (m,) int64, -1 where it does not count.
        predicted: (m,) int64.
    """

    index: int
    name: str
    coord: Tensor
    truth: Tensor
    predicted: Tensor


def point_classes(probabilities: Tensor, batch: LabelledBatch) -> Tensor:
    """Classes (M,) of the points of the files; probabilities are averaged over copies.

    Args:
        probabilities: (N, C) of each voxel.
        batch: Of evaluation.
    """
    votes = batch["votes"]
    if votes == 1:
        return probabilities.argmax(1)[batch["inverse"]]
    classes, start = [], 0
    for size in batch["original_offset"].diff(prepend=batch["original_offset"].new_zeros(1)):
        end = start + votes * int(size)
        copies = probabilities[batch["inverse"][start:end]]
        copies = copies.reshape(votes, int(size), -1)  # (votes, m, C)
        classes.append(copies.mean(0).argmax(1))
        start = end
    return torch.cat(classes)


def segmented_clouds(predicted: Tensor, batch: LabelledBatch) -> list[SegmentedCloud]:
    """The clouds of a batch one by one.

    Args:
        predicted: (M,) classes of the points of the files.
        batch: Of evaluation.
    """
    ends = batch["original_offset"].tolist()
    fields = (batch["original_coord"], batch["original_segment"], predicted)
    rows = zip(batch["index"].tolist(), batch["name"], [0, *ends], ends, strict=False)
    return [
        SegmentedCloud(index, name, *(field[start:end].cpu() for field in fields))
        for index, name, start, end in rows
    ]
