"""Complete checks of the clouds, photographs and correspondences that items name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from datamodules.errors import DataError
from datamodules.image_transforms import decode_image
from datamodules.paired_2d3d.tree_checks import Finding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from datamodules.paired_2d3d.patch_grid import PatchGrid
    from datamodules.paired_2d3d.scene_tree import SceneTree
    from datamodules.paired_2d3d.split_files import PairedItem

_UNIT_TOLERANCE = 0.02  # of the length of normals, as 8 bits a component give


class FileChecks:
    """Reads each file once, and notes what is wrong with it.

    Args:
        tree: the root.
        grid: patches that every image must be large enough for.

    Attributes:
        findings: what is wrong, in the order of reading.
    """

    def __init__(self, tree: SceneTree, grid: PatchGrid) -> None:
        self._tree = tree
        self._grid = grid
        self._clouds: dict[str, int | None] = {}
        self._images: dict[str, tuple[int, int] | None] = {}
        self._links: set[str] = set()
        self.findings: list[Finding] = []

    @property
    def counts(self) -> dict[str, int]:
        """Number of the different files that were read, by their kind."""
        return {
            "clouds": len(self._clouds),
            "images": len(self._images),
            "correspondences": len(self._links),
        }

    def check(self, item: PairedItem) -> None:
        """Read the files of an item that were not read before."""
        if item.cloud not in self._clouds:
            self._clouds[item.cloud] = self._check_cloud(item.cloud)
        for image, links in zip(item.images, item.correspondences, strict=True):
            if image not in self._images:
                self._images[image] = self._check_image(image)
            if links not in self._links:
                self._links.add(links)
                self._check_links(links, self._images[image], self._clouds[item.cloud])

    def _note(self, kind: str, text: str) -> None:
        self.findings.append(Finding(kind, text))

    def _note_error(self, kind: str, error: DataError) -> None:
        is_missing = "no such file" in str(error).lower()
        self._note("missing files" if is_missing else kind, str(error))

    def _check_cloud(self, folder: str) -> int | None:
        """Number of points of a scene; None if they cannot be read."""
        coord = self._array(f"{folder}/coord.npy", None, "f", 3)
        if coord is None:
            return None
        count = len(coord)
        self._check_finite(f"{folder}/coord.npy", coord)
        if count == 0:
            self._note("damaged arrays", f"{self._tree.root / folder}/coord.npy: no points")
        self._optional(f"{folder}/color.npy", count, "u", 3)
        normal = self._optional(f"{folder}/normal.npy", count, "f", 3)
        if normal is not None and self._check_finite(f"{folder}/normal.npy", normal):
            self._check_lengths(f"{folder}/normal.npy", normal)
        for path in sorted(self._tree.file(folder).glob("*.npy")):
            if path.stem.startswith("segment") or path.stem == "instance":
                self._array(f"{folder}/{path.name}", count, "iu", 0)
        return count

    def _optional(
        self, path: str, count: int, kinds: str, width: int
    ) -> NDArray[np.generic] | None:
        """Array of a scene that may be left out."""
        if not self._tree.file(path).exists():
            return None
        return self._array(path, count, kinds, width)

    def _array(
        self, path: str, count: int | None, kinds: str, width: int
    ) -> NDArray[np.generic] | None:
        """Array of the expected rows and kind of type; None if it cannot be read."""
        try:
            values = np.asarray(self._tree.array(path, width))
        except DataError as error:
            self._note_error("damaged arrays", error)
            return None
        place = self._tree.root / path
        if values.dtype.kind not in kinds or (kinds == "u" and values.dtype != np.uint8):
            expected = {"f": "float32", "u": "uint8"}.get(kinds, "whole numbers")
            self._note("unexpected types", f"{place}: {values.dtype}, expected {expected}")
        if count is not None and len(values) != count:
            self._note("arrays that do not fit", f"{place}: {len(values)} rows for {count} points")
            return None
        return values

    def _check_finite(self, path: str, values: NDArray[np.generic]) -> bool:
        finite = np.isfinite(np.asarray(values, dtype=np.float64)).all(axis=1)
        bad = int((~finite).sum())
        if bad:
            text = f"{self._tree.root / path}: {bad} of {len(values)} rows"
            self._note("values that are not finite", text)
        return not bad

    def _check_lengths(self, path: str, normal: NDArray[np.generic]) -> None:
        lengths = np.linalg.norm(np.asarray(normal, dtype=np.float64), axis=1)
        # Zeros are allowed: they mean that the normal is not known.
        bad = int(((lengths > 0) & (np.abs(lengths - 1) > _UNIT_TOLERANCE)).sum())
        if bad:
            text = f"{self._tree.root / path}: {bad} of {len(normal)} rows"
            self._note("normals that are not of length 1", text)

    def _check_image(self, path: str) -> tuple[int, int] | None:
        """Height and width of an image; None if it cannot be read."""
        try:
            data = self._tree.image_bytes(path)
        except DataError as error:
            self._note_error("unreadable images", error)
            return None
        try:
            image = decode_image(data, 3)
            self._grid.crop(image.height, image.width)
        except ValueError as error:
            self._note("unreadable images", f"{self._tree.root / path}: {error}")
            return None
        return image.height, image.width

    def _check_links(self, path: str, size: tuple[int, int] | None, points: int | None) -> None:
        try:
            links = np.asarray(self._tree.array(path, 3), dtype=np.float64)
        except DataError as error:
            self._note_error("damaged arrays", error)
            return
        place = self._tree.root / path
        used = links[~(links[:, 2] == -1)]
        if points is not None:
            bad = int((~((used[:, 2] >= 0) & (used[:, 2] < points))).sum())
            if bad:
                text = f"{place}: {bad} of {len(links)} rows, points 0 .. {points - 1}"
                self._note("correspondences outside of the cloud", text)
        if size is not None:
            height, width = size
            column, row = used[:, 0], used[:, 1]
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            if not inside.all():
                text = f"{place}: {(~inside).sum()} of {len(links)} rows, {width} x {height} pixels"
                self._note("correspondences outside of the image", text)
