"""Neural condenser: one token per cluster that also carries the cluster's other tokens.

Eqs. 1 to 4 of arXiv 2507.08776 as its released weights have them: anchors attend to each other,
then each to the tokens of its own cluster, and a linear map that starts at zero adds the result.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clift.clustering import Clusters
from models.clift.subsets import take_tokens
from models.clift.transformer import Attention, DecoderLayer, copies, drop, key_mask

# Padded member slots that one attention product handles; bounds the memory used at inference.
_SLOTS = 2**14


class Bucket(NamedTuple):
    """Clusters of similar size, padded to the same number of members.

    Attributes:
        clusters: (G,) int64 cluster, numbered over the batch: scene * K + cluster.
        members: (G, L) int64 token, numbered over the batch: scene * N + token; padded with 0.
        valid: (G, L) bool.
    """

    clusters: Tensor
    members: Tensor
    valid: Tensor


def bucket_members(clusters: Clusters) -> list[Bucket]:
    """Sort a batch's clusters into buckets of sizes 1, 2, 3-4, 5-8, ..."""
    labels = clusters.labels
    batch, count = labels.shape
    slots = clusters.anchors.shape[1]
    scenes = torch.arange(batch, device=labels.device)[:, None]
    everywhere = torch.where(labels < 0, batch * slots, labels + scenes * slots).flatten()
    sorted_labels, order = everywhere.sort(stable=True)
    numbers = torch.arange(batch * slots, device=labels.device)
    starts = torch.searchsorted(sorted_labels, numbers)
    sizes = torch.searchsorted(sorted_labels, numbers, right=True) - starts
    buckets = []
    smaller, size = 0, 1
    while smaller < count:
        chosen = ((sizes > smaller) & (sizes <= size)).nonzero().squeeze(1)
        slot = torch.arange(size, device=labels.device)
        step = max(1, _SLOTS // size)
        for first in range(0, len(chosen), step):
            group = chosen[first : first + step]
            valid = slot < sizes[group][:, None]  # (G, L)
            place = (starts[group][:, None] + slot).masked_fill(~valid, 0)
            buckets.append(Bucket(group, order[place].masked_fill(~valid, 0), valid))
        smaller, size = size, 2 * size
    return buckets


def read_members(
    attention: Attention, queries: Tensor, tokens: Tensor, buckets: list[Bucket]
) -> Tensor:
    """Attend from each cluster's query to the tokens of that cluster alone.

    A cluster has one query, so its keys need not be formed: q · (W x + b) = (Wᵀ q) · x + const, and
    the constant cancels in the softmax. Nor need its values: the weights sum the raw tokens, and
    the sum is projected. The cost follows the number of clusters rather than that of tokens. All
    of it runs in the precision of the weights, float32 as a rule: tokens are not normalised.

    Args:
        attention: Layer without normalised queries and keys.
        queries: (B, K, C).
        tokens: (B, N, C).
        buckets: Members of the batch's clusters.

    Returns:
        (B, K, C); meaningless, but finite, for clusters in no bucket.
    """
    width, heads = tokens.shape[2], attention.heads
    dtype = attention.in_proj_weight.dtype
    with torch.autocast(tokens.device.type, enabled=False):
        (q,) = attention.project(queries.to(dtype), 0, 1)
        q = q.transpose(1, 2).flatten(0, 1) * q.shape[-1] ** -0.5  # (B * K, H, E)
        _, to_keys, to_values = attention.in_proj_weight.view(3, heads, -1, width)  # (H, E, C)
        bias = attention.in_proj_bias[2 * width :].view(heads, 1, -1)
        memory = tokens.to(dtype).reshape(-1, width)  # (B * N, C)
        out = torch.zeros(queries.shape[0] * queries.shape[1], width, dtype=dtype, device=q.device)
        for group, members, valid in buckets:
            x = memory[members]  # (G, L, C)
            probes = (q[group].transpose(0, 1) @ to_keys).transpose(0, 1)  # (G, H, C)
            scores = (probes @ x.mT).masked_fill(~valid[:, None], -torch.inf)  # (G, H, L)
            weights = drop(scores.softmax(-1), attention.dropout, attention.training)
            sums = (weights @ x).transpose(0, 1)  # (H, G, C)
            values = sums @ to_values.mT + bias * weights.sum(-1).T[..., None]  # (H, G, E)
            out = out.index_copy(0, group, values.transpose(0, 1).flatten(1))
        read: Tensor = attention.out_proj(out)
    return read.view_as(queries)


class Condenser(nn.Module):
    """Decoder layers over a scene's anchors, and a linear map that starts at zero.

    Args:
        width: Token width C.
        heads: Attention heads.
        feed_forward: Hidden width of the feed-forward network.
        dropout: Dropout probability inside the layers.
        layers: Number of layers; one is stored without a numbered stack, as in released weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
        layers: int = 1,
    ) -> None:
        super().__init__()
        layer = DecoderLayer(width, heads, feed_forward, dropout, activation=F.relu)
        self.cross_attn: nn.Module = layer if layers == 1 else _Stack(layer, layers)
        self.linear1 = nn.Linear(width, width)
        nn.init.zeros_(self.linear1.weight)
        nn.init.zeros_(self.linear1.bias)

    def forward(self, tokens: Tensor, clusters: Clusters) -> Tensor:
        """Condense tokens (B, N, C) to one per cluster: (B, K, C), zeros where padded."""
        valid = clusters.valid
        anchors = take_tokens(tokens, clusters.anchors)  # (B, K, C)
        mask = None if bool(valid.all()) else key_mask(valid)
        buckets = bucket_members(clusters)
        x = anchors
        for layer in self._layers():
            x = layer(x, _Reader(layer.multihead_attn, tokens, buckets), mask)
        condensed: Tensor = anchors + self.linear1(x)
        return condensed.masked_fill(~valid[..., None], 0)

    def _layers(self) -> list[DecoderLayer]:
        stack = self.cross_attn
        layers = stack.layers if isinstance(stack, _Stack) else [stack]
        return [layer for layer in layers if isinstance(layer, DecoderLayer)]


class _Reader(NamedTuple):
    """Cross-attention of anchors to their clusters' tokens."""

    attention: Attention
    tokens: Tensor
    buckets: list[Bucket]

    def __call__(self, x: Tensor) -> Tensor:
        """Read for queries x (B, K, C)."""
        return read_members(self.attention, x, self.tokens, self.buckets)


class _Stack(nn.Module):
    """Numbered layers under the name ``layers``."""

    def __init__(self, layer: DecoderLayer, depth: int) -> None:
        super().__init__()
        self.layers = copies(layer, depth)
