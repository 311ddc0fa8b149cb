"""From discrete grey levels to a continuous density, and to bits per dimension (section 1.9).

Level v of L is spread uniformly over a bin of width 2 / L of [-1, 1]. An optional elementwise
stretch then widens the bins of frequent levels, with its exact log-determinant: data sets with a
constant background otherwise ask an affine flow for near-infinite slopes.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def quantize(images: Tensor, levels: int) -> Tensor:
    """Images in [-1, 1], level v at 2 v / (L - 1) - 1, to float levels 0 .. L - 1."""
    return ((images + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1)


def dequantize(images: Tensor, levels: int, uniform: Tensor) -> Tensor:
    """Spread each level over its bin: x = 2 (v + u) / L - 1 for u in [0, 1)."""
    return (quantize(images, levels) + uniform) * (2 / levels) - 1


def requantize(values: Tensor, levels: int) -> Tensor:
    """Continuous values to the images of the levels whose bins they fall into."""
    # The margin keeps a value on the lower edge of its bin, where float32 may fall short of it.
    level = ((values + 1) * (levels / 2) + 1e-4).floor().clamp(0, levels - 1)
    return level * (2 / (levels - 1)) - 1


def count_levels(batches: Iterable[Tensor], levels: int) -> Tensor:
    """Number of values at each level, (L,) int64, in batches of images in [-1, 1]."""
    counts = torch.zeros(levels, dtype=torch.int64)
    for images in batches:
        level = quantize(images.cpu(), levels).long().flatten()
        counts += torch.bincount(level, minlength=levels)
    return counts


def bits_per_dim(log_density: Tensor, dims: int, levels: int) -> Tensor:
    """Nats of log p(x), x uniformly dequantised in [-1, 1], to bits per dimension.

    Args:
        log_density: (...) log-density per image.
        dims: Number of values of an image.
        levels: Number of grey levels L; the constant is log2(L / 2).
    """
    return -log_density / (dims * math.log(2)) + math.log2(levels / 2)


class LevelStretch(nn.Module):
    """Monotone piecewise-linear map of [-1, 1] to itself that widens frequent levels.

    The bin of level v gets the width 2 ((1 - s) / L + s p_v), where p_v is the level's share of
    the training pixels. Strength s = 0 is the identity. Not part of the paper: it uses pixels as
    they are.

    Args:
        levels: Number of grey levels L.
        strength: Share s of the histogram in the bin widths, in [0, 1).
    """

    edges: Tensor
    fitted_flag: Tensor

    def __init__(self, levels: int, strength: float = 0.0) -> None:
        super().__init__()
        if not 0 <= strength < 1:
            raise ValueError(f"level_stretch={strength}: must be in [0, 1)")
        self.levels = levels
        self.strength = strength
        self.register_buffer("edges", torch.linspace(-1, 1, levels + 1))
        self.register_buffer("fitted_flag", torch.tensor(False))

    @property
    def fitted(self) -> bool:
        """Whether `fit` has been called, here or before a checkpoint was written."""
        return bool(self.fitted_flag)

    def fit(self, counts: Tensor) -> None:
        """Set the bin widths from the number of training pixels at each level, (L,)."""
        share = (counts.double() + 1) / (counts + 1).sum()  # no bin may vanish
        widths = 2 * ((1 - self.strength) / self.levels + self.strength * share)
        edges = torch.cat([widths.new_zeros(1), widths.cumsum(0)]) - 1
        self.edges.copy_(edges.to(self.edges))
        self.fitted_flag.fill_(True)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stretch values (B, ...) in [-1, 1]; returns them and the log-determinant (B,)."""
        if self.strength == 0:
            return values, values.new_zeros(values.shape[0])
        position = (values + 1) * (self.levels / 2)
        level = position.floor().clamp(0, self.levels - 1)
        index = level.long()
        edges = self.edges.to(values.dtype)
        low = edges[index]
        width = edges[index + 1] - low
        stretched = low + (position - level) * width
        log_det = torch.log(width * (self.levels / 2)).flatten(1).sum(1)
        return stretched, log_det

    def inverse(self, values: Tensor) -> Tensor:
        """Undo `forward`; values outside [-1, 1] are clamped to it."""
        if self.strength == 0:
            return values
        edges = self.edges.to(values.dtype)
        values = values.clamp(-1, 1)
        index = torch.searchsorted(edges, values.contiguous(), right=True) - 1
        index = index.clamp(0, self.levels - 1)
        low = edges[index]
        inside = (values - low) / (edges[index + 1] - low)
        return (index + inside) * (2 / self.levels) - 1
