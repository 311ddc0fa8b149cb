"""Where the patches of an image lie: the centre of the image, cut into equal squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PatchCrop(NamedTuple):
    """Part of an image that the patches cover.

    Attributes:
        top: first row, pixels.
        left: first column, pixels.
        side: of a patch, pixels of the image.
    """

    top: int
    left: int
    side: int


@dataclass(frozen=True)
class PatchGrid:
    """Patches of every image.

    Attributes:
        rows: patches down, >= 1.
        columns: patches across, >= 1.
        pixels: side of a patch after resizing, >= 1.
    """

    rows: int
    columns: int
    pixels: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the resized images, pixels."""
        return self.rows * self.pixels, self.columns * self.pixels

    def crop(self, height: int, width: int) -> PatchCrop:
        """Largest centred part of an image whose patches are whole squares of pixels.

        Args:
            height: of the image, pixels.
            width: of the image, pixels.

        Raises:
            ValueError: if the image has fewer pixels than patches along a side.
        """
        side = min(height // self.rows, width // self.columns)
        if side < 1:
            raise ValueError(
                f"{width} x {height} pixels: fewer than the {self.columns} x {self.rows} patches "
                "along a side; take larger images or a coarser data.init_args.patch_grid"
            )
        top, left = (height - side * self.rows) // 2, (width - side * self.columns) // 2
        return PatchCrop(top, left, side)

    def locate(
        self, column: NDArray[np.float32], row: NDArray[np.float32], height: int, width: int
    ) -> NDArray[np.float32]:
        """Places of pixels in units of patches.

        Args:
            column: (n,) u, pixels of the image; the first pixel is 0 <= u < 1.
            row: (n,) v, pixels of the image.
            height: of the image, pixels.
            width: of the image, pixels.

        Returns:
            (n, 2) fractional row and column, 0 <= row < rows and 0 <= column < columns; (-1, -1)
            outside of the crop.
        """
        crop = self.crop(height, width)
        down = (row - np.float32(crop.top)) / np.float32(crop.side)
        across = (column - np.float32(crop.left)) / np.float32(crop.side)
        inside = (down >= 0) & (down < self.rows) & (across >= 0) & (across < self.columns)
        places = np.stack((down, across), axis=1)
        places[~inside] = -1
        return places
