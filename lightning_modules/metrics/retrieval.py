"""Retrieval: does what was generated from a caption find its own original among all others?

Letters: M queries, G gallery entries, F features.

Example:
    >>> gallery = torch.eye(4)
    >>> recall(retrieval_ranks(gallery, gallery, torch.arange(4)), 1)
    1.0
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def retrieval_ranks(
    queries: Tensor, gallery: Tensor, truth: Tensor, centre: Tensor | None = None
) -> Tensor:
    """Rank of each query's own gallery entry by cosine similarity, 0 for the first.

    Among equal similarities the entry of the lower index comes first, so a constant answer is
    right by chance alone.

    Args:
        queries: (M, F) or (M, ...), flattened.
        gallery: (G, F) likewise.
        truth: (M,) int64, the own entry of each query.
        centre: (F,) subtracted from both first; None subtracts nothing. Without it, what all
            entries share hides what tells them apart.

    Returns:
        (M,) int64 on the CPU.

    Raises:
        ValueError: Widths differ, or an entry does not exist.
    """
    queries, gallery = queries.flatten(1).float(), gallery.flatten(1).float()
    if queries.shape[1] != gallery.shape[1] or len(truth) != len(queries):
        raise ValueError(
            f"queries {tuple(queries.shape)}, gallery {tuple(gallery.shape)}, {len(truth)} own "
            "entries: expected (M, F), (G, F) and M"
        )
    if len(truth) and not 0 <= int(truth.min()) <= int(truth.max()) < len(gallery):
        raise ValueError(f"truth={int(truth.max())}: the gallery has {len(gallery)} entries")
    if centre is not None:
        flat = centre.flatten().float()
        queries, gallery = queries - flat, gallery - flat
    scores = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T  # (M, G)
    own = scores.gather(1, truth[:, None].to(scores.device))  # (M, 1)
    earlier = torch.arange(len(gallery), device=scores.device) < truth[:, None].to(scores.device)
    return ((scores > own).sum(1) + ((scores == own) & earlier).sum(1)).cpu()


def nearest_entries(queries: Tensor, gallery: Tensor, centre: Tensor) -> Tensor:
    """Gallery entry (M,) int64 of highest cosine similarity to each query.

    Args:
        queries: (M, ...).
        gallery: (G, ...).
        centre: Subtracted from both first, see `retrieval_ranks`.
    """
    own, others = ((entries - centre).flatten(1).float() for entries in (queries, gallery))
    return (F.normalize(own, dim=1) @ F.normalize(others, dim=1).T).argmax(1)


def grouped_ranks(
    queries: Tensor,
    gallery: Tensor,
    truth: Tensor,
    size: int = 100,
    centre: Tensor | None = None,
) -> Tensor:
    """Ranks (M,) where each query is compared with the own entries of its group alone.

    Args:
        queries: (M, ...).
        gallery: (G, ...).
        truth: (M,) own entries.
        size: Queries of a group, in the given order; a shorter last group joins the one before.
        centre: See `retrieval_ranks`.
    """
    starts = list(range(0, max(1, len(queries) - size + 1), size))
    ends = [*starts[1:], len(queries)]
    ranks = []
    for start, end in zip(starts, ends, strict=True):
        entries = gallery[truth[start:end]]
        own = torch.arange(end - start)
        ranks.append(retrieval_ranks(queries[start:end], entries, own, centre))
    return torch.cat(ranks)


def recall(ranks: Tensor, most: int) -> float:
    """Share of ranks (M,) below ``most``: recall at that number; NaN of none."""
    return float((ranks < most).double().mean())
