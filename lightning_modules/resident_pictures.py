"""Pictures of a small training set that stay on the device, and their shifts."""

from __future__ import annotations

import torch
from torch import Tensor


class ResidentPictures:
    """Pictures as bytes on a device.

    Args:
        pixels: (M, H, W, 3) uint8.
        device: Where they stay.
    """

    def __init__(self, pixels: Tensor, device: torch.device) -> None:
        self._pixels = pixels.to(device)

    def __len__(self) -> int:
        """Number of pictures M."""
        return len(self._pixels)

    def pieces(self, size: int) -> tuple[Tensor, ...]:
        """Positions of all pictures, in parts of at most this many."""
        return torch.split(torch.arange(len(self), device=self._pixels.device), size)

    def take(self, index: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) float32 in [-1, 1]."""
        return _to_unit(self._pixels[index])

    def take_shifted(self, index: Tensor, most: int, generator: torch.Generator) -> Tensor:
        """As `take`, each picture moved; its border is drawn out to fill what comes free.

        Args:
            index: (B,) positions.
            most: Largest shift in pixels, of either sign, in each direction.
            generator: On the device.
        """
        if most == 0:
            return self.take(index)
        height, width = self._pixels.shape[1:3]
        shape = (2, len(index), 1)
        moves = torch.randint(-most, most + 1, shape, generator=generator, device=index.device)
        rows, columns = (
            (torch.arange(size, device=index.device) + move).clamp(0, size - 1)  # (B, size)
            for size, move in zip((height, width), moves, strict=True)
        )
        place = (index[:, None, None], rows[:, :, None], columns[:, None, :])
        return _to_unit(self._pixels[place])


def _to_unit(pixels: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) -> (B, 3, H, W) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
