"""Online clustering: the student predicts the prototypes of matched points of the teacher.

Sect. 3 of arXiv 2510.23607, after Sonata (2503.16429). Letters: n points of a view, m matched
points, P prototypes, B clouds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.concerto.cloud_selection import select_rows
from models.concerto.clouds import batch_numbers
from models.concerto.matching import match_nearest
from models.concerto.sinkhorn import Reduce, sinkhorn_targets


class ClusteredPoints(NamedTuple):
    """Points of a level and how similar their features are to the prototypes.

    Attributes:
        similarity: (n, P) cosines.
        origin_coord: (n, 3) metres, before augmentation.
        offset: (B,) int64 cumulative ends of the clouds.
    """

    similarity: Tensor
    origin_coord: Tensor
    offset: Tensor

    def select(self, clouds: Tensor) -> "ClusteredPoints":
        """The points of clouds (b,), in the order of these."""
        rows, offset = select_rows(self.offset, clouds)
        return ClusteredPoints(self.similarity[rows], self.origin_coord[rows], offset)


class ClusterTerm(NamedTuple):
    """One of the three losses.

    Attributes:
        loss: Scalar.
        matches: (m, 2) int64 rows of student and teacher.
        targets: (m, P) probabilities.
        nearest: (m,) int64 prototype most similar to each of the teacher's points.
    """

    loss: Tensor
    matches: Tensor
    targets: Tensor
    nearest: Tensor


class TargetUsage(NamedTuple):
    """How the teacher's points of a batch spread over the prototypes.

    Attributes:
        perplexity: Exponential of the entropy of their nearest prototypes: the number in use. The
            mean target says nothing of it, as targets are balanced over all prototypes.
        peak: Mean of the largest probability of each target.
    """

    perplexity: Tensor
    peak: Tensor


class ClusterRule(NamedTuple):
    """What the three losses share.

    Attributes:
        radius: Points are matched below this distance, in metres.
        student_temperature: Divides the student's similarities.
        teacher_temperature: Divides the teacher's.
        reduce: Sums over ranks for the targets; None is a single process.
    """

    radius: float
    student_temperature: float
    teacher_temperature: float
    reduce: Reduce | None = None


def cluster_term(
    student: ClusteredPoints, teacher: ClusteredPoints, rule: ClusterRule, views: int = 1
) -> ClusterTerm:
    """Match points, make targets of the teacher's matched ones and compare the student's.

    Args:
        student: Points of B * views clouds.
        teacher: Points of B clouds.
        rule: Radius and temperatures.
        views: Consecutive clouds of the student that are matched with one cloud of the teacher.
    """
    ends = student.offset[views - 1 :: views]
    matches = match_nearest(
        student.origin_coord, ends, teacher.origin_coord, teacher.offset, rule.radius
    )
    ours, theirs = matches.unbind(1)
    taught = teacher.similarity.index_select(0, theirs)
    targets = sinkhorn_targets(taught, rule.teacher_temperature, reduce=rule.reduce)
    similarity = student.similarity.index_select(0, ours)
    cloud = batch_numbers(student.offset)[ours]
    loss = cluster_loss(similarity, targets, cloud, rule.student_temperature)
    return ClusterTerm(loss, matches, targets, taught.argmax(1))


def cluster_loss(similarity: Tensor, targets: Tensor, cloud: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between targets and softened similarities: mean of each cloud, then of all.

    Clouds up to the last one with a point count, with 0 if they have none themselves; those after
    it do not, as in the released code. Without any point the loss is 0, its gradient too.

    Args:
        similarity: (m, P) cosines of the student's points with the prototypes.
        targets: (m, P) probabilities.
        cloud: (m,) int64 number of each point's cloud.
        temperature: Divides the similarities.

    Returns:
        Scalar in float32.
    """
    if not len(similarity):
        return similarity.float().sum()
    with torch.autocast(similarity.device.type, enabled=False):
        log_shares = (similarity.float() / temperature).log_softmax(-1)
        of_points = -(targets * log_shares).sum(-1)  # (m,)
    clouds = int(cloud.max()) + 1
    counts = torch.bincount(cloud, minlength=clouds).clamp(min=1)
    return of_points.new_zeros(clouds).index_add(0, cloud, of_points).div(counts).mean()


@torch.no_grad()
def target_usage(targets: Tensor, nearest: Tensor) -> TargetUsage:
    """Usage of the prototypes by targets (m, P) and nearest ones (m,); zeros if there are none."""
    if not len(targets):
        return TargetUsage(targets.new_zeros(()), targets.new_zeros(()))
    shares = torch.bincount(nearest, minlength=targets.shape[1]) / len(nearest)
    return TargetUsage(torch.special.entr(shares).sum().exp(), targets.amax(1).mean())
