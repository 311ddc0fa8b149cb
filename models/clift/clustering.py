"""K-means over a scene's tokens (arXiv 2507.08776, sec. 3.2), many scenes at once.

Lloyd's iteration with an exact shortcut: a token is compared only with centroids that moved, and
with all of them only when its own centroid moved away from it. Letters in shape comments: B scenes,
N tokens, C channels, K clusters (the largest number in the batch).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clift.seeding import distant_start, random_start
from models.clift.subsets import take_tokens

# Token-centroid scores held at a time.
_SCORES = 2**24
# Share of moved centroids above which every token is compared with every centroid.
_MANY = 0.7


class Clusters(NamedTuple):
    """Partition of each scene's tokens.

    Attributes:
        labels: (B, N) int64 cluster of each token; -1 for a padded token.
        anchors: (B, K) int64 token nearest to the mean of its cluster, padded with 0.
        num_clusters: (B,) int64 clusters of each scene, at most K.
    """

    labels: Tensor
    anchors: Tensor
    num_clusters: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, K) bool, False where ``anchors`` is padding."""
        slots = torch.arange(self.anchors.shape[1], device=self.anchors.device)
        return slots < self.num_clusters[:, None]


@torch.no_grad()
def kmeans(
    tokens: Tensor,
    counts: int | Sequence[int] | Tensor,
    iterations: int = 25,
    init: Literal["random", "k-means++"] = "k-means++",
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
) -> Clusters:
    """Cluster each scene's tokens by Euclidean distance, in float32 on the tokens' device.

    A cluster that loses its tokens restarts at the token farthest from its centroid. Clusters that
    still end empty (fewer distinct tokens than clusters) are dropped, so ``num_clusters`` may be
    smaller than ``counts``. Stops early once no token changes its cluster.

    Args:
        tokens: (B, N, C).
        counts: Clusters of each scene, (B,) or one number for all; from 1 to its valid tokens.
        iterations: Most updates of the centroids.
        init: "k-means++" starts from distant tokens and ends 1 to 3 % tighter; "random" starts
            from any distinct tokens and takes about a third of the time.
        generator: Source of the start; its device may differ from the tokens'.
        valid: (B, N) bool; padded tokens are ignored. None clusters all tokens.

    Raises:
        ValueError: If a count is out of range or the start is unknown.
    """
    if init not in ("random", "k-means++"):
        raise ValueError(f"init={init!r}: expected 'random' or 'k-means++'")
    if valid is None:
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    wanted = _checked_counts(counts, valid)
    with torch.autocast(tokens.device.type, enabled=False):
        # Distances to the scene's mean lose fewer digits than raw ones.
        points = tokens.float().masked_fill(~valid[..., None], 0)
        mean = points.sum(1, keepdim=True) / valid.sum(1)[:, None, None]
        points = (points - mean).masked_fill(~valid[..., None], 0)
        start = random_start if init == "random" else distant_start
        slots = int(wanted.max())
        centroids = start(points, valid, slots, generator)  # (B, K, C)
        labels = _lloyd(points, centroids, wanted, valid, iterations)
        labels, num_clusters = _drop_empty(labels, slots)
        return Clusters(labels, nearest_members(points, labels, num_clusters), num_clusters)


def nearest_members(tokens: Tensor, labels: Tensor, num_clusters: Tensor) -> Tensor:
    """Find the token nearest to the mean of its own cluster, the first of several as near.

    Args:
        tokens: (B, N, C).
        labels: (B, N) int64; negative for padded tokens. No cluster may be empty.
        num_clusters: (B,) int64.

    Returns:
        (B, K) int64 positions, padded with 0 beyond a scene's clusters.
    """
    batch, count = labels.shape
    slots = int(num_clusters.max())
    means = cluster_means(tokens.float(), labels, slots)
    own = take_tokens(means, labels.clamp(min=0))
    distance = (tokens.float() - own).square().sum(-1)  # (B, N)
    near_first = distance.argsort(dim=-1, stable=True)
    sorted_labels, order = labels.gather(1, near_first).sort(dim=-1, stable=True)
    first = torch.searchsorted(sorted_labels, _row_of_slots(batch, slots, labels.device))
    anchors = near_first.gather(1, order.gather(1, first.clamp(max=count - 1)))
    padding = torch.arange(slots, device=labels.device) >= num_clusters[:, None]
    return anchors.masked_fill(padding, 0)


def cluster_means(tokens: Tensor, labels: Tensor, slots: int) -> Tensor:
    """Mean token of each cluster.

    Args:
        tokens: (B, N, C).
        labels: (B, N) int64; negative for padded tokens.
        slots: Number of clusters K to return.

    Returns:
        (B, K, C), zeros for clusters without tokens.
    """
    batch, count, channels = tokens.shape
    sorted_labels, order = labels.sort(dim=-1, stable=True)
    starts = torch.searchsorted(sorted_labels, _row_of_slots(batch, slots + 1, labels.device))
    scenes = torch.arange(batch, device=labels.device)[:, None] * count
    # Bags are contiguous in ``order``: one per cluster, and one per scene for its padded tokens,
    # which come before cluster 0. Sums over a bag run in a fixed order.
    offsets = torch.cat([torch.zeros_like(starts[:, :1]), starts[:, :-1]], dim=1) + scenes
    bags = F.embedding_bag(
        (order + scenes).flatten(), tokens.reshape(-1, channels), offsets.flatten(), mode="mean"
    )
    return bags.view(batch, slots + 1, channels)[:, 1:]


def _row_of_slots(batch: int, slots: int, device: torch.device) -> Tensor:
    """(B, slots) int64 cluster numbers 0, 1, ..., the same for every scene."""
    return torch.arange(slots, device=device).expand(batch, -1).contiguous()


def _checked_counts(counts: int | Sequence[int] | Tensor, valid: Tensor) -> Tensor:
    """(B,) int64 cluster counts on the tokens' device."""
    wanted = torch.as_tensor(counts, dtype=torch.int64, device=valid.device)
    if wanted.numel() != 1 and wanted.shape != valid.shape[:1]:
        raise ValueError(
            f"counts of shape {tuple(wanted.shape)}: expected one number, or one for each of the "
            f"{len(valid)} scenes"
        )
    wanted = wanted.expand(len(valid))
    available = valid.sum(1)
    if bool(((wanted < 1) | (wanted > available)).any()):
        raise ValueError(
            f"counts={wanted.tolist()}: each must be from 1 to the scene's valid tokens, "
            f"{available.tolist()}"
        )
    return wanted


def _lloyd(
    points: Tensor, centroids: Tensor, wanted: Tensor, valid: Tensor, iterations: int
) -> Tensor:
    """Alternate means and assignments: (B, N) labels, -1 for padded tokens."""
    slots = torch.arange(centroids.shape[1], device=points.device)
    unused = slots >= wanted[:, None]  # (B, K)
    labels, scores = _nearest(points, centroids, unused)
    for _ in range(iterations):
        labels = labels.masked_fill(~valid, -1)
        updated = cluster_means(points, labels, len(slots))
        updated = torch.where(unused[..., None], centroids, updated)
        empty = ~unused & ~_occupied(labels, len(slots))
        if bool(empty.any()):
            updated = _restart(updated, empty, points, scores)
        moved = (updated != centroids).any(-1)  # (B, K)
        centroids = updated
        if not bool(moved.any()):
            break
        labels, scores = _reassign(points, centroids, unused, moved, labels, scores)
    return labels.masked_fill(~valid, -1)


def _occupied(labels: Tensor, slots: int) -> Tensor:
    """(B, K) whether any token has the label."""
    occupied = torch.zeros(len(labels), slots + 1, dtype=torch.bool, device=labels.device)
    return occupied.scatter(1, labels + 1, True)[:, 1:]


def _nearest(points: Tensor, centroids: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every token with every centroid.

    Returns:
        (B, N) nearest centroid, and (B, N) its squared distance less the token's squared length.
    """
    bias = centroids.square().sum(-1).masked_fill(unused, torch.inf)[:, None]  # (B, 1, K)
    rows = max(1, _SCORES // max(1, bias.numel()))
    parts = [
        torch.baddbmm(bias, points[:, start : start + rows], centroids.mT, alpha=-2).min(-1)
        for start in range(0, points.shape[1], rows)
    ]
    return torch.cat([p.indices for p in parts], 1), torch.cat([p.values for p in parts], 1)


def _reassign(
    points: Tensor,
    centroids: Tensor,
    unused: Tensor,
    moved: Tensor,
    labels: Tensor,
    scores: Tensor,
) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each token after some centroids moved, as `_nearest` would find it.

    Among centroids that stayed, the token's previous one is still the best: only those that moved
    can be better. Only a token whose own centroid moved away, and which no moved centroid suits as
    well as its own did before, has to look at all of them.
    """
    count = int(moved.sum(1).max())
    if count > _MANY * moved.shape[1]:
        return _nearest(points, centroids, unused)
    # Rows with fewer moved centroids are filled up with others, which does no harm.
    chosen = moved.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]  # (B, M)
    candidates, candidate_scores = _nearest(
        points, take_tokens(centroids, chosen), unused.gather(1, chosen)
    )
    own_moved = moved.gather(1, labels.clamp(min=0))
    better = candidate_scores < scores
    labels = torch.where(better, chosen.gather(1, candidates), labels)
    scores = torch.where(better, candidate_scores, scores)
    search = own_moved & ~better & (labels >= 0)
    count = int(search.sum(1).max())
    if not count:
        return labels, scores
    lost = search.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]  # (B, P)
    found, found_scores = _nearest(take_tokens(points, lost), centroids, unused)
    return labels.scatter(1, lost, found), scores.scatter(1, lost, found_scores)


def _restart(centroids: Tensor, empty: Tensor, points: Tensor, scores: Tensor) -> Tensor:
    """Put each empty cluster's centroid on a token of its own, the farthest ones first."""
    distance = scores + points.square().sum(-1)  # (B, N); 0 or rounding for padded tokens
    far_first = distance.argsort(dim=-1, descending=True, stable=True)
    turn = (empty.cumsum(1) - 1).clamp(min=0)  # (B, K) which of the far tokens
    taken = take_tokens(points, far_first.gather(1, turn))
    return torch.where(empty[..., None], taken, centroids)


def _drop_empty(labels: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Renumber clusters without gaps: labels (B, N) and the number of clusters (B,)."""
    occupied = _occupied(labels, slots)
    renumbered = (occupied.cumsum(1) - 1).gather(1, labels.clamp(min=0))
    return torch.where(labels < 0, -1, renumbered), occupied.sum(1)
