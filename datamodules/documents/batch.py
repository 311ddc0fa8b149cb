"""The batch that documents and photographs give and token-reduction methods take.

Letters: B images of H x W pixels, cut into L square patches ("tokens") in raster order.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class DocumentBatch(TypedDict):
    """Images with what is written in them, as far as it is known.

    What is not known of images from disk is -1 (``kind`` without classes, ``region``,
    ``item_token``, ``scene``).

    Attributes:
        image: (B, 3, H, W) float32 in [-1, 1], RGB; level v maps to 2 * v / 255 - 1.
        kind: (B,) int64, 0 page or 1 photograph; of images from disk their class.
        region: (B, 4) int64, what is written in the upper left, upper right, lower left and lower
            right quarter: 0 nothing, 1 .. 10 digit 0 .. 9, from 11 on the words.
        item_token: (B, L) int64, class (as in ``region``) of the item whose ink covers at least
            5 % of the patch, else 0.
        scene: (B,) int64, background * 4 + side that the light comes from, 0 .. 15.
        index: (B,) int64, position of the sample in its split.
        complexity: (B,) float32, bytes of the image as a PNG of level 1; 0 in training.
    """

    image: Tensor
    kind: Tensor
    region: Tensor
    item_token: Tensor
    scene: Tensor
    index: Tensor
    complexity: Tensor
