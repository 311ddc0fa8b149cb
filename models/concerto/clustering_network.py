"""The part that student and teacher of Concerto have alike (arXiv 2510.23607, sect. 3)."""

from copy import deepcopy
from dataclasses import replace

from torch import nn

from models.concerto.block import DropPath
from models.concerto.cluster_head import ClusterHead
from models.concerto.cluster_loss import ClusteredPoints
from models.concerto.encoder import EncodedLevel, PointTransformer, up_cast
from models.concerto.pretraining_shape import PretrainingShape


class ClusteringNetwork(nn.Module):
    """What student and teacher have alike: an encoder and two heads.

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: PretrainingShape) -> None:
        super().__init__()
        self.cluster_level = shape.cluster_level
        channels = shape.encoder.up_cast_channels(shape.cluster_level)
        sizes = (channels, shape.hidden, shape.embed, shape.prototypes)
        self.backbone = PointTransformer(shape.encoder)
        self.mask_head = ClusterHead(*sizes)
        self.unmask_head = ClusterHead(*sizes)

    def cluster(self, levels: list[EncodedLevel], head: ClusterHead) -> ClusteredPoints:
        """Compare the points of the clustering level with a head's prototypes."""
        level = levels[-1 - self.cluster_level]
        if level.origin_coord is None:
            raise ValueError("origin_coord=None: views are matched by it; give it in both views")
        similarity = head(up_cast(levels, self.cluster_level))
        return ClusteredPoints(similarity, level.origin_coord, level.offset)


def build_teacher(student: ClusteringNetwork) -> ClusteringNetwork:
    """A copy that is not trained and drops no paths."""
    teacher = deepcopy(student).requires_grad_(False)
    teacher.backbone.shape = replace(student.backbone.shape, drop_path=0.0)
    for module in teacher.modules():
        if isinstance(module, DropPath):
            module.probability = 0.0
    return teacher
