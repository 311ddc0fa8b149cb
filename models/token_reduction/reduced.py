"""What reductions without learning take and return (letters as in `baselines`)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.token_reduction.reading import grid_positions
from models.token_reduction.selection import gather_kept


class BaselineInput(NamedTuple):
    """Tokens of images, as an encoder gives them.

    Attributes:
        tokens: (B, L, C), any floating type.
        grid: Rows h and columns w, L = h * w, tokens in raster order.
        cls_attention: (B, L) attention of the class token to each token, or None.
    """

    tokens: Tensor
    grid: tuple[int, int]
    cls_attention: Tensor | None = None


class Reduced(NamedTuple):
    """Tokens that stand for all tokens of an image.

    Attributes:
        tokens: (B, K, C) kept or averaged tokens, in the type of the input.
        positions: (B, K, 2) float32 row and column on the grid, 0 being the first token's centre;
            of an averaged token, the mean over the tokens it stands for.
        indices: (B, K) int64 places of kept tokens, ascending; None where tokens were averaged.
        assignment: (B, L) int64 output token that stands for each input token; -1 for a dropped
            one.
        mask: (B, L) bool, True for kept tokens; None where tokens were averaged.
    """

    tokens: Tensor
    positions: Tensor
    indices: Tensor | None
    assignment: Tensor
    mask: Tensor | None


def check_count(inputs: BaselineInput, count: int) -> None:
    """Check the inputs of a reduction to ``count`` tokens.

    Raises:
        ValueError: If shapes disagree or the count is not from 1 to L.
    """
    tokens, (height, width), attention = inputs
    if tokens.ndim != 3 or tokens.shape[1] != height * width:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)}: expected (B, {height * width}, C) for the "
            f"grid {height} x {width}"
        )
    if not 1 <= count <= height * width:
        raise ValueError(f"count={count}: must be from 1 to the {height * width} tokens")
    if attention is not None and attention.shape != tokens.shape[:2]:
        raise ValueError(
            f"cls_attention of shape {tuple(attention.shape)}: expected {tuple(tokens.shape[:2])}"
        )


def keep_tokens(inputs: BaselineInput, indices: Tensor) -> Reduced:
    """Keep the tokens at ascending ``indices`` (B, K) unchanged; all others are dropped."""
    batch, length = inputs.tokens.shape[:2]
    slots = torch.arange(indices.shape[1], device=indices.device).expand_as(indices)
    dropped = torch.full((batch, length), -1, device=indices.device)
    assignment = dropped.scatter(1, indices, slots)
    positions = grid_positions(inputs.grid, indices.device)[indices]  # (B, K, 2)
    return Reduced(
        gather_kept(inputs.tokens, indices), positions, indices, assignment, assignment >= 0
    )


def average_tokens(inputs: BaselineInput, assignment: Tensor, count: int) -> Reduced:
    """Average the tokens that share a place in ``assignment`` (B, L), none of which is empty."""
    members = F.one_hot(assignment, count).mT.float()  # (B, K, L)
    weights = members / members.sum(2, keepdim=True)
    places = grid_positions(inputs.grid, assignment.device)
    # A product adds in a fixed order, which adding by index does not on every device.
    with torch.autocast(assignment.device.type, enabled=False):
        tokens = (weights @ inputs.tokens.float()).to(inputs.tokens.dtype)
        return Reduced(tokens, weights @ places, None, assignment, None)


@torch.no_grad()
def cosine_similarity(tokens: Tensor, others: Tensor) -> Tensor:
    """Cosines (B, M, N) between tokens (B, M, C) and others (B, N, C), float32."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.normalize(tokens.float(), dim=-1) @ F.normalize(others.float(), dim=-1).mT
