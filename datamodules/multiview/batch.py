"""The batch that multi-view data gives and view-synthesis methods take.

Poses map camera to world coordinates, with OpenCV axes: x right, y down, z forward. Letters: B
scenes, V views of each, H x W pixels.
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

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


class StoredClusters(TypedDict):
    """Clusters of the tokens of each scene's context views, made beforehand: N tokens, K clusters.

    Attributes:
        labels: (B, N) int64, cluster of each token in the order (view, row, column) of patches;
            -1 for the tokens of views that only fill the batch up.
        anchors: (B, K) int64, the token that stands for each cluster and is one of it; padded
            with 0.
        num_clusters: (B,) int64, clusters of each scene, at most K.
        encoder: B identities of the encoder whose tokens were clustered; empty where unknown.
    """

    labels: Tensor
    anchors: Tensor
    num_clusters: Tensor
    encoder: list[str]


class MultiviewBatch(TypedDict):
    """Context views to look at, and target views to render.

    Attributes:
        context: what the scene is known from.
        target: what is to be rendered; in predict its images are unknown, and zero.
        index: (B,) int64, position of the entry in its split.
        scene: B names of scenes.
        normalisation: (B, 4, 4) float32, similarity from the world of the capture (OpenCV axes) to
            the normalised one: a point p becomes the first three of ``normalisation @ (p, 1)``.
        clusters: clusters of the context's tokens, in training on stored ones.
    """

    context: Views
    target: Views
    index: Tensor
    scene: list[str]
    normalisation: Tensor
    clusters: NotRequired[StoredClusters]
