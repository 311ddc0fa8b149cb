"""Tiny labelled scenes, encoders and modules for tests of segmentation."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.paired_2d3d.labelled_scenes import LabelledScenes
from lightning_modules.point_segmentation import PointSegmentation
from models.concerto.decoder import DecoderShape
from models.concerto.encoder import EncoderShape
from tests.lightning_modules.clift_runs import tiny_trainer

__all__ = [
    "CLASSES",
    "DECODER",
    "SHAPE",
    "tiny_scenes",
    "tiny_segmentation",
    "tiny_trainer",
    "write_scene",
    "write_tree",
]

CLASSES = ("floor", "wall", "ball")
SHAPE = EncoderShape(channels=(16, 32), heads=(1, 2), depths=(1, 1), patch_size=64, colour_scale=4)
DECODER = DecoderShape(channels=(16,), heads=(1,), depths=(1,), patch_size=64)


def write_scene(folder: Path, seed: int, points: int = 300) -> None:
    """A floor, a wall and a coloured ball; a few points have no class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, points)
    flat = rng.uniform(0, 2, (points, 2))
    zero = np.zeros(points)
    ball = rng.normal(size=(points, 3))
    ball = 0.3 * ball / np.linalg.norm(ball, axis=1, keepdims=True) + [1, 1, 0.5]
    floor, wall = np.stack([*flat.T, zero], 1), np.stack([zero, *flat.T], 1)
    coord = np.stack([floor, wall, ball])[labels, np.arange(points)]
    normal = np.stack([np.eye(3)[2][None], np.eye(3)[0][None], np.eye(3)[1][None]])[labels, 0]
    colour = np.array([[90, 60, 30], [180, 180, 190], [30, 60, 200]])[labels]
    colour = np.clip(colour + rng.normal(0, 10, colour.shape), 0, 255)
    segment = np.where(rng.random(points) < 0.05, -1, labels)
    folder.mkdir(parents=True)
    for name, values in {
        "coord": coord.astype(np.float32) + np.float32([10, -4, 1]),
        "color": colour.astype(np.uint8),
        "normal": normal.astype(np.float32),
        "segment": segment.astype(np.int64),
    }.items():
        np.save(folder / f"{name}.npy", values)


def write_tree(root: Path, scenes: tuple[int, int, int] = (6, 2, 3)) -> Path:
    """A Pointcept tree with train, val and test."""
    for split, count in zip(("train", "val", "test"), scenes, strict=True):
        for number in range(count):
            seed = 100 * len(split) + 10 * number + len(split)
            write_scene(root / split / f"scene{number}", seed, 280 + 10 * number)
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


def tiny_scenes(root: Path, **changes: Any) -> LabelledScenes:  # noqa: ANN401
    """Batches of two clouds in voxels of 5 cm."""
    options: dict[str, Any] = {"root": root, "grid_size": 0.05, "batch_size": 2}
    return LabelledScenes(**{**options, **changes})


def tiny_segmentation(**changes: Any) -> PointSegmentation:  # noqa: ANN401
    """An encoder of two levels."""
    options: dict[str, Any] = {"num_classes": len(CLASSES), "shape": SHAPE, "decoder": DECODER}
    return PointSegmentation(**{**options, **changes})
