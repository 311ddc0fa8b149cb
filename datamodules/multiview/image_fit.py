"""Resize and crop of posed images, and what it does to their intrinsics.

Intrinsics are (fx / W, fy / H, cx / W, cy / H) of a W x H image here, as RE10K stores them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from datamodules.image_transforms import decode_image

if TYPE_CHECKING:
    from numpy.typing import NDArray


def decode_view(data: bytes) -> Image.Image:
    """Decode an image as RGB; transparent parts become white, as usual for rendered objects.

    Args:
        data: a JPEG, PNG, WebP or BMP file.

    Raises:
        ValueError: with the reason in one line, if it cannot be decoded or is too large.
    """
    image = decode_image(data, 3)
    with Image.open(io.BytesIO(data)) as stored:
        if not stored.has_transparency_data:
            return image
        ground = Image.new("RGBA", stored.size, "white")
        return Image.alpha_composite(ground, stored.convert("RGBA")).convert("RGB")


@dataclass(frozen=True)
class ImageFit:
    """Smallest size that covers the target at the same aspect, then the centre of it.

    Attributes:
        height: of the result, in pixels.
        width: of the result, in pixels.
        exact_principal_point: True moves the principal point with the crop. False leaves cx / W
            and cy / H as they are, as the released CLiFT models were trained: right for a point
            in the middle, up to half a pixel.
    """

    height: int
    width: int
    exact_principal_point: bool = True

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to before the crop."""
        scale = max(self.height / height, self.width / width)
        # Rounding never leaves a side short: one side meets the target, the other is longer.
        return round(height * scale), round(width * scale)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize (Lanczos on 8 bits) and crop.

        Args:
            image: of mode RGB and any size.

        Returns:
            (H, W, 3) uint8.
        """
        height, width = self.scaled_size(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        top, left = (height - self.height) // 2, (width - self.width) // 2
        image = image.crop((left, top, left + self.width, top + self.height))
        return np.asarray(image)

    def intrinsics(
        self, normalised: NDArray[np.float64], height: int, width: int
    ) -> NDArray[np.float64]:
        """Intrinsics of the result in its pixels.

        Args:
            normalised: (..., 4) fx / width, fy / height, cx / width, cy / height.
            height: of the image before, in pixels.
            width: of the image before, in pixels.

        Returns:
            (..., 4) fx, fy, cx, cy in pixels of the result. Distortion coefficients stay as they
            are, since they apply before the intrinsics.
        """
        scaled_height, scaled_width = self.scaled_size(height, width)
        scaled: NDArray[np.float64] = normalised * np.array([scaled_width, scaled_height] * 2)
        if self.exact_principal_point:
            top, left = (scaled_height - self.height) // 2, (scaled_width - self.width) // 2
            scaled[..., 2:] -= np.array([left, top])
            return scaled
        scaled[..., 2:] = normalised[..., 2:] * np.array([self.width, self.height])
        return scaled


def stored_size(data: bytes) -> tuple[int, int]:
    """Height and width that an encoded image states in its header.

    Raises:
        ValueError: if it is no image, or one of absurd size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files, and refuse giants.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"not an image file of a usable size ({reason})") from error
