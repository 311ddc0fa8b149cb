"""From the views of single scenes to a batch: normalised poses, float images, filled-up views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from datamodules.errors import DataError
from datamodules.multiview.poses import PoseRule, normalise_poses

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.multiview.batch import MultiviewBatch, StoredClusters, Views
    from datamodules.multiview.stored_clusters import SceneClusters
    from datamodules.multiview.view_source import SceneViews


class Sample(NamedTuple):
    """Views of one scene in its normalised world.

    Attributes:
        context: views to look at.
        target: views to render.
        position: of the sample in its split.
        scene: name.
        normalisation: (4, 4) similarity from the world of the capture to the normalised one.
        clusters: clusters of the context's tokens, if there are stored ones.
    """

    context: SceneViews
    target: SceneViews
    position: int
    scene: str
    normalisation: NDArray[np.float64]
    clusters: SceneClusters | None = None


def normalised_sample(
    views: SceneViews,
    num_context: int,
    rule: PoseRule,
    position: int,
    scene: str,
) -> Sample:
    """Part the views of a scene, and normalise their poses.

    Args:
        views: the context views, followed by the targets.
        num_context: how many the context views are.
        rule: see ``normalise_poses``.
        position: of the sample in its split.
        scene: name.
    """
    context, target = views.take(slice(num_context)), views.take(slice(num_context, None))
    normalised = normalise_poses(context.pose, target.pose, rule)
    return Sample(
        context._replace(pose=normalised.context),
        target._replace(pose=normalised.target),
        position,
        scene,
        normalised.similarity,
    )


def _stack(scenes: Sequence[SceneViews], count: int) -> Views:
    """Views of B scenes, filled up to ``count`` views each."""
    first = scenes[0]
    shape = (len(scenes), count)
    pixels = np.zeros((*shape, *first.pixels.shape[1:]), dtype=np.uint8)  # (B, V, H, W, 3)
    pose = np.zeros((*shape, 4, 4), dtype=np.float32)
    intrinsics, distortion = (np.zeros((*shape, 4), dtype=np.float32) for _ in range(2))
    frame, valid = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    for row, views in enumerate(scenes):
        some = slice(len(views.frame))
        pixels[row, some], pose[row, some] = views.pixels, views.pose
        intrinsics[row, some], distortion[row, some] = views.intrinsics, views.distortion
        frame[row, some] = views.frame
        valid[row, some] = True
    planar = np.ascontiguousarray(pixels.transpose(0, 1, 4, 2, 3))  # (B, V, 3, H, W)
    return {
        "image": torch.from_numpy(planar).float().div_(255),
        "pose": torch.from_numpy(pose),
        "intrinsics": torch.from_numpy(intrinsics),
        "distortion": torch.from_numpy(distortion),
        "frame": torch.from_numpy(frame),
        "valid": torch.from_numpy(valid),
    }


def collate(samples: Sequence[Sample], context_views: int = 0) -> MultiviewBatch:
    """Make a batch of samples.

    Args:
        samples: B of them.
        context_views: context views are filled up to at least this many.

    Returns:
        The batch; shorter lists of views are filled up to the longest.

    Raises:
        DataError: if stored clusters are of differently many tokens for a view.
    """
    most = max(context_views, *(len(sample.context.frame) for sample in samples))
    batch: MultiviewBatch = {
        "context": _stack([sample.context for sample in samples], most),
        "target": _stack(
            [sample.target for sample in samples],
            max(len(sample.target.frame) for sample in samples),
        ),
        "index": torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        "scene": [sample.scene for sample in samples],
        "normalisation": torch.from_numpy(np.stack([s.normalisation for s in samples])).float(),
    }
    stored = [sample.clusters for sample in samples if sample.clusters is not None]
    if stored:
        batch["clusters"] = _stack_clusters(stored, most, batch["scene"])
    return batch


def _stack_clusters(
    scenes: Sequence[SceneClusters], views: int, names: Sequence[str]
) -> StoredClusters:
    """Clusters of B scenes, filled up to the tokens of ``views`` views each."""
    per_view = [len(clusters.labels) // len(clusters.context) for clusters in scenes]
    for name, tokens in zip(names, per_view, strict=True):
        if tokens != per_view[0]:
            raise DataError(
                f"scene {name}: stored clusters of {tokens} tokens a view, those of scene "
                f"{names[0]} of {per_view[0]}; make them anew, all for one size of the views"
            )
    labels = np.full((len(scenes), views * per_view[0]), -1, dtype=np.int64)
    most = max(len(clusters.anchors) for clusters in scenes)
    anchors = np.zeros((len(scenes), most), dtype=np.int64)
    for row, clusters in enumerate(scenes):
        labels[row, : len(clusters.labels)] = clusters.labels
        anchors[row, : len(clusters.anchors)] = clusters.anchors
    return {
        "labels": torch.from_numpy(labels),
        "anchors": torch.from_numpy(anchors),
        "num_clusters": torch.tensor([len(clusters.anchors) for clusters in scenes]),
        "encoder": [clusters.encoder for clusters in scenes],
    }
