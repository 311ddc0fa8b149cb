"""The batch that labelled clouds give and segmentation takes.

Letters: B clouds, N points of all of them after voxelisation, M points of the files. A batch is
ragged: the rows of its clouds lie one behind the other, ``offset`` holds where each ends.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class LabelledBatch(TypedDict):
    """Whole clouds, one point a voxel, with the class of each point.

    Attributes:
        coord: (N, 3) float32 metres; x and y from the middle of the cloud, z from its lowest point.
        colour: (N, 3) float32, RGB in [0, 1]; 0 where the data has none.
        normal: (N, 3) float32; 0 where the data has none.
        offset: (B,) int64, exclusive ends of the clouds; with votes (B * votes,): the copies of a
            cloud follow each other.
        grid_coord: (N, 3) int64, voxel of each point, from 0 in every cloud.
        segment: (N,) int64, class of each point, -1 where it does not count.
        index: (B,) int64, position of the scene in its split.
        name: B names of scenes.
        inverse: (M,) int64, row that stands for each point of the file, outside training; with
            votes (M * votes,), the copies of a cloud one behind the other.
        original_segment: (M,) int64, class of each point of the file, -1 where it does not count.
        original_offset: (B,) int64, exclusive ends of the clouds among these.
        original_coord: (M, 3) float32, as in the file.
        votes: Copies of every cloud whose predictions are averaged (test-time augmentation).
    """

    coord: Tensor
    colour: Tensor
    normal: Tensor
    offset: Tensor
    grid_coord: Tensor
    segment: Tensor
    index: Tensor
    name: list[str]
    inverse: NotRequired[Tensor]
    original_segment: NotRequired[Tensor]
    original_offset: NotRequired[Tensor]
    original_coord: NotRequired[Tensor]
    votes: NotRequired[int]
