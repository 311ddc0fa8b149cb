"""Which tokens of an image are kept, given a score for each (arXiv 2503.16660, sec. 4.1.1 and 5).

Kept tokens are the encoder's own, in raster order. A budget is spent per tile, per image (of one
or more tiles) or over the whole batch; a share of it may be reserved for coverage, because scores
alone leave plain areas of a scene without any token.
Letters: B tiles, L tokens of a tile, C channels, K kept tokens of the fullest tile; G groups of T
tiles that share a budget, N = T * L tokens of a group.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from models.token_reduction.coverage import even_positions, spread_tokens

Budget = Literal["tile", "image", "batch"]
Fill = Literal["grid", "farthest"]


class Selection(NamedTuple):
    """Tokens kept of each tile.

    Attributes:
        kept: (B, K, C) rows of the given tokens, untouched; padding is 0.
        indices: (B, K) int64 places of the kept tokens, ascending; padding is L.
        mask: (B, L) bool, True for kept tokens.
        scores: (B, L) float32, as given.
        valid: (B, K) bool, False for padding.
    """

    kept: Tensor
    indices: Tensor
    mask: Tensor
    scores: Tensor
    valid: Tensor


class PackedTokens(NamedTuple):
    """Kept tokens of all tiles one after the other, without padding.

    Attributes:
        tokens: (sum of lengths, C).
        indices: (sum of lengths,) int64 place of each within its tile.
        lengths: (B,) int64 kept tokens of each tile, 0 possible under a shared budget.
    """

    tokens: Tensor
    indices: Tensor
    lengths: Tensor


class _Groups(NamedTuple):
    """Tiles (G, T) that share a budget, and which of these places hold one."""

    tiles: Tensor
    present: Tensor


def select(
    tokens: Tensor,
    scores: Tensor,
    *,
    share: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    budget: Budget = "tile",
    tiles: Tensor | None = None,
    coverage: float = 0.0,
    fill: Fill = "grid",
    minimum: int = 1,
    grid: tuple[int, int] | None = None,
) -> Selection:
    """Keep the tokens with the highest scores; equal scores go to the lower index.

    Exactly one of ``share``, ``count`` and ``threshold`` says how many. A tile's result depends on
    other tiles only through a shared budget.

    Args:
        tokens: (B, L, C) in raster order.
        scores: (B, L); infinities are allowed.
        share: Part to keep of a budget's tokens, in (0, 1]: ``round(share * tokens)``.
        count: Tokens to keep in each budget; one with fewer tokens keeps them all.
        threshold: Keep every token whose score is above.
        budget: Whether share, count and minimum hold for each tile, for all tiles of an image
            together (of which one may then keep none), or for the whole batch.
        tiles: (B,) integers, the image of each tile; with ``budget="image"`` only.
        coverage: Part of the kept tokens that goes to coverage, in [0, 1].
        fill: "grid" reserves evenly spaced tokens and ranks the others by score; "farthest" ranks
            by score, then adds the tokens least similar (cosine) to any kept one.
        minimum: Tokens that each budget keeps at least.
        grid: Rows and columns of a tile, for ``fill="grid"``; None is a square, or else one row.

    Raises:
        ValueError: Wrong shapes, NaN scores, or arguments out of range.
    """
    _check_tensors(tokens, scores)
    _check_amounts(share, count, threshold)
    grid = grid or _square(scores.shape[1])
    most = count if budget == "tile" else None
    _check_options(scores.shape[1], grid, coverage, fill, {"minimum": minimum, "count": most})
    values = scores.detach().float()
    groups = _group_tiles(budget, tiles, scores)
    present = groups.present.repeat_interleave(values.shape[1], dim=1)  # (G, N)
    pooled = values[groups.tiles].flatten(1)  # (G, N)
    sizes: list[int] = present.sum(1).tolist()
    if threshold is not None:
        amounts: list[int] = ((pooled > threshold) & present).sum(1).tolist()
    else:
        amounts = [count or round((share or 0) * size) for size in sizes]
    amounts = [min(max(minimum, k), size) for k, size in zip(amounts, sizes, strict=True)]
    covering = [round(coverage * k) for k in amounts]
    if fill == "farthest" and any(covering):
        pool = tokens.detach()[groups.tiles].flatten(1, 2)  # (G, N, C)
        chosen = _farthest_fill(pool, pooled, amounts, covering, present)
    else:
        even = _even_tokens(groups, covering, grid)
        best = [k - c for k, c in zip(amounts, covering, strict=True)]
        chosen = even | _best(pooled, best, ~present | even)
    chosen = chosen.view(*groups.tiles.shape, -1)  # (G, T, L)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[groups.tiles[groups.present]] = chosen[groups.present]
    return selection_of(tokens, values, mask)


def selection_of(tokens: Tensor, scores: Tensor, mask: Tensor) -> Selection:
    """Gather what a mask keeps.

    Args:
        tokens: (B, L, C); gradients pass to the kept ones.
        scores: (B, L).
        mask: (B, L) bool.
    """
    length = mask.shape[1]
    places = torch.arange(length, device=mask.device).masked_fill(~mask, length)
    indices = places.sort(dim=1).values[:, : int(mask.sum(1).max())]
    kept = gather_kept(tokens, indices)
    return Selection(kept, indices, mask, scores.detach().float(), indices < length)


def gather_kept(tokens: Tensor, indices: Tensor) -> Tensor:
    """Take tokens (B, L, ...) at places (B, K): (B, K, ...), zeros where a place is L (padding)."""
    shape = (*indices.shape, *([1] * (tokens.ndim - 2)))
    within = indices.clamp(max=tokens.shape[1] - 1).view(shape)
    rows = tokens.gather(1, within.expand(*indices.shape, *tokens.shape[2:]))
    return rows.masked_fill((indices >= tokens.shape[1]).view(shape), 0)


def scatter_kept(kept: Tensor, indices: Tensor, length: int, filling: Tensor) -> Tensor:
    """Put kept tokens back in their places: the reverse of `gather_kept`.

    Args:
        kept: (B, K, C).
        indices: (B, K) int64; padding is ``length``.
        length: Tokens L of a whole tile.
        filling: (C,) or a scalar, stands for every dropped token.

    Returns:
        (B, L, C).
    """
    batch, _, channels = kept.shape
    whole = filling.to(kept).expand(batch, length + 1, channels)
    index = indices[..., None].expand(-1, -1, channels)
    return whole.scatter(1, index, kept)[:, :length]


def as_list(selection: Selection) -> list[Tensor]:
    """Kept tokens of each tile, (K of the tile, C) each."""
    return [rows[valid] for rows, valid in zip(selection.kept, selection.valid, strict=True)]


def as_packed(selection: Selection) -> PackedTokens:
    """Kept tokens of all tiles without padding, tile after tile."""
    valid = selection.valid
    return PackedTokens(selection.kept[valid], selection.indices[valid], valid.sum(1))


def _group_tiles(budget: Budget, tiles: Tensor | None, scores: Tensor) -> _Groups:
    """Tiles of each budget, padded with tile 0."""
    batch, device = len(scores), scores.device
    if budget not in ("tile", "image", "batch"):
        raise ValueError(f"budget={budget!r}: expected tile, image or batch")
    own = torch.arange(batch, device=device)
    if (tiles is not None) != (budget == "image"):
        raise ValueError(f"budget={budget!r}: tiles must be given for 'image' and only for it")
    if budget == "tile":
        return _Groups(own[:, None], torch.ones(batch, 1, dtype=torch.bool, device=device))
    if budget == "batch":
        return _Groups(own[None], torch.ones(1, batch, dtype=torch.bool, device=device))
    if tiles is None or tiles.shape != (batch,) or tiles.is_floating_point():
        found = None if tiles is None else f"{tuple(tiles.shape)} {tiles.dtype}"
        raise ValueError(f"budget={budget!r}, tiles {found}: expected ({batch},) integers")
    images, image = torch.unique(tiles.to(device), return_inverse=True)
    member = image == torch.arange(len(images), device=device)[:, None]  # (G, B)
    order = member.int().argsort(dim=1, descending=True, stable=True)
    most = int(member.sum(1).max())
    present = member.gather(1, order)[:, :most]
    return _Groups(order[:, :most].masked_fill(~present, 0), present)


def _best(scores: Tensor, amounts: list[int], blocked: Tensor) -> Tensor:
    """The highest unblocked scores of each row of (G, N), lower index first among equals."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    last = blocked.gather(1, order).int().argsort(dim=1, stable=True)
    order = order.gather(1, last)
    wanted = torch.tensor(amounts, device=scores.device)[:, None]
    first = torch.arange(scores.shape[1], device=scores.device) < wanted
    return torch.zeros_like(blocked).scatter(1, order, first)


def _even_tokens(groups: _Groups, counts: list[int], grid: tuple[int, int]) -> Tensor:
    """Evenly spaced tokens (G, N), as many in each group as told, shared evenly by its tiles."""
    length = grid[0] * grid[1]
    even = torch.zeros(*groups.tiles.shape, length, dtype=torch.bool)
    for row, present, count in zip(even, groups.present.tolist(), counts, strict=True):
        tiles = sum(present)
        for t in range(tiles if count else 0):
            row[t, even_positions(grid, (t + 1) * count // tiles - t * count // tiles)] = True
    return even.flatten(1).to(groups.tiles.device)


def _farthest_fill(
    tokens: Tensor, scores: Tensor, amounts: list[int], covering: list[int], present: Tensor
) -> Tensor:
    """The best scores but for ``covering`` of them, then the tokens unlike any kept: (G, N)."""
    ranked = [max(1, k - c) for k, c in zip(amounts, covering, strict=True)]
    amount = torch.tensor(amounts, device=scores.device)
    return spread_tokens(tokens, _best(scores, ranked, ~present), amount, present)


def _square(length: int) -> tuple[int, int]:
    side = isqrt(length)
    return (side, side) if side * side == length else (1, length)


def _check_tensors(tokens: Tensor, scores: Tensor) -> None:
    if tokens.ndim != 3 or not tokens.numel() or scores.shape != tokens.shape[:2]:
        raise ValueError(
            f"tokens {tuple(tokens.shape)}, scores {tuple(scores.shape)}: expected (B, L, C) and "
            "(B, L), none of them 0"
        )
    if scores.isnan().any():
        raise ValueError("scores hold NaN: expected numbers; look at the selector that made them")


def _check_amounts(share: float | None, count: int | None, threshold: float | None) -> None:
    given = {"share": share, "count": count, "threshold": threshold}
    told = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(told) != 1:
        raise ValueError(f"{', '.join(told) or 'nothing'}: give one of share, count, threshold")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share={share}: must be in (0, 1]")
    if count is not None and count < 1:
        raise ValueError(f"count={count}: must be >= 1")
    if threshold is not None and threshold != threshold:
        raise ValueError(f"threshold={threshold}: must be a number")


def _check_options(
    length: int,
    grid: tuple[int, int],
    coverage: float,
    fill: str,
    numbers: Mapping[str, int | None],
) -> None:
    for name, number in numbers.items():
        if number is not None and not 1 <= number <= length:
            raise ValueError(f"{name}={number}: must be from 1 to the {length} tokens of a tile")
    if grid[0] * grid[1] != length:
        raise ValueError(f"grid={grid}: must have the {length} tokens of a tile")
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage={coverage}: must be in [0, 1]")
    if fill not in ("grid", "farthest"):
        raise ValueError(f"fill={fill!r}: expected grid or farthest")
