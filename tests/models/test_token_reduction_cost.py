"""Analytic cost: against the operations torch counts, and against known models' figures."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from models.token_reduction.cost import (
    CLIP_L_336,
    SIGLIP_SO400M_384,
    VICUNA_7B,
    EncoderShape,
    TransformerShape,
    reduction_cost,
)

# Retained share, prefill in TFLOP, total relative to all tokens, MiB of keys and values: five tiles
# of 576 tokens and 60 of text.
LLAVA_NEXT_7B = [
    (1.0, 40.3, 1.0, 1470),
    (0.5, 20.0, 0.525, 750),
    (0.4, 16.1, 0.431, 606),
    (0.3, 12.2, 0.339, 462),
    (0.2, 8.3, 0.248, 318),
    (0.1, 4.5, 0.158, 174),
]


def test_an_encoder_costs_what_torch_counts() -> None:
    network = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, mlp_ratio=3, num_classes=0
    )
    for block in network.blocks:
        block.attn.fused_attn = False  # the counter does not know every fused kernel
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(2, 3, 32, 32))
    shape = EncoderShape(TransformerShape(24, 3, 72), patches=16, patch_size=8, prefix=1)
    assert counter.get_total_flops() == 2 * 2 * shape.macs


def test_a_language_model_costs_what_torch_counts() -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    model = LlamaModel(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = model(torch.zeros(1, 10, dtype=torch.int64), use_cache=True).past_key_values
    shape = TransformerShape(32, 2, 40, key_value_width=16, gated=True)  # eager masks, not skips
    assert counter.get_total_flops() == 2 * shape.macs(10)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.cache_bytes(10, bytes_per_value=4) == stored


@pytest.mark.parametrize(
    ("encoder", "gigaflop", "parameters", "selector_gigaflop"),
    [(CLIP_L_336, 381, 37.7e6, 47.6), (SIGLIP_SO400M_384, 641, 45.7e6, 73.9)],
)
def test_known_encoders_and_their_selectors(
    encoder: EncoderShape, gigaflop: float, parameters: float, selector_gigaflop: float
) -> None:
    blocks = encoder.blocks.macs(encoder.patches + encoder.prefix)
    assert round(2e-9 * blocks) == gigaflop
    assert 2e-9 * encoder.macs == pytest.approx(gigaflop, rel=4e-3)  # and the patches' embedding
    selector = encoder.selector()
    assert selector.weights == pytest.approx(parameters, rel=2e-3)
    assert round(2e-9 * selector.macs(encoder.patches), 1) == selector_gigaflop


@pytest.mark.parametrize(("share", "prefill", "relative", "cache"), LLAVA_NEXT_7B)
def test_the_prefill_of_llava_next(
    share: float, prefill: float, relative: float, cache: float
) -> None:
    whole = reduction_cost(CLIP_L_336, VICUNA_7B, kept=2880, tiles=5, text_tokens=60)
    selector = CLIP_L_336.selector() if share < 1 else None
    kept = round(share * 2880)
    cost = reduction_cost(CLIP_L_336, VICUNA_7B, kept, 5, text_tokens=60, selector=selector)
    assert 2e-12 * cost.consumer == pytest.approx(prefill, abs=0.051)
    assert cost.macs / whole.macs == pytest.approx(relative, abs=6e-4)
    assert cost.cache_bytes / 2**20 == cache


def test_parts_add_up_and_the_projector_sees_only_kept_tokens() -> None:
    encoder = EncoderShape(TransformerShape(8, 2, 16), patches=9, patch_size=4)
    consumer = TransformerShape(12, 1, 24, causal=True)
    cost = reduction_cost(
        encoder, consumer, kept=5, tiles=2, selector=encoder.selector(1, 4), projector=(8, 12, 12)
    )
    assert cost.encoder == 2 * encoder.macs
    assert cost.selector == 2 * TransformerShape(4, 1, 8).macs(9)
    assert cost.projector == 5 * (8 * 12 + 12 * 12)
    assert cost.consumer == consumer.macs(5)
    assert cost.gather_bytes == 2 * 5 * 8 * 2
    assert cost.macs == sum(cost[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"kept": 0}, "kept=0"), ({"kept": 19}, "18 tokens"), ({"tiles": 0}, "tiles=0")],
)
def test_impossible_counts_are_refused(change: dict[str, int], message: str) -> None:
    encoder = EncoderShape(TransformerShape(8, 2, 16), patches=9, patch_size=4)
    arguments = {"kept": 5, "tiles": 2, **change}
    with pytest.raises(ValueError, match=message):
        reduction_cost(encoder, encoder.blocks, selector=encoder.selector(), **arguments)
