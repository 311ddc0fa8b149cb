"""Rotary positions of text and image tokens (arXiv 2508.05954; names as in the released code).

Letters: A axes of a position (time, row, column; or one), B items, T text tokens, N image tokens.
"""

from __future__ import annotations

from math import isqrt
from typing import Literal

import torch
from torch import Tensor

PositionKind = Literal["learned", "2drope", "1drope", "separate_2drope"]
_KINDS = ("learned", "2drope", "1drope", "separate_2drope")


def grid_side(tokens: int) -> int:
    """Side n of the square grid of N = n x n tokens.

    Raises:
        ValueError: N is no square.
    """
    side = isqrt(max(tokens, 0))
    if tokens < 1 or side * side != tokens:
        raise ValueError(
            f"tokens={tokens}: must be a square, tokens form a square grid; for example "
            f"{max(side, 1) ** 2} or {(side + 1) ** 2}"
        )
    return side


def check_position_kind(kind: str, tokens: int, axes: int) -> None:
    """Refuse kinds of positions that tokens or a language model cannot have.

    Raises:
        ValueError: Unknown kind, a grid for a number of tokens that is no square, or two
            dimensions for a language model whose positions have one axis.
    """
    if kind not in _KINDS:
        raise ValueError(f"positions={kind!r}: must be one of {', '.join(_KINDS)}")
    if "2drope" in kind:
        grid_side(tokens)
        if axes != 3:
            raise ValueError(
                f"positions={kind!r}: this language model's positions have {axes} axis; "
                "use learned or 1drope"
            )


def text_positions(valid: Tensor, axes: int) -> Tensor:
    """Positions (A, B, T) that count tokens from 0; padding has 1.

    Args:
        valid: (B, T) bool, False at padding.
        axes: A.
    """
    counted = (valid.long().cumsum(1) - 1).masked_fill(~valid, 1)
    return counted.expand(axes, -1, -1)


def image_positions(kind: PositionKind, lengths: Tensor, tokens: int, axes: int) -> Tensor:
    """Positions (A, B, N) of image tokens in raster order.

    "learned" puts all at 0, the place is told by an added embedding. "2drope" goes on behind the
    text with rows and columns, "separate_2drope" counts them from 0, "1drope" counts tokens on
    all axes from the last text token's position, as the released code does.

    Args:
        kind: One of the four.
        lengths: (B,) text tokens without padding.
        tokens: N.
        axes: A.
    """
    zeros = lengths.new_zeros(axes, len(lengths), tokens)
    if kind == "learned":
        return zeros
    steps = torch.arange(tokens, device=lengths.device)
    if kind == "1drope":
        return zeros + (lengths - 1).clamp(min=0)[:, None] + steps
    side = grid_side(tokens)
    grid = torch.stack([torch.zeros_like(steps), steps // side, steps % side])[:, None]  # (3, 1, N)
    return zeros + grid + (lengths[:, None] if kind == "2drope" else 0)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate queries or keys (..., E): channel e pairs with e + E / 2.

    Args:
        x: (..., E).
        cosine: Broadcasts to ``x``.
        sine: Likewise.
    """
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * cosine.to(x.dtype) + turned * sine.to(x.dtype)
