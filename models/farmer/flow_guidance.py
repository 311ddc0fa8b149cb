"""Linear guidance of a class-conditional flow: TarFlow's; the flow of FARMER sees no class."""

from typing import NamedTuple

import torch
from torch import Tensor


class FlowGuidance(NamedTuple):
    """Linear guidance of a class-conditional flow, as the TarFlow baseline uses it.

    Attributes:
        scale: Extrapolation g in (1 + g) conditional - g unconditional, >= 0.
        annealed: Raise the scale linearly with the token position.
    """

    scale: float
    annealed: bool = False


def extrapolate(raw: Tensor, guidance: FlowGuidance | None, start: int, tokens: int) -> Tensor:
    """Guided (a, mu) from those with and without the class.

    Args:
        raw: (2B, T, 2d) raw outputs, conditional ones first; (B, T, 2d), returned as it is,
            without guidance.
        guidance: Scale and annealing; None for none.
        start: Block position of the first of the T tokens.
        tokens: Number of tokens N of the block.

    Returns:
        (B, T, 2d).
    """
    if guidance is None:
        return raw
    known, unknown = raw.chunk(2)
    scale: float | Tensor = guidance.scale
    if guidance.annealed:
        positions = torch.arange(start, start + raw.shape[1], device=raw.device)
        scale = (guidance.scale * positions / (tokens - 1)).view(1, -1, 1)
    return known + scale * (known - unknown)
