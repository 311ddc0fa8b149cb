"""The batch that multi-view data gives and view-synthesis methods take.

Poses map camera to world coordinates, with OpenCV axes: x right, y down, z forward. Letters: B
scenes, V views of each, H x W pixels.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Views(TypedDict):
    """V views of each of B scenes.

    A view with ``valid`` False only fills the batch up: it is the last of its scene and zero in
    every field, its pose and intrinsics included, so it has no rays.

    Attributes:
        image: (B, V, 3, H, W) float32 in [0, 1].
        pose: (B, V, 4, 4) float32, camera to world, in the normalised world of its scene.
        intrinsics: (B, V, 4) float32, focal lengths fx, fy and principal point cx, cy in pixels
            of ``image``, whose first pixel is centred on (0.5, 0.5).
        distortion: (B, V, 4) float32, OpenCV's k1, k2, p1, p2; zeros for a pinhole.
        frame: (B, V) int64, position of the view among the frames of its scene; -1 for a view
            that was never photographed.
        valid: (B, V) bool, False for a view that only fills the batch up.
    """

    image: Tensor
    pose: Tensor
    intrinsics: Tensor
    distortion: Tensor
    frame: Tensor
    valid: Tensor


class MultiviewBatch(TypedDict):
    """Context views to look at, and target views to render.

    Attributes:
        context: what the scene is known from.
        target: what is to be rendered; in predict its images are unknown, and zero.
        index: (B,) int64, position of the entry in its split.
        scene: B names of scenes.
    """

    context: Views
    target: Views
    index: Tensor
    scene: list[str]
