"""Perceptual losses: how far two pictures are apart in the features of a frozen network.

The networks are held outside the module tree: they add nothing to a checkpoint, an optimiser, a
weight average or a parameter count, ``train()`` and casts do not reach them, and they follow the
pictures to their device at the first call. They compute in float32 under any autocast.

Example:
    >>> loss = perceptual_loss("efficientnet_lite0", None)
    >>> loss(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)).shape
    torch.Size([])
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.efficientnet_lite0 import EfficientNetLite0Features
from models.layers.vgg19 import Vgg19Features

if TYPE_CHECKING:
    from timm.models import EfficientNet

PerceptualKind = Literal["vgg19", "efficientnet_lite0", "none"]

# Mean colour of ImageNet, RGB, 0..255.
_MEAN_COLOUR = (123.68, 116.779, 103.939)
# Divisors of the terms: pixels, five depths (the deepest term is multiplied by 10 beside).
_DIVISORS = (1.0, 2.6, 4.8, 3.7, 5.6, 0.15)


def perceptual_loss(kind: PerceptualKind, weights: Path | None) -> nn.Module | None:
    """Returns the loss called ``kind``, a module of (prediction, truth) in [0, 1], or ``None``.

    Args:
        kind: ``vgg19`` is the paper's; ``efficientnet_lite0`` needs no file; ``none`` is no loss.
        weights: file of VGG19's weights; not used by the others.

    Raises:
        ValueError: an unknown kind, or ``vgg19`` without a file.
        FileNotFoundError: the weights are not there; the message says where to get them.
    """
    if kind == "none":
        return None
    if kind == "efficientnet_lite0":
        return EfficientNetPerceptual()
    if kind != "vgg19":
        raise ValueError(f"perceptual={kind}: must be vgg19, efficientnet_lite0 or none")
    if weights is None:
        raise ValueError(
            "perceptual=vgg19 needs a weights file: give its path (imagenet-vgg-verydeep-19.mat "
            "or vgg19-dcbb9e9d.pth), or choose efficientnet_lite0, which is installed"
        )
    return Vgg19Perceptual(weights)


class Vgg19Perceptual(nn.Module):
    """Perceptual loss of CLiFT and LVSM: L1 between pixels and VGG19 features at five depths.

    The sum of |difference| means over pixels (0..255) and five feature maps, divided by 1, 2.6,
    4.8, 3.7, 5.6 and 0.15, all divided by 255.

    Args:
        weights: file of VGG19's weights, see ``models.layers.vgg19``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not VGG19.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self._hidden_network = (Vgg19Features(weights),)

    def terms(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Returns the six terms (6,) before the division by 255: pixels, then shallow to deep."""
        with _full_precision(prediction):
            predicted = _shift_pixels(prediction)
            network = self._hidden_network[0].to(prediction.device)
            with torch.no_grad():
                true = _shift_pixels(truth)
                true_maps = [true, *network(true)]
            maps = zip([predicted, *network(predicted)], true_maps, strict=True)
            distances = torch.stack([F.l1_loss(first, second) for first, second in maps])
            return distances / distances.new_tensor(_DIVISORS)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Loss () of a prediction (..., 3, H, W) in [0, 1]; only the prediction gets gradients."""
        return self.terms(prediction, truth).sum() / 255


class EfficientNetPerceptual(nn.Module):
    """Perceptual loss from the features of EfficientNet-Lite0, whose weights are installed.

    Ours, not the paper's: at strides 2, 4, 8 and 16 of the network, the mean |difference| of the
    feature maps over the mean size of the true ones, for each picture; then the mean over strides
    and pictures. Zero for equal pictures, about 1 for unrelated ones.

    Pictures whose shorter side is below ``min_side`` are enlarged (bilinear, by a whole factor):
    on 32 x 32 pixels the deeper maps would be 2 x 2 and mostly padding.

    Args:
        min_side: least side in pixels that the network sees.

    Raises:
        ValueError: ``min_side`` is out of range.
        FileNotFoundError: the package with the weights is not installed.
    """

    def __init__(self, min_side: int = 64) -> None:
        super().__init__()
        if min_side < 32:
            raise ValueError(f"min_side={min_side}: must be at least 32")
        self.min_side = min_side
        self._hidden_network = (EfficientNetLite0Features(),)

    def per_image(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [0, 1] to the true ones."""
        return self.distances(prediction, self.true_maps(truth))

    @torch.no_grad()
    def true_maps(self, truth: Tensor) -> list[Tensor]:
        """What `distances` compares with, of true pictures (B, 3, H, W) in [0, 1]."""
        with _full_precision(truth):
            return self._maps(truth)

    def distances(self, prediction: Tensor, true: list[Tensor]) -> Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [0, 1] to those that have these maps."""
        with _full_precision(prediction):
            predicted = self._maps(prediction)
            ratios = [
                (first - second).abs().mean((1, 2, 3)) / second.abs().mean((1, 2, 3)).clamp(1e-6)
                for first, second in zip(predicted, true, strict=True)
            ]
            return torch.stack(ratios).mean(0)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Loss () of a prediction (..., 3, H, W) in [0, 1]; only the prediction gets gradients."""
        return self.per_image(_flatten_views(prediction), _flatten_views(truth)).mean()

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Feature maps of images (B, 3, H, W) at strides 2, 4, 8 and 16."""
        images = images.float() * 2 - 1  # the range the network was trained on
        factor = -(-self.min_side // min(images.shape[-2:]))
        if factor > 1:
            images = F.interpolate(images, scale_factor=factor, mode="bilinear")
        images = images.contiguous(memory_format=torch.channels_last)
        network = cast("EfficientNet", self._hidden_network[0].to(images.device).network)
        maps = network.forward_intermediates(
            images, indices=[0, 1, 2, 3], stop_early=True, intermediates_only=True
        )
        return cast("list[Tensor]", maps)


@contextmanager
def _full_precision(images: Tensor) -> Iterator[None]:
    with torch.autocast(images.device.type, enabled=False):
        yield


def _flatten_views(images: Tensor) -> Tensor:
    if images.ndim < 4 or images.shape[-3] != 3:
        raise ValueError(f"pictures of shape {tuple(images.shape)}: must be (..., 3, H, W)")
    return images.flatten(0, -4)  # (B * V, 3, H, W)


def _shift_pixels(images: Tensor) -> Tensor:
    """Pictures (..., 3, H, W) in [0, 1] as levels 0..255 around ImageNet's mean colour."""
    flat = _flatten_views(images).float()
    return flat * 255 - flat.new_tensor(_MEAN_COLOUR).view(3, 1, 1)
