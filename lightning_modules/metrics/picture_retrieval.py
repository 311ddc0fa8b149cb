"""How well pictures are told to be the right ones by an encoder that had no part in making them.

Letters: M pictures, G true pictures, of which picture m should show the m-th.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_modules.metrics.image_quality import psnr
from lightning_modules.metrics.retrieval import grouped_ranks, recall, retrieval_ranks
from models.image_encoders.efficientnet_lite0 import EfficientNetLite0Encoder

_CHUNK = 100


class PictureJudge:
    """Finds pictures among true ones by features of EfficientNet-Lite0 (real ImageNet weights).

    Features are the cells of one feature map, flattened, minus the mean of all true pictures.
    Stride 8 sees little more than pixels, stride 32 mostly the kind of object. Emoji blurred to
    8 x 8 pixels are found among 400 in 99 % (stride 8), 86 % (16) and 24 % (32) of the cases.

    Args:
        truth: (G, 3, H, W) true pictures in [-1, 1].
        stride: Of the feature map.
        image_size: Side in pixels at which the encoder sees pictures, a multiple of the stride.
        group: Pictures compared with each other for the figure "r1_group".
    """

    def __init__(
        self,
        truth: Tensor,
        stride: Literal[8, 16, 32] = 16,
        image_size: int = 96,
        group: int = 100,
    ) -> None:
        self._encoder = EfficientNetLite0Encoder(stride, image_size)
        self._encoder.to(truth.device)
        self._truth, self._group = truth, group
        self._gallery = self._features(truth)
        self._centre = self._gallery.mean(0)

    def _features(self, pictures: Tensor) -> Tensor:
        """Features (M, F) on the CPU."""
        with torch.autocast(pictures.device.type, enabled=False):
            parts = [self._encoder(part.float()).tokens for part in torch.split(pictures, _CHUNK)]
        return torch.cat([part.flatten(1).float().cpu() for part in parts])

    def rate(self, pictures: Tensor) -> dict[str, float]:
        """Figures "r1_group", "r1", "r5" and "psnr" of pictures (M, 3, H, W), M <= G."""
        found, own = self._features(pictures), torch.arange(len(pictures))
        ranks = retrieval_ranks(found, self._gallery, own, self._centre)
        among = grouped_ranks(found, self._gallery, own, self._group, self._centre)
        truth = self._truth[: len(pictures)]
        quality = psnr(pictures.float() / 2 + 0.5, truth / 2 + 0.5)
        return {
            "r1_group": recall(among, 1),
            "r1": recall(ranks, 1),
            "r5": recall(ranks, 5),
            "psnr": float(quality.mean()),
        }
