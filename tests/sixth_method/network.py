"""A residual denoiser of small images."""

from __future__ import annotations

from torch import Tensor, nn


class Denoiser(nn.Module):
    """Predicts the noise in images from all of their pixels.

    Args:
        pixels: Values of an image, C * H * W.
        width: Hidden units.
        dropout: Share of hidden units left out in training, in [0, 1).

    Raises:
        ValueError: If the width is below 1.
    """

    def __init__(self, pixels: int, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: must be >= 1 (model.width)")
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, pixels),
        )

    def forward(self, image: Tensor) -> Tensor:
        """Return the denoised images, (B, C, H, W) like the noisy ones."""
        return image - self.layers(image).view_as(image)
