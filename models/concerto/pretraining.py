"""Concerto: a point-cloud encoder learns from itself and from images (arXiv 2510.23607).

The student sees masked global views and local views, the teacher, a moving average of it, whole
global views. Three losses of online clustering compare their points at one level; a fourth predicts
the features of image patches, one linear layer away from the student's points of a finer level.
Module names are those of the released training checkpoints.

Example:
    >>> network = Concerto(PretrainingShape(encoder=EncoderShape.small()))
    >>> terms = network(views, StepSettings(), StepDraws(generator=torch.Generator()))
    >>> terms.loss.backward()
    >>> network.update_teacher(momentum=0.994)  # after the optimiser's step
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.concerto.cloud_selection import (
    principal_clouds,
    select_clouds,
    select_rows,
    swapped_clouds,
)
from models.concerto.clouds import PointCloud, batch_numbers, grid_coordinates
from models.concerto.cluster_loss import (
    ClusteredPoints,
    ClusterRule,
    ClusterTerm,
    cluster_term,
    target_usage,
)
from models.concerto.clustering_network import ClusteringNetwork, build_teacher
from models.concerto.cross_modal import (
    cross_modal_loss,
    patch_means,
    patch_numbers,
    pool_correspondence,
)
from models.concerto.encoder import EncodedLevel, up_cast
from models.concerto.masking import jitter_masked, mask_cells
from models.concerto.pretraining_shape import PretrainingShape
from models.concerto.pretraining_step import (
    LOCAL,
    MASKED,
    TEACHER,
    LossWeights,
    PretrainingTerms,
    PretrainingViews,
    StepDraws,
    StepSettings,
    check_views,
    image_side,
)
from models.concerto.serialization import curve_depth
from models.concerto.sinkhorn import Reduce

__all__ = [
    "Concerto",
    "LossWeights",
    "PretrainingShape",
    "PretrainingTerms",
    "PretrainingViews",
    "StepDraws",
    "StepSettings",
]


class _CrossTerm(NamedTuple):
    """Loss, 0 without patches, and the number of patches."""

    loss: Tensor
    patches: int


class Concerto(nn.Module):
    """Student, teacher and the losses between them.

    What the weights leave out is frozen, so that every parameter that is trained gets a gradient
    in every step, also from batches without images or matches.

    Args:
        shape: Sizes.
        weights: Of the four losses.
    """

    def __init__(self, shape: PretrainingShape, weights: LossWeights | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.weights = LossWeights() if weights is None else weights
        self.student = ClusteringNetwork(shape)
        self.teacher = build_teacher(self.student)
        channels = shape.encoder.up_cast_channels(shape.cross_level)
        self.patch_proj = nn.Linear(channels, shape.image_channels)
        self._freeze_unused()

    def _freeze_unused(self) -> None:
        masked = self.weights.mask + self.weights.roll > 0
        unused: list[nn.Module] = [] if masked else [self.student.mask_head]
        unused += [] if self.weights.unmask > 0 else [self.student.unmask_head]
        unused += [] if self.weights.cross > 0 else [self.patch_proj]
        for module in unused:
            module.requires_grad_(False)
        if not masked and not self.weights.cross > 0:
            self.student.backbone.embedding.mask_token.requires_grad_(False)

    def forward(
        self,
        views: PretrainingViews,
        settings: StepSettings,
        draws: StepDraws,
        reduce: Reduce | None = None,
    ) -> PretrainingTerms:
        """Losses of a batch.

        Args:
            views: Of the batch.
            settings: Mask and temperature of this step.
            draws: Its random numbers.
            reduce: Sums a tensor over ranks, for targets that all ranks share.

        Raises:
            ValueError: If what a loss needs is missing or does not fit.
        """
        check_views(views, self.weights, self.shape)
        draws = draws.with_orders(self.shape.encoder.levels)
        statistics: dict[str, Tensor] = {}
        masked: list[EncodedLevel] = []
        if self.weights.mask + self.weights.roll + self.weights.cross > 0:
            masked, mask = self._encode_masked(views.global_, settings, draws)
            statistics["masked_share"] = mask.float().mean()
        terms = self._clustering(masked, views, settings, draws, reduce)
        for name, term in terms.items():
            statistics[f"{name}_matches"] = term.loss.new_tensor(len(term.matches))
        if terms:
            first = next(iter(terms.values()))
            usage = target_usage(first.targets, first.nearest)
            statistics |= {"prototypes_used": usage.perplexity, "target_peak": usage.peak}
        cross = self._cross(masked, views) if self.weights.cross > 0 else None
        return self._join(terms, cross, statistics)

    def _join(
        self, terms: dict[str, ClusterTerm], cross: _CrossTerm | None, statistics: dict[str, Tensor]
    ) -> PretrainingTerms:
        """Weighted sum of the terms; without patches, the others stand in for the cross-modal."""
        weights = self.weights
        weight = {"mask": weights.mask, "roll_mask": weights.roll, "unmask": weights.unmask}
        losses = [weight[name] * term.loss for name, term in terms.items()]
        clustering = torch.stack(losses).sum() if losses else None
        loss = clustering
        if cross is not None:
            stand_in = cross.loss
            if not cross.patches and clustering is not None:
                stand_in = stand_in + clustering / weights.clustering
            weighted = weights.cross * stand_in
            loss = weighted if loss is None else loss + weighted
            statistics["patches"] = cross.loss.new_tensor(cross.patches)
            if cross.patches:
                statistics["cosine"] = 1 - cross.loss.detach() / 10
        if loss is None:
            raise ValueError("weights of 0 alone: at least one loss is needed")
        mask, roll_mask, unmask = (terms[name].loss if name in terms else None for name in weight)
        return PretrainingTerms(
            loss,
            mask=mask,
            roll_mask=roll_mask,
            unmask=unmask,
            cross=cross.loss if cross is not None and cross.patches else None,
            statistics=statistics,
        )

    def _clustering(
        self,
        masked: list[EncodedLevel],
        views: PretrainingViews,
        settings: StepSettings,
        draws: StepDraws,
        reduce: Reduce | None,
    ) -> dict[str, ClusterTerm]:
        """The losses without images, those of weight 0 left out."""
        weights, shape, student = self.weights, self.shape, self.student
        if not weights.clustering > 0:
            return {}
        temperatures = (shape.student_temperature, settings.teacher_temperature)
        rule = ClusterRule(shape.match_radius, *temperatures, reduce)
        taught = self._teach(views.global_, settings, draws)
        terms = {}
        if weights.mask + weights.roll > 0:
            ours = student.cluster(masked, student.mask_head)
            if weights.mask > 0:
                terms["mask"] = cluster_term(ours, taught, rule)
            if weights.roll > 0:
                swapped = taught.select(swapped_clouds(taught.offset))
                terms["roll_mask"] = cluster_term(ours, swapped, rule)
        if weights.unmask > 0 and views.local is not None:
            local = _voxelised(views.local, settings.grid_size)
            levels = student.backbone(local, orders=_orders(draws, LOCAL))
            ours = student.cluster(levels, student.unmask_head)
            principal = taught.select(principal_clouds(taught.offset))
            per_item = len(ours.offset) // len(principal.offset)
            terms["unmask"] = cluster_term(ours, principal, rule, per_item)
        return terms

    @torch.no_grad()
    def _teach(
        self, cloud: PointCloud, settings: StepSettings, draws: StepDraws
    ) -> ClusteredPoints:
        """The teacher's points; all losses use the head of masked views."""
        cloud = _voxelised(cloud, settings.grid_size)
        levels = self.teacher.backbone(cloud, orders=_orders(draws, TEACHER))
        return self.teacher.cluster(levels, self.teacher.mask_head)

    def _encode_masked(
        self, cloud: PointCloud, settings: StepSettings, draws: StepDraws
    ) -> tuple[list[EncodedLevel], Tensor]:
        """Levels of the masked global views, and the mask (N,) of all their points."""
        mask = mask_cells(
            cloud.coord, cloud.offset, settings.mask_size, settings.mask_ratio, draws.of_cells
        )
        coord = jitter_masked(cloud.coord, mask, self.shape.mask_jitter, draws.of_noise)
        moved = _voxelised(cloud._replace(coord=coord), settings.grid_size)
        seen = mask
        if not self.weights.mask + self.weights.roll > 0:
            chosen = select_rows(cloud.offset, principal_clouds(cloud.offset))
            principal = select_clouds(moved, chosen)
            if _same_curves(principal, moved, self.shape.encoder.levels):
                moved, seen = principal, mask[chosen.rows]
        return self.student.backbone(moved, seen, _orders(draws, MASKED)), mask

    def _cross(self, levels: list[EncodedLevel], views: PretrainingViews) -> _CrossTerm:
        """Predict the features of the patches in which the principal views have points."""
        correspondence, image_number, tokens = image_side(views)
        clouds = len(levels[0].offset)
        item = batch_numbers(levels[0].offset)
        if clouds == len(image_number):  # only the principal views were encoded
            chosen = select_rows(views.global_.offset, principal_clouds(views.global_.offset))
            correspondence = correspondence[chosen.rows]
        else:
            correspondence = correspondence.masked_fill(item[:, None, None] % 2 == 1, -1)
        level = levels[-1 - self.shape.cross_level]
        for coarser in levels[1 : len(levels) - self.shape.cross_level]:
            if coarser.inverse is not None:
                correspondence = pool_correspondence(
                    correspondence, coarser.inverse, len(coarser.feat)
                )
        item = batch_numbers(level.offset) * len(image_number) // clouds
        rows, patches = patch_numbers(correspondence, item, image_number, self.shape.patch_grid)
        means = patch_means(up_cast(levels, self.shape.cross_level), rows, patches)
        target = tokens.flatten(0, 1).index_select(0, means.patch)  # (I * P, D) -> (m, D)
        return _CrossTerm(cross_modal_loss(self.patch_proj(means.feature), target), len(target))

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Let the teacher follow: momentum * teacher + (1 - momentum) * student, all parameters."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        torch._foreach_lerp_(teacher, list[Tensor](self.student.parameters()), 1 - momentum)


def _orders(draws: StepDraws, forward: int) -> Tensor | None:
    return None if draws.orders is None else draws.orders[forward]


def _voxelised(cloud: PointCloud, grid_size: float) -> PointCloud:
    return cloud._replace(grid_coord=grid_coordinates(cloud.coord, grid_size))


def _same_curves(some: PointCloud, whole: PointCloud, levels: int) -> bool:
    """Whether a part of a batch is serialized at every level as within the whole batch.

    Curves depend on the number of bits of the batch's largest coordinate.
    """
    if some.grid_coord is None or whole.grid_coord is None or not len(some.grid_coord):
        return False
    pairs = ((some.grid_coord >> level, whole.grid_coord >> level) for level in range(levels))
    return all(curve_depth(part) == curve_depth(all_of_it) for part, all_of_it in pairs)
