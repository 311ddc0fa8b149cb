"""Paired 2D and 3D data: clouds of rooms and photographs of them, linked by correspondences."""

from datamodules.paired_2d3d.batch import PairedBatch
from datamodules.paired_2d3d.labelled_scenes import LabelledScenes
from datamodules.paired_2d3d.paired_scenes import PairedScenes

__all__ = ["LabelledScenes", "PairedBatch", "PairedScenes"]
