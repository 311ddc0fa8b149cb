"""Causal transformer run one token at a time with little else than arithmetic, for a CPU.

The inverse of a flow block evaluates its transformer once for every token. At small widths that is
a few microseconds of arithmetic for each layer, less than the calls of the modules around it cost;
here the weights are looked up once for each inverse and every operation is two-dimensional.

Shape letters: B batch, T tokens seen, W width, H heads, E head dimension.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.farmer.transformer import KeyValueCache, Transformer, TransformerLayer

_Weights = tuple[Tensor, ...]


class TokenDecoder:
    """Gives what `Transformer.step` gives for single tokens, without dropout.

    Args:
        transformer: Causal stack without rotary positions.
        cache: Written in place; holds as many tokens as will be decoded.

    Raises:
        ValueError: If the stack is not causal or has rotary positions.
    """

    def __init__(self, transformer: Transformer, cache: KeyValueCache) -> None:
        if not transformer.causal:
            raise ValueError("a bidirectional stack cannot be run token by token")
        if transformer.rotary:
            raise ValueError("rotary=True: not decoded here, call Transformer.step")
        self._head_dim = transformer.head_dim
        self._width = (transformer.width,)
        layers = cast("list[TransformerLayer]", list(transformer.layers))
        keys, values = cache.keys.flatten(1, 2), cache.values.flatten(1, 2)  # (layers, B*H, cap, E)
        self._layers = [
            (_attention_weights(layer), _feed_forward_weights(layer), keys[index], values[index])
            for index, layer in enumerate(layers)
        ]

    def step(self, x: Tensor, position: int) -> Tensor:
        """Transform the token x (B, W) at ``position``, given those before it, and cache it."""
        for attention, feed_forward, keys, values in self._layers:
            x = x + self._attend(x, attention, keys, values, position)
            norm, norm_bias, expand, expand_bias, contract, contract_bias = feed_forward
            hidden = F.linear(
                torch.layer_norm(x, self._width, norm, norm_bias), expand, expand_bias
            )
            x = x + F.linear(F.gelu(hidden), contract, contract_bias)
        return x

    def _attend(
        self, x: Tensor, weights: _Weights, keys: Tensor, values: Tensor, position: int
    ) -> Tensor:
        norm, norm_bias, qkv, qkv_bias, proj, proj_bias = weights
        normed = torch.layer_norm(x, self._width, norm, norm_bias)
        split = F.linear(normed, qkv, qkv_bias).view(x.shape[0], 3, -1, self._head_dim)
        query, key, value = split.unbind(1)  # each (B, H, E)
        keys[:, position] = key.flatten(0, 1)
        values[:, position] = value.flatten(0, 1)
        query = query.reshape(-1, 1, self._head_dim) * self._head_dim**-0.5  # (B*H, 1, E)
        # Two batched products beat the fused kernel on a CPU when there is one query.
        share = torch.bmm(query, keys[:, : position + 1].mT).softmax(-1)  # (B*H, 1, T)
        out = torch.bmm(share, values[:, : position + 1])  # (B*H, 1, E)
        return F.linear(out.view(x.shape[0], -1), proj, proj_bias)


def _attention_weights(layer: TransformerLayer) -> _Weights:
    part = layer.attention
    modules = (part.norm, part.qkv, part.proj)
    return tuple(tensor for module in modules for tensor in (module.weight, module.bias))


def _feed_forward_weights(layer: TransformerLayer) -> _Weights:
    part = layer.feed_forward
    modules = (part.norm, part.expand, part.contract)
    return tuple(tensor for module in modules for tensor in (module.weight, module.bias))
