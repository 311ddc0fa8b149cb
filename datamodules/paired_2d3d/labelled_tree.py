"""Scene folders of a Pointcept tree with a class for every point."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.paired_2d3d.geometry_augmentation import coord_origin
from datamodules.paired_2d3d.scene_tree import SceneTree

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LabelledCloud:
    """N points with their classes.

    Attributes:
        coord: (N, 3) float32 metres.
        colour: (N, 3) float32, RGB in [0, 1].
        normal: (N, 3) float32.
        segment: (N,) int64, -1 where a point does not count.
    """

    coord: NDArray[np.float32]
    colour: NDArray[np.float32]
    normal: NDArray[np.float32]
    segment: NDArray[np.int64]

    def rows(self, chosen: NDArray[np.int64]) -> LabelledCloud:
        """The points of these rows, in this order."""
        return LabelledCloud(
            self.coord[chosen], self.colour[chosen], self.normal[chosen], self.segment[chosen]
        )

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        arrays = (self.coord, self.colour, self.normal, self.segment)
        return sum(array.nbytes for array in arrays)

    def centred(self) -> LabelledCloud:
        """Moved so that the middle of x and y and the lowest z are 0."""
        return replace(self, coord=self.coord - coord_origin(self.coord))


def find_scenes(tree: SceneTree, splits: Sequence[str]) -> list[str]:
    """Scene folders of splits, relative to the root, in the order of splits, then of names.

    Raises:
        DataError: If a split is not there, has no scenes or leads out of the root.
    """
    folders: list[str] = []
    for split in splits:
        folder = tree.file(split)
        scenes = sorted(path.parent.name for path in folder.glob("*/coord.npy"))
        if not scenes:
            found = sorted({path.parent.parent.name for path in tree.root.glob("*/*/coord.npy")})
            raise DataError(
                f"{folder}: no scene, expected {split}/<scene>/coord.npy (splits with scenes: "
                f"{', '.join(found) or 'none'}); name another split"
            )
        folders += [f"{split}/{scene}" for scene in scenes]
    return folders


def read_labelled(tree: SceneTree, folder: str, segment: str, classes: int) -> LabelledCloud:
    """Read a scene and its labels; missing colours and normals are zero.

    Args:
        tree: The root.
        folder: Scene folder, relative to it.
        segment: Name of the label file without .npy.
        classes: Number of classes; negative labels do not count.

    Raises:
        DataError: One line, if a file is missing, damaged or does not fit the others.
    """
    points = tree.cloud(folder)
    labels = tree.labels(folder, segment, len(points.coord))
    if labels.max() >= classes:
        raise DataError(
            f"{tree.root / folder}/{segment}.npy: label {labels.max()}, but there are {classes} "
            "classes; name all of them (data.init_args.class_names), or take another "
            "data.init_args.segment"
        )
    return LabelledCloud(points.coord, points.colour, points.normal, np.maximum(labels, -1))


def tree_fingerprint(tree: SceneTree, folders: Sequence[str], segment: str) -> str:
    """16 hexadecimal digits that change with the names and sizes of scenes and labels."""
    digest = hashlib.blake2b(segment.encode(), digest_size=8)
    for folder in folders:
        files = (tree.root / folder / name for name in ("coord.npy", f"{segment}.npy"))
        sizes = [file.stat().st_size if file.is_file() else -1 for file in files]
        digest.update(f"{folder}: {sizes};".encode())
    return digest.hexdigest()
