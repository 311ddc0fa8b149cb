"""EfficientNet-Lite0 as a frozen encoder of patches, from an installed package: no download.

EfficientNet (arXiv 1905.11946) in its Lite form with ImageNet weights. Its feature map of one
stride stands for the patch tokens of a vision transformer: a cell is a "patch" of that many
pixels, though it sees beyond it. Letters: B images, L = h * w cells, C channels.

Example:
    >>> encoder = EfficientNetLite0Encoder(stride=16, image_size=256)
    >>> encoder(torch.zeros(1, 3, 128, 128)).tokens.shape
    torch.Size([1, 256, 112])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.image_encoders.encoder_towers import Tower
from models.image_encoders.frozen_encoder import FrozenEncoder
from models.layers.checkpoint import load_efficientnet_lite0
from models.layers.efficientnet_lite0 import build_efficientnet_lite0

# Stride of a feature map -> stages up to the last one of that stride, and its channels.
_STAGES = {8: (3, 40), 16: (5, 112), 32: (7, 320)}


class EfficientNetTower(Tower):
    """Stages of timm's EfficientNet-Lite0 as blocks; images of any size are resized to one.

    Args:
        network: From `build_efficientnet_lite0`; stages that are not needed are taken out of it.
        stride: 8, 16 or 32.
        image_size: (height, width) at which the network sees every image.
    """

    def __init__(self, network: nn.Module, stride: int, image_size: tuple[int, int]) -> None:
        stages: Any = network
        stages.blocks = stages.blocks[: _STAGES[stride][0]]
        stages.conv_head, stages.bn2 = nn.Identity(), nn.Identity()
        self.network, self.blocks = network, list(stages.blocks)
        self.prefix, self.has_class_token = 0, False
        self.patch_size, self.image_size = (stride, stride), image_size
        self.mean = self.std = (0.5, 0.5, 0.5)
        self.architecture = f"efficientnet_lite0 stride={stride} image_size={image_size}"

    def check_size(self, height: int, width: int) -> None:
        """Any size."""

    def hidden_state(self, pixels: Tensor, layer: int) -> Tensor:
        """See `Tower`."""
        if tuple(pixels.shape[2:]) != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bilinear", antialias=True)
        network: Any = self.network
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        state: Tensor = network.bn1(network.conv_stem(pixels))
        for stage in self.blocks[:layer]:
            state = stage(state)
        return state.flatten(2).mT  # (B, C, h, w) -> (B, L, C)


class EfficientNetLite0Encoder(FrozenEncoder):
    """Images (B, 3, H, W) of any size in [-1, 1] -> cells of EfficientNet-Lite0's feature map.

    Args:
        stride: Pixels of the resized image to a cell: 8 (40 channels), 16 (112) or 32 (320).
        image_size: Side, or (height, width), in pixels to which images are resized, bilinearly;
            multiples of the stride. Resizing does not keep the aspect of other images.

    Raises:
        FileNotFoundError: If the package with the weights is not installed.
        ValueError: If there is no such stride or the size is no multiple of it.
    """

    def __init__(self, stride: int = 16, image_size: int | tuple[int, int] = 256) -> None:
        if stride not in _STAGES:
            raise ValueError(f"stride={stride}: must be one of {', '.join(map(str, _STAGES))}")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) <= 0 or size[0] % stride or size[1] % stride:
            raise ValueError(
                f"image_size={image_size}: must be one or two positive multiples of {stride}"
            )
        network = build_efficientnet_lite0(load_efficientnet_lite0())
        super().__init__(EfficientNetTower(network, stride, (size[0], size[1])))
        self._channels = _STAGES[stride][1]

    @property
    def channels(self) -> int:
        """Channels C of a cell."""
        return self._channels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of cells, the same for images of any size but an empty one."""
        if not height or not width:
            return 0, 0
        return super().grid(*self.image_size)
