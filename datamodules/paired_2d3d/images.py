"""Photographs: the centre of each, resized to whole patches, and their weak augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import gaussian_blur

from datamodules.errors import DataError
from datamodules.image_transforms import decode_image

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.paired_2d3d.patch_grid import PatchGrid
    from datamodules.paired_2d3d.scene_tree import SceneTree

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


@dataclass(frozen=True)
class ImageAugmentation:
    """Weak changes of all photographs of an item together; none in the paper's main model.

    Attributes:
        offset: largest offset of each colour channel, upwards, of the range 0 .. 1.
        offset_chance: chance of the offset; 0.95 in the released configurations.
        blur_sigma: least and most standard deviation of a blur over 9 x 9 pixels, pixels.
        blur_chance: chance of the blur; 0.5 in the released configurations.

    Raises:
        ValueError: if a value is out of range.
    """

    offset: float = 0.05
    offset_chance: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_chance: float = 0.0

    def __post_init__(self) -> None:
        for name in ("offset", "offset_chance", "blur_chance"):
            if not 0 <= getattr(self, name) <= 1:
                self._fail(name, "must be 0 .. 1")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            self._fail("blur_sigma", "must be the least and the most, 0 < least <= most")

    def _fail(self, name: str, expected: str) -> None:
        raise ValueError(
            f"{name}={getattr(self, name)}: {expected} (data.init_args.image_augmentation.{name})"
        )

    @property
    def is_on(self) -> bool:
        """Whether any photograph is changed."""
        return self.offset_chance > 0 or self.blur_chance > 0

    def apply(self, image: Tensor, generator: np.random.Generator) -> Tensor:
        """Change the photographs of one item.

        Args:
            image: (V, 3, H, W) in [0, 1].
            generator: keyed by the sample; asked for the same numbers whatever the chances.

        Returns:
            (V, 3, H, W) in [0, 1].
        """
        chances = generator.random(2)
        offset = torch.from_numpy(generator.uniform(0, self.offset, (3, 1, 1)))
        sigma = float(generator.uniform(*self.blur_sigma))
        if chances[0] < self.offset_chance:
            image = (image + offset.to(image.dtype)).clamp_(0, 1)
        if chances[1] < self.blur_chance and len(image):
            image = gaussian_blur(image, [9, 9], [sigma, sigma])
        return image


def read_image(tree: SceneTree, path: str, grid: PatchGrid) -> tuple[Tensor, tuple[int, int]]:
    """Crop of one photograph, resized bilinearly to whole patches.

    Args:
        tree: the root.
        path: of the file, relative to the root.
        grid: patches of every image.

    Returns:
        (3, H, W) float32 in [0, 1], and height and width of the file's image in pixels.

    Raises:
        DataError: naming the file, if it cannot be read or is too small.
    """
    data = tree.image_bytes(path)
    try:
        picture = decode_image(data, 3)
        crop = grid.crop(picture.height, picture.width)
    except ValueError as error:
        raise DataError(f"{tree.root / path}: {error}") from None
    bottom, right = crop.top + crop.side * grid.rows, crop.left + crop.side * grid.columns
    height, width = grid.size
    resized = picture.resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(crop.left, crop.top, right, bottom),
    )
    levels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # (3, H, W)
    return levels.to(torch.float32).div_(255), (picture.height, picture.width)


def read_image_size(tree: SceneTree, path: str) -> tuple[int, int]:
    """Height and width that an image file states in its header, in pixels.

    Raises:
        DataError: naming the file, if it is no image.
    """
    place = tree.file(path)
    try:
        with Image.open(place, formats=_FORMATS) as picture:
            return picture.height, picture.width
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{place}: cannot be read as an image ({reason}); repair it") from None
