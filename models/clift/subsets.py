"""Subsets of a scene's tokens: random token drop and gathering (arXiv 2507.08776, sec. 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenSubset(NamedTuple):
    """Positions of kept tokens, for each scene or for each target view of each scene.

    Attributes:
        positions: (B, S) or (B, T, S) int64, ascending; padding is 0.
        valid: Same shape, bool; False is padding.
    """

    positions: Tensor
    valid: Tensor


def random_subset(
    tokens: Tensor,
    ratio: float,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
    views: int | None = None,
) -> TokenSubset:
    """Keep a random share of each scene's tokens, drawn without replacement.

    A scene keeps ``int(ratio * its valid tokens)`` of them, at least one.

    Args:
        tokens: (B, N, C), only its shape and device are used.
        ratio: Share to keep, in (0, 1].
        generator: Source of the draw; its device may differ from the tokens'.
        valid: (B, N) bool; padded tokens are never kept. None keeps from all.
        views: Number T of target views that each get their own subset; None draws one per scene.

    Raises:
        ValueError: If the ratio is outside (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio}: the share of tokens to keep must be in (0, 1]")
    batch, count = tokens.shape[:2]
    device = tokens.device if generator is None else generator.device
    keys = torch.rand(batch, views or 1, count, generator=generator, device=device)
    keys = keys.to(tokens.device)  # (B, T, N)
    if valid is None:
        keep = torch.full((batch, 1, 1), max(1, int(count * ratio)), device=tokens.device)
        size = max(1, int(count * ratio))
    else:
        keys = keys.masked_fill(~valid[:, None], torch.inf)
        keep = (valid.sum(1) * ratio).long().clamp(min=1)[:, None, None]  # (B, 1, 1)
        size = int(keep.max())
    positions = keys.argsort(dim=-1, stable=True)[..., :size]  # (B, T, S)
    kept = torch.arange(size, device=tokens.device) < keep
    if valid is not None:
        kept = kept & valid[:, None].expand_as(keys).gather(-1, positions)
    positions, order = positions.masked_fill(~kept, count).sort(dim=-1)
    kept = kept.expand_as(positions).gather(-1, order)
    positions = positions.masked_fill(~kept, 0)
    if views is None:
        return TokenSubset(positions[:, 0], kept[:, 0])
    return TokenSubset(positions, kept)


def take_tokens(tokens: Tensor, positions: Tensor) -> Tensor:
    """Gather tokens (B, N, ...) at positions (B, S): (B, S, ...)."""
    index = positions.reshape(*positions.shape, *([1] * (tokens.ndim - 2)))
    return tokens.gather(1, index.expand(*positions.shape, *tokens.shape[2:]))
