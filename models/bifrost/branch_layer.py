"""One decoder layer for image tokens: the trained copy of a frozen layer (arXiv 2508.05954).

Letters: B items, N image tokens, T text tokens, D hidden width, H query heads, G key heads,
R = H / G, E channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from models.bifrost.language_model import LanguageShape
from models.bifrost.positions import rotate
from models.layers.rms_norm import rms_norm

Rotation = tuple[Tensor, Tensor]


class BranchNorm(nn.RMSNorm):
    """RMS norm that is fast on CPUs too, where torch's has no gradient of its own."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__(width, epsilon)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if x.is_cpu and x.requires_grad:
            return rms_norm(x, self.weight, self.epsilon)
        return super().forward(x)


class BranchAttention(nn.Module):
    """Image tokens attend to the text and to each other."""

    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        inner, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.kv_heads, self.head_dim = shape.kv_heads, shape.head_dim
        self.group = shape.heads // shape.kv_heads
        self.q_proj = nn.Linear(shape.hidden, inner, shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden, keys, shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden, keys, shape.qkv_bias)
        self.o_proj = nn.Linear(inner, shape.hidden, shape.out_bias)

    def forward(
        self,
        hidden: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """Attend; see `BranchLayer`."""
        items, tokens, _ = hidden.shape
        grouped = (items, tokens, self.kv_heads, self.group, self.head_dim)
        q = self.q_proj(hidden).view(grouped).permute(0, 2, 3, 1, 4)  # (B, G, R, N, E)
        k = self.k_proj(hidden).view(items, tokens, self.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(hidden).view(items, tokens, self.kv_heads, -1).transpose(1, 2)
        if rotation is not None:
            cosine, sine = rotation  # (B, N, E)
            q = rotate(q, cosine[:, None, None], sine[:, None, None])
            k = rotate(k, cosine[:, None], sine[:, None])
        k = torch.cat([text_keys.to(k.dtype), k], 2)  # (B, G, T + N, E)
        v = torch.cat([text_values.to(v.dtype), v], 2)
        # Which keys are read does not depend on the query, so the query heads of one key head
        # stand behind each other as further queries: keys are never repeated.
        q = q.reshape(items, self.kv_heads, self.group * tokens, self.head_dim)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        out = out.view(items, self.kv_heads, self.group, tokens, self.head_dim)
        out = out.permute(0, 3, 1, 2, 4).reshape(items, tokens, -1)  # (B, N, H * E)
        projected: Tensor = self.o_proj(out)
        return projected


class BranchMlp(nn.Module):
    """Gated MLP."""

    def __init__(self, shape: LanguageShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, shape.mlp_bias)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, shape.mlp_bias)
        self.activation = ACT2FN[shape.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        out: Tensor = self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class BranchLayer(nn.Module):
    """One decoder layer for image tokens; parameters are named as those of the layer it copies.

    Args:
        shape: Sizes of the language model.
        checkpointing: Whether to recompute the layer's activations in the backward pass.
    """

    def __init__(self, shape: LanguageShape, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.input_layernorm = BranchNorm(shape.hidden, shape.epsilon)
        self.self_attn = BranchAttention(shape)
        self.post_attention_layernorm = BranchNorm(shape.hidden, shape.epsilon)
        self.mlp = BranchMlp(shape)

    def forward(
        self,
        hidden: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """The whole layer.

        Args:
            hidden: (B, N, D).
            text_keys: (B, G, T, E) of the frozen layer, rotated.
            text_values: (B, G, T, E).
            mask: (B, 1, 1, T + N) bool, True at keys that are read; None reads all.
            rotation: Cosine and sine (B, N, E); None does not rotate.
        """
        given = (hidden, text_keys, text_values, mask, rotation)
        if self.checkpointing and torch.is_grad_enabled():
            # Inside the layer, not around it: a sharded layer gathers its parameters only once.
            out: Tensor = checkpoint(
                self._transform, *given, use_reentrant=False, preserve_rng_state=False
            )
            return out
        return self._transform(*given)

    def _transform(
        self,
        hidden: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, text_keys, text_values, mask, rotation)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out
