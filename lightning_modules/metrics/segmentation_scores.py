"""Scores of a segmentation from its confusion matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SegmentationScores(NamedTuple):
    """Shares in [0, 1].

    Attributes:
        iou: (C,) intersection over union of each class; NaN where it neither is nor is predicted.
        acc: (C,) share of its points found; NaN where it has none.
        miou: Mean of ``iou`` over the classes that occur.
        macc: Mean of ``acc`` over the classes that occur.
        allacc: Share of all points found.
        points: (C,) points of each class.
    """

    iou: Tensor
    acc: Tensor
    miou: Tensor
    macc: Tensor
    allacc: Tensor
    points: Tensor


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """Scores of a confusion matrix.

    Args:
        confusion: (C, C) numbers of points, rows are true classes, columns predicted ones.
    """
    counts = confusion.double()
    found, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + predicted - found
    nothing = torch.full_like(found, torch.nan)
    iou = torch.where(union > 0, found / union, nothing)
    acc = torch.where(true > 0, found / true, nothing)
    allacc = found.sum() / true.sum()
    return SegmentationScores(iou, acc, iou.nanmean(), acc.nanmean(), allacc, true.long())
