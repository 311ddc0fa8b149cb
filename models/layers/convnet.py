"""A small residual ConvNet for images of 8 to 64 pixels, quick to train on a CPU.

Example:
    >>> network = ConvNetClassifier(image_size=28, channels=1, num_classes=10)
    >>> network(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = convolution(channels, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Adds the convolved input to the input (B, C, H, W)."""
        return F.relu(x + self.norm(self.second(self.first(x))))


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm and ReLU: (B, inputs, H, W) -> (B, outputs, H', W')."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ConvNetClassifier(nn.Module):
    """Class logits (B, num_classes) of images (B, channels, image_size, image_size).

    The first stride brings every size to between 8 and 16 pixels, from where it is halved twice.

    Args:
        image_size: side in pixels, 8 to 64.
        channels: 1 (grey) or 3 (RGB).
        num_classes: at least 2.
        width: channels of the first layer; the last has four times as many.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, image_size: int, channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        if not 8 <= image_size <= 64:
            raise ValueError(f"image_size={image_size}: this network takes 8 to 64 pixels")
        if channels not in (1, 3) or num_classes < 2 or width < 1:
            raise ValueError(
                f"channels={channels}, num_classes={num_classes}, width={width}: "
                "must be 1 or 3, at least 2, at least 1"
            )
        stride = min(max(round(image_size / 14), 1), 4)
        self.layers = nn.Sequential(
            convolution(channels, width, max(3, 2 * stride - 1), stride),
            convolution(width, 2 * width),
            nn.MaxPool2d(2, ceil_mode=True),
            ResidualBlock(2 * width),
            convolution(2 * width, 4 * width),
            nn.MaxPool2d(2, ceil_mode=True),
            ResidualBlock(4 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, channels, H, W) in [-1, 1] to logits (B, num_classes)."""
        logits: Tensor = self.head(self.layers(images))
        return logits
