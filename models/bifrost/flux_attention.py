"""A lean attention for small FLUX networks on a CPU: the same numbers in fewer passes.

At toy size most of a step goes to reading and writing small tensors, not to products. Here queries
and keys are rotated together by one complex product, and the softmax is written out, which beats
fused attention for a hundred tokens. Letters: B items, S text and image tokens, H heads, E
channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformer2DModel
from torch import Tensor, nn

from models.bifrost.controlnet import LatentFluxControlNet

_Rotary = tuple[Tensor, Tensor]


class LeanFluxAttention:
    """Attention processor of diffusers' FLUX; set it with `use_lean_attention`."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: _Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend; text tokens precede image tokens.

        Args:
            attn: Module with the projections.
            hidden_states: (B, L, W) image tokens, or all tokens of a single-stream block.
            encoder_hidden_states: (B, T, W) text tokens of a double-stream block.
            attention_mask: Always None.
            image_rotary_emb: Cosine and sine (S, E) of the positions, each value twice.

        Returns:
            (B, L, W), in a double-stream block also (B, T, W).
        """
        layers: Any = attn
        heads = (-1, layers.head_dim)
        query = _normed(layers.to_q(hidden_states).unflatten(2, heads), layers.norm_q)
        key = _normed(layers.to_k(hidden_states).unflatten(2, heads), layers.norm_k)
        value = layers.to_v(hidden_states).unflatten(2, heads)  # (B, L, H, E)
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            text_query = layers.add_q_proj(text).unflatten(2, heads)
            text_key = layers.add_k_proj(text).unflatten(2, heads)
            query = torch.cat([_normed(text_query, layers.norm_added_q), query], 1)
            key = torch.cat([_normed(text_key, layers.norm_added_k), key], 1)
            value = torch.cat([layers.add_v_proj(text).unflatten(2, heads), value], 1)
        if image_rotary_emb is not None:
            query, key = (_rotated(part, image_rotary_emb) for part in (query, key))
        mixed = _attend(query, key, value).to(value.dtype)  # (B, S, H * E)
        if encoder_hidden_states is None:
            return mixed
        split = encoder_hidden_states.shape[1]
        image: Tensor = layers.to_out[1](layers.to_out[0](mixed[:, split:]))
        return image, layers.to_add_out(mixed[:, :split])


def use_lean_attention(network: FluxTransformer2DModel | LatentFluxControlNet) -> None:
    """Let every attention of a FLUX or its ControlNet be lean, in place; weights stay."""
    processor: Any = LeanFluxAttention()  # diffusers lists only its own
    network.set_attn_processor(processor)


def _normed(heads: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMS norm with the weight in the type of the input, for which there is one fused pass."""
    return F.rms_norm(heads, norm.normalized_shape, norm.weight.to(heads.dtype), norm.eps)


def _rotated(heads: Tensor, rotary: _Rotary) -> Tensor:
    """Rotate pairs of neighbouring channels of (B, S, H, E) by the angles of their positions."""
    cosine, sine = (part[:, None, ::2] for part in rotary)  # (S, 1, E / 2)
    turns = torch.complex(cosine, sine)
    pairs = torch.view_as_complex(torch.unflatten(heads.float(), 3, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(3).to(heads.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention (B, S, H, E) -> (B, S, H * E)."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, H, S, E)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    mixed: Tensor = scores.softmax(-1, dtype=scores.dtype) @ value
    return mixed.transpose(1, 2).flatten(2)
