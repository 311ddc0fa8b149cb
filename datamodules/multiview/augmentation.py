"""Exact changes of a scene: every view of it stays a photograph of the same changed scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from datamodules.multiview.poses import mirror_poses

if TYPE_CHECKING:
    from torch import Generator

    from datamodules.multiview.view_source import SceneViews


@dataclass(frozen=True)
class Augmentation:
    """How often training scenes are changed; each change applies to all views of a sample.

    Attributes:
        mirror: probability of mirroring images and world left to right.
        permute_colours: probability of a random order of the colour channels.
        invert_colours: probability of inverting the colours.
    """

    mirror: float = 0.0
    permute_colours: float = 0.0
    invert_colours: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mirror", "permute_colours", "invert_colours"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: must be a probability, 0 .. 1 "
                    f"(data.init_args.augmentation.{name})"
                )

    def apply(self, views: SceneViews, generator: Generator) -> SceneViews:
        """Change the views of one sample.

        Args:
            views: context and target views together.
            generator: keyed by the sample; always asked for as many numbers.

        Returns:
            The changed views; the arrays given are not written to.
        """
        chances = torch.rand(3, generator=generator).tolist()
        order = torch.randperm(3, generator=generator).numpy()
        if chances[0] < self.mirror:
            views = mirror_views(views)
        if chances[1] < self.permute_colours:
            views = views._replace(pixels=views.pixels[..., order])
        if chances[2] < self.invert_colours:
            views = views._replace(pixels=255 - views.pixels)
        return views


def mirror_views(views: SceneViews) -> SceneViews:
    """The views of the scene as seen in a mirror at x = 0 of its world, with flipped images.

    Poses become S P S with S = diag(-1, 1, 1, 1), cx becomes W - cx, and the tangential
    coefficient p2 its negative.
    """
    intrinsics, distortion = views.intrinsics.copy(), views.distortion.copy()
    intrinsics[:, 2] = views.pixels.shape[2] - intrinsics[:, 2]
    distortion[:, 3] *= -1
    return views._replace(
        pixels=views.pixels[:, :, ::-1],
        pose=mirror_poses(views.pose),
        intrinsics=intrinsics,
        distortion=np.where(distortion == 0, 0.0, distortion),
    )
