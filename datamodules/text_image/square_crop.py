"""One square out of an image, at the size that is asked for."""

from __future__ import annotations

from typing import Literal

from PIL import Image

Resampling = Literal["bicubic", "lanczos"]
"""Filters, both with antialiasing."""

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


def square_crop(
    image: Image.Image, size: int, resampling: Resampling, place: tuple[float, float] = (0.5, 0.5)
) -> Image.Image:
    """Cut out the largest square and scale it; the short side of the image becomes ``size``.

    The result is what scaling the whole image and then cutting would give, but only the square is
    scaled, so that a very long image needs no more memory than it has.

    Args:
        image: of any size; a smaller one is enlarged.
        size: side of the result in pixels.
        resampling: filter of the scaling, over as many pixels as become one.
        place: where the square lies along x and y, 0 (left, top) .. 1; the default is the centre.

    Returns:
        A (size, size) image of the same mode.
    """
    short = min(image.size)
    left = round((image.width - short) * place[0])
    top = round((image.height - short) * place[1])
    box = (left, top, left + short, top + short)
    if short == size:
        return image.crop(box)
    return image.resize((size, size), _FILTERS[resampling], box=box)
