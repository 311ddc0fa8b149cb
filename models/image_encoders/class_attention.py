"""The class token's row of a self-attention map, without computing the others.

Fused attention returns no weights, so the row is computed beside it from the module's own query and
key projections. Letters: B images, S tokens of which the first is the class token, C channels, N
heads.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn


@torch.no_grad()
def class_attention_weights(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Attention of the first token to all tokens, mean over the heads.

    Args:
        attention: Self-attention of timm's vision transformer, of open_clip (torch's own), or of
            CLIP, DINOv2 and the like in transformers. Rotary positions are not supported.
        hidden: (B, S, C) its input.

    Returns:
        (B, S) float32; rows sum to 1.

    Raises:
        ValueError: If the module is of another kind.
    """
    query, key = _project(attention, hidden)  # (B, N, 1, C / N), (B, N, S, C / N)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = (query.float() * query.shape[-1] ** -0.5) @ key.float().mT
        weights: Tensor = logits.softmax(-1).mean(1)[:, 0]
        return weights


def _project(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Query of the first token and keys of all tokens, by heads."""
    if isinstance(attention, Attention):
        query, key = _packed(hidden, attention.qkv.weight, attention.qkv.bias)
        heads = attention.num_heads
        return attention.q_norm(_by_head(query, heads)), attention.k_norm(_by_head(key, heads))
    if isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None:
        query, key = _packed(hidden, attention.in_proj_weight, attention.in_proj_bias)
        return _by_head(query, attention.num_heads), _by_head(key, attention.num_heads)
    for module in attention.modules():  # DINOv2 nests them, in some versions of transformers
        inner: Any = module
        heads = getattr(inner, "num_heads", 0) or getattr(inner, "num_attention_heads", 0)
        for names in (("q_proj", "k_proj"), ("query", "key")):
            if heads and all(hasattr(inner, name) for name in names):
                query, key = (getattr(inner, name) for name in names)
                return _by_head(query(hidden[:, :1]), heads), _by_head(key(hidden), heads)
    raise ValueError(
        f"{type(attention).__name__}: class attention is not known for this kind of module; encode "
        "with attention=False"
    )


def _packed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Query (B, 1, C) and keys (B, S, C) of a projection to queries, keys and values in one."""
    weights = weight.chunk(3)
    biases = (None, None) if bias is None else bias.chunk(3)
    return (
        nn.functional.linear(hidden[:, :1], weights[0], biases[0]),
        nn.functional.linear(hidden, weights[1], biases[1]),
    )


def _by_head(tokens: Tensor, heads: int) -> Tensor:
    """(B, S, C) -> (B, N, S, C / N)."""
    return tokens.view(*tokens.shape[:2], heads, -1).transpose(1, 2)
