"""Pre-norm transformer stack with preallocated key/value caches.

Both halves of FARMER run on it: the causal networks inside the flow blocks and the autoregressive
prior. Letters used in shape comments: B batch, T tokens, W width, H heads, E head dimension.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens seen so far, one slot per layer and position.

    Attributes:
        keys: (layers, B, H, capacity, E).
        values: (layers, B, H, capacity, E).
    """

    keys: Tensor
    values: Tensor

    @property
    def capacity(self) -> int:
        """Number of token positions the cache was allocated for."""
        return self.keys.shape[3]


class SelfAttention(nn.Module):
    """Multi-head self-attention with its own pre-norm.

    Args:
        width: Token width W; must be a multiple of ``head_dim``.
        head_dim: Width E of one head.
        dropout: Dropout probability on the attention output, in [0, 1).
    """

    def __init__(self, width: int, head_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width={width}: must be a multiple of head_dim={head_dim}")
        self.heads = width // head_dim
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = dropout

    def _project(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x))
        qkv = qkv.view(batch, tokens, 3, self.heads, self.head_dim)  # (B, T, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, E)
        if rotation is not None:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        return q, k, v

    def forward(self, x: Tensor, causal: bool, rotation: Tensor | None = None) -> Tensor:
        """Attend over the whole sequence.

        Args:
            x: (B, T, W).
            causal: Whether a token sees only itself and earlier ones.
            rotation: (2, T, E / 2) cosines and sines of rotary positions, if any.
        """
        q, k, v = self._project(x, rotation)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (B, H, T, E)
        out = self.proj(out.transpose(1, 2).flatten(2))  # (B, T, W)
        return F.dropout(out, self.dropout, self.training)

    def step(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Attend from new tokens x (B, T, W) to cached ones, and cache the new ones.

        Args:
            x: Tokens at positions ``start .. start + T - 1``.
            keys: (B, H, capacity, E), written in place.
            values: (B, H, capacity, E), written in place.
            start: Position of the first new token.
            rotation: (2, T, E / 2) cosines and sines of the new positions, if any.
        """
        q, k, v = self._project(x, rotation)
        stop = start + x.shape[1]
        keys[:, :, start:stop] = k
        values[:, :, start:stop] = v
        keys, values = keys[:, :, :stop], values[:, :, :stop]
        if x.shape[1] == 1:
            out = _attend_one(q, keys, values)
        else:
            mask = None if start == 0 else _chunk_mask(start, stop, x.device)
            out = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=start == 0)
        merged: Tensor = self.proj(out.transpose(1, 2).flatten(2))  # (B, T, W)
        return merged


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of channels (j, j + E/2) of x (B, H, T, E) by the angles of their position."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of a single query: q (B, H, 1, E), keys and values (B, H, T, E)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, keys, values)
    # Two batched products beat the fused kernel on a CPU when there is one query.
    batch, heads, _, head_dim = q.shape
    q = q.reshape(batch * heads, 1, head_dim) * head_dim**-0.5
    weights = torch.bmm(q, keys.flatten(0, 1).mT).softmax(-1)  # (B*H, 1, T)
    return torch.bmm(weights, values.flatten(0, 1)).view(batch, heads, 1, head_dim)


def _chunk_mask(start: int, stop: int, device: torch.device) -> Tensor:
    """(stop - start, stop) mask: a new token sees all earlier tokens and itself."""
    rows = torch.arange(start, stop, device=device).unsqueeze(1)
    return torch.arange(stop, device=device) <= rows


class FeedForward(nn.Module):
    """Two-layer GELU network with its own pre-norm, applied to each token.

    Args:
        width: Token width W.
        expansion: Hidden width as a multiple of W.
        dropout: Dropout probability on the output, in [0, 1).
    """

    def __init__(self, width: int, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, expansion * width)
        self.contract = nn.Linear(expansion * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, T, W) one by one."""
        out = self.contract(F.gelu(self.expand(self.norm(x))))
        return F.dropout(out, self.dropout, self.training)


class TransformerLayer(nn.Module):
    """Attention and feed-forward network, each added to its input.

    Args:
        width: Token width W.
        head_dim: Width of one attention head.
        expansion: Hidden width of the feed-forward network as a multiple of W.
        dropout: Dropout probability on both branches.
    """

    def __init__(self, width: int, head_dim: int, expansion: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = SelfAttention(width, head_dim, dropout)
        self.feed_forward = FeedForward(width, expansion, dropout)

    def forward(self, x: Tensor, causal: bool, rotation: Tensor | None = None) -> Tensor:
        """Transform a whole sequence (B, T, W); see `SelfAttention.forward`."""
        x = x + self.attention(x, causal, rotation)
        out: Tensor = x + self.feed_forward(x)
        return out

    def step(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Transform new tokens (B, T, W) given one layer's cache, see `SelfAttention.step`."""
        x = x + self.attention.step(x, keys, values, start, rotation)
        out: Tensor = x + self.feed_forward(x)
        return out


class Transformer(nn.Module):
    """Stack of pre-norm layers, causal by default.

    Args:
        layers: Number of layers.
        width: Token width W.
        head_dim: Width of one attention head.
        expansion: Hidden width of the feed-forward networks as a multiple of W.
        dropout: Dropout probability on every residual branch.
        causal: Whether a token sees only itself and earlier ones.
        rotary: Rotary position embedding of queries and keys.
        activation_checkpointing: Recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        head_dim: int,
        expansion: int = 4,
        dropout: float = 0.0,
        causal: bool = True,
        rotary: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.head_dim = head_dim
        self.causal = causal
        self.rotary = rotary
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(
            TransformerLayer(width, head_dim, expansion, dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (B, T, W)."""
        rotation = self._rotation(0, x.shape[1], x.device)
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x = checkpoint(layer, x, self.causal, rotation, use_reentrant=False)
            else:
                x = layer(x, self.causal, rotation)
        return x

    def empty_cache(self, batch: int, capacity: int, like: Tensor) -> KeyValueCache:
        """Allocate a cache for ``capacity`` tokens on the device of ``like``."""
        device = like.device.type
        dtype = like.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        heads = self.width // self.head_dim
        shape = (len(self.layers), batch, heads, capacity, self.head_dim)
        return KeyValueCache(like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype))

    def step(self, x: Tensor, cache: KeyValueCache, start: int) -> Tensor:
        """Transform the tokens at positions ``start ..`` and cache them; x is (B, T, W).

        Raises:
            ValueError: If the stack is not causal, or the cache is too small.
        """
        if not self.causal:
            raise ValueError("a bidirectional stack cannot be run token by token")
        if start + x.shape[1] > cache.capacity:
            raise ValueError(f"cache holds {cache.capacity} tokens, {start + x.shape[1]} needed")
        rotation = self._rotation(start, x.shape[1], x.device)
        for index, layer in enumerate(cast("list[TransformerLayer]", list(self.layers))):
            x = layer.step(x, cache.keys[index], cache.values[index], start, rotation)
        return x

    def _rotation(self, start: int, tokens: int, device: torch.device) -> Tensor | None:
        """(2, T, E / 2) cosines and sines of positions ``start ..``, or None."""
        if not self.rotary:
            return None
        half = self.head_dim // 2
        rates = 10_000.0 ** (-torch.arange(half, device=device) / half)
        angles = torch.arange(start, start + tokens, device=device).unsqueeze(1) * rates
        return torch.stack([angles.cos(), angles.sin()])
