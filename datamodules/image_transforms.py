"""Encoded image to cropped uint8 pixels, and uint8 pixels to the model's range."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

MAX_PIXELS = 89_478_485
"""Images that claim more pixels than this (256 MB as RGB) are refused before decoding."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


@dataclass(frozen=True)
class PixelFormat:
    """What every image of a data set is turned into.

    Attributes:
        image_size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        levels: number of grey values per channel; pixels lie in 0 .. levels - 1.
        crop: "adm" (halve by averaging, bicubic, centre) or "resize" (bilinear, centre).
    """

    image_size: int
    channels: Literal[1, 3]
    levels: int
    crop: Literal["adm", "resize"]

    def to_pixels(self, source: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Decode and crop one image.

        Args:
            source: an encoded image, or pixels (H, W, C) with C 1 or 3.

        Returns:
            (image_size, image_size, channels) uint8 below ``levels``.

        Raises:
            ValueError: if the image cannot be decoded, is too large, has more than 8 bits per
                channel or holds a value outside ``0 .. levels - 1``.
        """
        size = self.image_size
        if isinstance(source, bytes):
            image = decode_image(source, self.channels)
        elif source.shape == (size, size, self.channels):
            return self._checked(source)
        else:
            grey = source.shape[2] == 1
            image = _convert(Image.fromarray(source[:, :, 0] if grey else source), self.channels)
        if image.size != (size, size):
            image = adm_crop(image, size) if self.crop == "adm" else resize_crop(image, size)
        return self._checked(np.asarray(image).reshape(size, size, self.channels))

    def _checked(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.levels < 256 and (highest := int(pixels.max())) >= self.levels:
            raise ValueError(
                f"pixel value {highest}: with levels={self.levels} pixels lie in 0 .. "
                f"{self.levels - 1}; set data.init_args.levels to 256"
            )
        return pixels


def _convert(image: Image.Image, channels: Literal[1, 3]) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}: more than 8 bits per channel; convert to 8 bits")
    return image.convert(mode)


def _on_white(image: Image.Image) -> Image.Image:
    """The image as seen on white paper, if it is transparent anywhere."""
    if not image.has_transparency_data:
        return image
    paper = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(paper, image.convert("RGBA"))


def decode_image(data: bytes, channels: Literal[1, 3], *, on_white: bool = False) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP.

    Args:
        data: the encoded file.
        channels: 1 converts to grey (ITU-R 601 luma), 3 to RGB.
        on_white: put transparent images on white; otherwise transparency is dropped.

    Returns:
        A loaded image of mode L or RGB.

    Raises:
        ValueError: with the reason in one line, if it cannot be decoded or is too large.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels: more than the {MAX_PIXELS} allowed")
        image.load()
        return _convert(_on_white(image) if on_white else image, channels)
    except Exception as error:
        # Pillow's plugins raise almost anything on damaged files (struct.error, EOFError, ...).
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"not a {', '.join(_FORMATS)} file ({len(data)} bytes)"
        raise ValueError(f"cannot decode the image: {reason}") from error


def _centre(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Centre crop as in ADM (Dhariwal and Nichol 2021), the usual one for ImageNet generation.

    The image is halved by averaging while its short side is at least twice the target, then
    scaled bicubically to the target, then cropped.

    Args:
        image: of any size; a smaller one is enlarged.
        size: side of the result in pixels.

    Returns:
        A (size, size) image of the same mode.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = (round(image.width * scale), round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    return _centre(image, (image.width - size) // 2, (image.height - size) // 2, size)


def resize_crop(image: Image.Image, size: int) -> Image.Image:
    """Bilinear resize of the short side to ``size``, then the centre, as torchvision does it.

    Args:
        image: of any size; a smaller one is enlarged.
        size: side of the result in pixels.

    Returns:
        A (size, size) image of the same mode.
    """
    short = min(image.size)
    scaled = (size * image.width // short, size * image.height // short)
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    return _centre(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def to_unit_range(pixels: NDArray[np.uint8], levels: int) -> Tensor:
    """Map grey level v to ``2 * v / (levels - 1) - 1``.

    Args:
        pixels: (B, H, W, C) uint8 below ``levels``.
        levels: number of grey levels, >= 2.

    Returns:
        (B, C, H, W) float32 in [-1, 1], contiguous.
    """
    planar = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))  # (B, C, H, W)
    # Dividing, unlike multiplying by the reciprocal, keeps the ends at exactly -1 and 1.
    return torch.from_numpy(planar).float().mul_(2).div_(levels - 1).sub_(1)
