"""Reading a batch of texts of different length without computing anything for padding.

Letters: B items, T text tokens (left padded), M tokens of all items without padding, D hidden
width, H query heads, G key heads, R = H / G, E channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.positions import rotate, text_positions


class PackedReader:
    """Runs a frozen model's layers on M tokens, of which only attention sees the rows.

    Linear layers, norms and MLPs are the model's own modules. They work on each token by itself,
    so padding neither costs anything nor can reach a token.

    Args:
        language_model: Gives sizes and rotation.
        valid: (B, T) bool, False at padding.
    """

    def __init__(self, language_model: FrozenLanguageModel, valid: Tensor) -> None:
        shape = language_model.shape
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.items, self.length = valid.shape
        self.places = valid.flatten().nonzero()[:, 0]  # (M,)
        positions = text_positions(valid, language_model.axes)
        precise = torch.zeros((), device=valid.device)
        cosine, sine = language_model.rotary(precise, positions)  # (B, T, E)
        self.cosine, self.sine = (
            part.expand(self.items, -1, -1).flatten(0, 1)[self.places, None]  # (M, 1, E)
            for part in (cosine, sine)
        )
        square = torch.ones(self.length, self.length, dtype=torch.bool, device=valid.device)
        # Rows of padding read themselves: none may be without any key.
        seen = square.tril() & (valid[:, None] | square.tril().triu())
        hidden = torch.zeros(seen.shape, device=valid.device).masked_fill(~seen, -torch.inf)
        self.bias = hidden[:, None].repeat(1, 1, shape.heads // shape.kv_heads, 1)  # (B,1,R*T,T)

    def read(
        self,
        layer: Any,  # noqa: ANN401
        hidden: Tensor,
        further: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (M, D) behind a layer, and its keys and values (B, G, T, E).

        Args:
            layer: Of transformers.
            hidden: (M, D) before it.
            further: Whether the states behind it are wanted; else those before it are returned.
        """
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        names = ("q_proj", "k_proj", "v_proj") if further else ("k_proj", "v_proj")
        heads = torch.cat([getattr(attention, name)(normed) for name in names], 1)
        count = heads.shape[1] // self.head_dim
        heads = heads.view(len(heads), count, self.head_dim)  # (M, [H +] G + G, E)
        turned = rotate(heads[:, : -self.kv_heads], self.cosine, self.sine)
        spread = self.spread(torch.cat([turned, heads[:, -self.kv_heads :]], 1)).transpose(1, 2)
        queries = spread[:, : -2 * self.kv_heads]  # (B, H, T, E)
        keys, values = spread[:, -2 * self.kv_heads :].chunk(2, 1)
        if not further:
            return hidden, keys, values
        queries = queries.reshape(self.items, self.kv_heads, -1, self.head_dim)  # (B, G, R * T, E)
        bias = self.bias.to(queries.dtype)
        out = F.scaled_dot_product_attention(queries, keys, values, bias)
        out = out.view(self.items, self.heads, self.length, self.head_dim).transpose(1, 2)
        out = out.flatten(2).flatten(0, 1)[self.places]  # (M, H * E)
        hidden = hidden + attention.o_proj(out)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), keys, values

    def spread(self, packed: Tensor) -> Tensor:
        """(M, ...) -> (B, T, ...), 0 at padding."""
        shape = packed.shape[1:]
        padded = packed.new_zeros(self.items * self.length, *shape)
        return padded.index_copy_(0, self.places, packed).view(self.items, self.length, *shape)
