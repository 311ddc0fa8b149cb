"""EfficientNet-Lite0 image features, a light stand-in for Inception in Fréchet distances.

EfficientNet (Tan and Le, 2019, arXiv 1905.11946) in its Lite form: no squeeze-and-excitation,
ReLU6 instead of swish. The weights are TensorFlow's, so convolutions pad as TensorFlow's "SAME"
(asymmetric at stride 2) and batch norm uses an epsilon of 1e-3.

Example:
    >>> features = EfficientNetLite0Features(resolution=96)
    >>> features(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 1280])
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.layers.checkpoint import load_efficientnet_lite0


class EfficientNetLite0Features(nn.Module):
    """Frozen ImageNet features: images (B, 1 or 3, H, W) in [-1, 1] -> (B, 1280).

    Grey images are repeated to RGB. Images are resized to ``resolution`` x ``resolution`` with
    antialiased bicubic interpolation; [-1, 1] is the range the network was trained on (mean and
    deviation .5 of pixels in [0, 1]). The module stays in evaluation mode and records no gradient.

    Args:
        resolution: side in pixels at which the network sees the image, a positive multiple of 32.
            The network was trained at 224; less is faster and gives another metric.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """

    feature_dim = 1280

    def __init__(self, resolution: int = 224) -> None:
        super().__init__()
        if resolution < 32 or resolution % 32:
            raise ValueError(f"resolution={resolution}: must be a positive multiple of 32")
        self.resolution = resolution
        state = load_efficientnet_lite0()
        self.network = build_efficientnet_lite0(state)
        self.eval()
        self.requires_grad_(False)

    @property
    def name(self) -> str:
        """Extractor and resolution, for metric names: ``efficientnet_lite0_96``."""
        return f"efficientnet_lite0_{self.resolution}"

    def train(self, mode: bool = True) -> Self:
        """Ignores ``mode``: an evaluator whose batch norm adapts is no fixed measure."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 1 or 3, H, W) in [-1, 1] to pooled features (B, 1280), all in [0, 6]."""
        features: Tensor = self.network(self._as_rgb(images))
        return features

    def _as_rgb(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images of shape {tuple(images.shape)}: must be (B, 1 or 3, H, W)")
        size = (self.resolution, self.resolution)
        if images.shape[-2:] != size:
            # Bicubic overshoots at edges; a resized image file could not.
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        return images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def build_efficientnet_lite0(state: dict[str, Tensor]) -> nn.Module:
    """Network of timm without classifier, norms folded into convolutions, in evaluation mode.

    Args:
        state: Weights as `load_efficientnet_lite0` returns them.
    """
    import timm  # costs more to import than all of this project

    # On the meta device construction draws no random numbers, so the caller's stay untouched.
    with torch.device("meta"):
        network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(state, assign=True)
    network.reset_classifier(0)  # type: ignore[operator]  # timm's method, typed Tensor | Module
    _fold_batch_norms(network.eval())
    # Folding and this layout together are 2.3 times as fast on a CPU.
    return network.to(memory_format=torch.channels_last)


def _fold_batch_norms(network: nn.Module) -> None:
    """Merges each norm into the convolution registered before it, leaving its activation."""
    layers = list(network.named_modules())
    convolutions = [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)]
    norms = [(name, layer) for name, layer in layers if isinstance(layer, nn.BatchNorm2d)]
    for (conv_name, convolution), (norm_name, norm) in zip(convolutions, norms, strict=True):
        network.set_submodule(conv_name, fuse_conv_bn_eval(convolution, norm))
        network.set_submodule(norm_name, norm.get_submodule("act"))
