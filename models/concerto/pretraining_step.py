"""What a step of Concerto's pre-training is given, and what it returns.

Letters: N points, B items, V images of an item at most, I images of the batch, P patches of an
image, D channels of a patch. Each item has two global views, the principal one first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.concerto.clouds import PointCloud
from models.concerto.pretraining_shape import PretrainingShape
from models.concerto.serialization import draw_orders

# Encoder forwards of a step, in the order in which their curves are drawn.
TEACHER, MASKED, LOCAL = range(3)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four losses; a term of weight 0 is not computed.

    (2/8, 2/8, 4/8, 0) is Sonata, (0, 0, 0, 4/8) learns from images alone.

    Attributes:
        mask: Masked global view against the same view of the teacher.
        roll: Masked global view against the other global view.
        unmask: Local views against the principal view.
        cross: Patches of images, predicted from the masked principal view.
    """

    mask: float = 1 / 8
    roll: float = 1 / 8
    unmask: float = 2 / 8
    cross: float = 4 / 8

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(f"{field.name}={getattr(self, field.name)}: must be >= 0")
        if not self.clustering + self.cross > 0:
            raise ValueError("weights of 0 alone: at least one loss is needed")

    @property
    def clustering(self) -> float:
        """Sum of the weights of the three losses without images."""
        return self.mask + self.roll + self.unmask


class PretrainingViews(NamedTuple):
    """Views of a batch of items.

    Attributes:
        global_: 2 B clouds, [principal of item 0, second of item 0, principal of item 1, ...], with
            ``origin_coord``; ``grid_coord`` is computed here.
        local: As many clouds for each item; None if weights.unmask is 0.
        correspondence: (N, V, 2) fractional (row, column), in patches, of each point of the global
            views in each image of its item; -1 is not visible. None if weights.cross is 0.
        image_number: (B,) int64 images of each item, at most V, may be 0; None likewise.
        image_tokens: (I, P, D) features of their patches, item after item; None likewise.
    """

    global_: PointCloud
    local: PointCloud | None = None
    correspondence: Tensor | None = None
    image_number: Tensor | None = None
    image_tokens: Tensor | None = None


class StepSettings(NamedTuple):
    """Values that schedules change.

    Attributes:
        mask_size: Side of a masked cell in metres.
        mask_ratio: Share of the cells that is masked.
        teacher_temperature: Divides the teacher's similarities.
        grid_size: Side of a voxel in metres.
    """

    mask_size: float = 0.4
    mask_ratio: float = 0.7
    teacher_temperature: float = 0.07
    grid_size: float = 0.02


@dataclass(frozen=True)
class StepDraws:
    """All that is random in a step: drawn from a generator, or given.

    Stochastic depth is apart: it uses torch's own generator.

    Attributes:
        generator: Draws whatever is not given.
        orders: (3, levels, 4) int64 permutations of the curves, of the teacher's forward, the
            student's on masked views and the student's on local views.
        permutation: (cells,) int64 whose first entries are masked.
        noise: (masked points, 3) standard normal.
    """

    generator: torch.Generator | None = None
    orders: Tensor | None = None
    permutation: Tensor | None = None
    noise: Tensor | None = None

    def with_orders(self, levels: int) -> "StepDraws":
        """Draw the orders of all three forwards, whichever are made, unless they are given."""
        if self.orders is not None:
            return self
        generator = self._generator("orders")
        return replace(self, orders=torch.stack([draw_orders(levels, generator) for _ in range(3)]))

    @property
    def of_cells(self) -> torch.Generator | Tensor:
        """What cells are masked by."""
        return self._generator("permutation") if self.permutation is None else self.permutation

    @property
    def of_noise(self) -> torch.Generator | Tensor:
        """What masked points are moved by."""
        return self._generator("noise") if self.noise is None else self.noise

    def _generator(self, name: str) -> torch.Generator:
        if self.generator is None:
            raise ValueError(f"{name}=None: give it, or a generator that draws it")
        return self.generator


class PretrainingTerms(NamedTuple):
    """Losses of a step.

    Attributes:
        loss: Weighted sum, the only one with a gradient to use.
        mask: Unweighted; None if not computed, as the following.
        roll_mask: Unweighted.
        unmask: Unweighted.
        cross: Unweighted; None also if the batch shows no point in any image, where the weighted
            mean of the others takes its place in ``loss``.
        statistics: ``masked_share`` of the points; ``mask_matches``, ``roll_mask_matches`` and
            ``unmask_matches``, numbers of matched points; ``prototypes_used``, exponential of the
            entropy of the prototypes nearest to the teacher's points, and ``target_peak``, mean
            largest probability of a target, of the first of these losses; ``patches`` with points
            and ``cosine``, mean Pearson correlation of predicted and given features. What does not
            apply is left out.
    """

    loss: Tensor
    mask: Tensor | None
    roll_mask: Tensor | None
    unmask: Tensor | None
    cross: Tensor | None
    statistics: Mapping[str, Tensor]

    def measured(self) -> dict[str, Tensor]:
        """Computed terms and statistics by name, without gradient."""
        terms = {name: getattr(self, name) for name in ("mask", "roll_mask", "unmask", "cross")}
        computed = {name: value.detach() for name, value in terms.items() if value is not None}
        return computed | dict(self.statistics)


def image_side(views: PretrainingViews) -> tuple[Tensor, Tensor, Tensor]:
    """Correspondence, numbers of images and their tokens, or ``ValueError`` if one is missing."""
    if views.correspondence is None or views.image_number is None or views.image_tokens is None:
        raise ValueError(
            "correspondence, image_number or image_tokens is None: the cross-modal loss needs "
            "them; give them or set its weight to 0"
        )
    return views.correspondence, views.image_number, views.image_tokens


def check_views(views: PretrainingViews, weights: LossWeights, shape: PretrainingShape) -> None:
    """Raise ``ValueError`` where the parts of the views do not fit each other."""
    clouds = len(views.global_.offset)
    items = clouds // 2
    if clouds != 2 * items or not items:
        raise ValueError(f"global_ of {clouds} clouds: must be two of each item")
    if weights.unmask > 0:
        local = 0 if views.local is None else len(views.local.offset)
        if not local or local % items:
            raise ValueError(f"local of {local} clouds: must be as many of each of {items} items")
    if weights.cross > 0:
        correspondence, image_number, tokens = image_side(views)
        points, patches = len(views.global_.coord), shape.patch_grid[0] * shape.patch_grid[1]
        if correspondence.ndim != 3 or len(correspondence) != points:
            raise ValueError(
                f"correspondence of shape {tuple(correspondence.shape)}: expected ({points}, V, 2)"
            )
        if len(image_number) != items or int(image_number.sum()) != len(tokens):
            raise ValueError(
                f"image_number={image_number.tolist()}: must be one number for each of {items} "
                f"items, together the {len(tokens)} images of image_tokens"
            )
        if tokens.shape[1:] != (patches, shape.image_channels) and len(tokens):
            raise ValueError(
                f"image_tokens of shape {tuple(tokens.shape)}: expected (images, {patches}, "
                f"{shape.image_channels})"
            )
