"""Pre-norm transformer layers with torch's parameter names and their own forward pass.

The names are those of `torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer`, so weights
go in and out unchanged. The forward pass is written out because torch's fused evaluation path skips
the normalisation of queries and keys, and because keys and values must be kept between calls.
Letters in shape comments: B batch, T queries, S memory tokens, W width, H heads, E head width.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.rms_norm import rms_norm

Activation = Callable[[Tensor], Tensor]

# Scores of one plain attention product on a CPU; more go to the kernel that stores none.
_PLAIN_SCORES = 2**28


class KeyValues(NamedTuple):
    """Projected memory of one attention layer.

    Attributes:
        keys: (B, H, S, E).
        values: (B, H, S, E).
    """

    keys: Tensor
    values: Tensor


def attend(
    q: Tensor, memory: KeyValues, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of queries (B, H, T, E) to a memory of S tokens: (B, H, T, E).

    Args:
        q: (B, H, T, E).
        memory: Keys and values, each (B, H, S, E).
        mask: Bool, broadcastable to (B, H, T, S); True where a query may look. Each query needs
            at least one such place.
        dropout: Probability of dropping an attention weight.
    """
    keys, values = memory
    if q.device.type != "cpu" or not (dropout or _small_half(q, keys)):
        return F.scaled_dot_product_attention(q, keys, values, mask, dropout)
    scores = (q * q.shape[-1] ** -0.5) @ keys.mT  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return drop(scores.softmax(-1).to(values.dtype), dropout, dropout > 0) @ values


def _small_half(q: Tensor, keys: Tensor) -> bool:
    """Whether plain products, several times faster on a CPU in half precision, fit in memory."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return half and q.shape[:3].numel() * keys.shape[2] <= _PLAIN_SCORES


def drop(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout with a mask that is cheap to draw on a CPU; the probability is in steps of 2**-16."""
    if not training or probability == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    # A fourth of a random 64-bit integer decides about each element.
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = numbers >= round(probability * 2**16) - 2**15
    return x * keep.to(x.dtype).mul_(1 / (1 - probability))


class Attention(nn.Module):
    """Multi-head attention with packed projections, like `torch.nn.MultiheadAttention`.

    Args:
        width: Token width W, a multiple of ``heads``.
        heads: Number of heads H.
        dropout: Probability of dropping an attention weight in training, in [0, 1).
        qk_norm: Whether each head's queries and keys go through an RMS norm with learned scale.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, qk_norm: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}: must be a multiple of heads={heads}")
        self.heads = heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-5) if qk_norm else None
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        """Project x (B, T, W) to parts ``first .. last - 1`` of (query, key, value).

        Returns:
            Tensors (B, H, T, E), queries and keys normalised if the layer does so.
        """
        width = x.shape[-1]
        weight = self.in_proj_weight[first * width : last * width]
        packed = F.linear(x, weight, self.in_proj_bias[first * width : last * width])
        packed = packed.view(*x.shape[:2], last - first, self.heads, -1)  # (B, T, parts, H, E)
        parts = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, E)
        norms = (self.q_norm, self.k_norm, None)[first:last]
        return [_normalise(part, norm) for part, norm in zip(parts, norms, strict=True)]

    def remember(self, memory: Tensor) -> KeyValues:
        """Project a memory (B, S, W) to keys and values that `read` can use many times."""
        keys, values = self.project(memory, 1, 3)
        return KeyValues(keys, values)

    def read(self, x: Tensor, memory: KeyValues, mask: Tensor | None = None) -> Tensor:
        """Attend from x (B, T, W) to a remembered memory: (B, T, W)."""
        (q,) = self.project(x, 0, 1)
        return self._merge(attend(q, memory, mask, self.dropout if self.training else 0.0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend among the tokens of x (B, T, W): (B, T, W)."""
        q, keys, values = self.project(x, 0, 3)
        dropout = self.dropout if self.training else 0.0
        return self._merge(attend(q, KeyValues(keys, values), mask, dropout))

    def _merge(self, heads: Tensor) -> Tensor:
        """Join heads (B, H, T, E) and project: (B, T, W)."""
        merged: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return merged


def _normalise(x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """Apply a norm in the precision of its weights."""
    if norm is None:
        return x
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return rms_norm(x, norm.weight, norm.eps or 0.0)
    out: Tensor = norm(x.to(norm.weight.dtype))
    return out.to(x.dtype)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, both pre-norm and residual.

    Args:
        width: Token width.
        heads: Attention heads.
        feed_forward: Hidden width of the feed-forward network.
        dropout: Dropout of attention weights, of the hidden layer and of both outputs.
        qk_norm: Whether queries and keys are normalised per head.
        activation: Of the feed-forward network.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
        qk_norm: bool = False,
        activation: Activation = F.gelu,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout, qk_norm)
        self.linear1 = nn.Linear(width, feed_forward)
        self.linear2 = nn.Linear(feed_forward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = dropout
        self.activation = activation

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform tokens x (B, T, W); ``mask`` as in `attend`."""
        x = x + drop(self.self_attn(self.norm1(x), mask), self.dropout, self.training)
        hidden = F.dropout(
            self.activation(self.linear1(self.norm2(x))), self.dropout, self.training
        )
        return x + drop(self.linear2(hidden), self.dropout, self.training)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, pre-norm and residual.

    Args:
        width: Token width.
        heads: Attention heads.
        feed_forward: Hidden width of the feed-forward network.
        dropout: Dropout of attention weights, of the hidden layer and of the three outputs.
        qk_norm: Whether queries and keys are normalised per head.
        activation: Of the feed-forward network.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
        qk_norm: bool = False,
        activation: Activation = F.gelu,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout, qk_norm)
        self.multihead_attn = Attention(width, heads, dropout, qk_norm)
        self.linear1 = nn.Linear(width, feed_forward)
        self.linear2 = nn.Linear(feed_forward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = dropout
        self.activation = activation

    def forward(
        self, x: Tensor, cross: Callable[[Tensor], Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Transform queries x (B, T, W).

        Args:
            x: (B, T, W).
            cross: Maps the normalised queries to what they read from the memory, (B, T, W); the
                memory itself is not normalised.
            mask: Of the self-attention, as in `attend`.
        """
        x = x + drop(self.self_attn(self.norm1(x), mask), self.dropout, self.training)
        x = x + drop(cross(self.norm2(x)), self.dropout, self.training)
        hidden = F.dropout(
            self.activation(self.linear1(self.norm3(x))), self.dropout, self.training
        )
        return x + drop(self.linear2(hidden), self.dropout, self.training)


class Encoder(nn.Module):
    """Stack of encoder layers without a final norm; all layers start from the same weights."""

    def __init__(self, layer: EncoderLayer, depth: int) -> None:
        super().__init__()
        self.layers = copies(layer, depth)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform tokens x (B, T, W); ``mask`` as in `attend`."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


def copies(layer: nn.Module, depth: int) -> nn.ModuleList:
    """Independent copies of a layer that start from the same weights, as torch's stacks do."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))


def key_mask(valid: Tensor) -> Tensor:
    """Attention mask (B, 1, 1, S) of valid (B, S) tokens; a row without any sees all of them.

    The exception keeps the softmax of such a row finite; its result means nothing.
    """
    return (valid | ~valid.any(-1, keepdim=True))[:, None, None]


def init_small(stack: nn.Module, depth: int) -> None:
    """Draw a stack's matrices from a truncated normal of deviation 1 / sqrt(inputs).

    Matrices that add to the residual stream are scaled down by sqrt(2 * depth); biases are zero.
    Each layer gets its own weights.
    """
    for module in stack.modules():
        if isinstance(module, Attention):
            truncated_normal(module.in_proj_weight)
        elif isinstance(module, nn.Linear):
            truncated_normal(module.weight)
            nn.init.zeros_(module.bias)
    for module in stack.modules():
        if isinstance(module, EncoderLayer | DecoderLayer):
            outputs = [module.linear2, module.self_attn.out_proj]
            if isinstance(module, DecoderLayer):
                outputs.append(module.multihead_attn.out_proj)
            for output in outputs:
                truncated_normal(output.weight, (2 * depth) ** -0.5)


def truncated_normal(weight: Tensor, gain: float = 1.0) -> None:
    """Fill a matrix (outputs, inputs, ...) in place; values beyond two deviations are redrawn."""
    deviation = gain * weight[0].numel() ** -0.5
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)
