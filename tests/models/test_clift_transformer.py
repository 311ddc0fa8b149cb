"""Layers against torch's own, and against attention written out."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from models.clift.clift import Clift, CliftShape
from models.clift.renderer import Decoder
from models.clift.transformer import (
    Attention,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    KeyValues,
    attend,
    drop,
    key_mask,
)
from tests.models.clift_networks import SMALL, shake

SIZES = {"d_model": 32, "nhead": 4, "dim_feedforward": 48, "dropout": 0.0}
CLOSE = {"atol": 2e-5, "rtol": 0.0}


def deviation(weight: Tensor) -> float:
    """Standard deviation of a weight."""
    return float(weight.detach().std())


def dense_attention(layer: Attention, x: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
    """Attention of x (B, T, W) to memory (B, S, W), ``hidden`` (B, S), one head at a time."""
    width, heads = x.shape[-1], layer.heads
    queries, keys, values = (
        y @ w.T + b
        for y, w, b in zip(
            (x, memory, memory),
            layer.in_proj_weight.split(width),
            layer.in_proj_bias.split(width),
            strict=True,
        )
    )
    out = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        q, k, v = queries[..., part], keys[..., part], values[..., part]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = q / (q.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.q_norm.weight
            k = k / (k.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.k_norm.weight
        scores = q @ k.mT / (width // heads) ** 0.5
        out.append(scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ v)
    return torch.cat(out, -1) @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_encoder_equals_torchs_stack_with_the_same_weights(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        **SIZES, activation="gelu", norm_first=True, batch_first=True
    )
    theirs = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    ours = Encoder(EncoderLayer(32, 4, 48), 3)
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 32)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 5:] = not padded
    expected = theirs(x, src_key_padding_mask=~valid)
    assert_close(ours(x, key_mask(valid))[valid], expected[valid], **CLOSE)


@torch.no_grad()
def test_decoder_equals_torchs_stack_with_the_same_weights() -> None:
    layer = nn.TransformerDecoderLayer(
        **SIZES, activation="gelu", norm_first=True, batch_first=True
    )
    theirs = nn.TransformerDecoder(layer, 2)
    ours = Decoder(DecoderLayer(32, 4, 48), 2)
    shake(theirs)
    ours.load_state_dict(theirs.state_dict())
    queries, memory = torch.randn(2, 3, 7, 32), torch.randn(2, 11, 32)
    valid = torch.rand(2, 11) < 0.6
    expected = theirs(
        queries.flatten(0, 1),
        memory.repeat_interleave(3, 0),
        memory_key_padding_mask=~valid.repeat_interleave(3, 0),
    )
    assert_close(ours(queries, ours.remember(memory, valid)).flatten(0, 1), expected, **CLOSE)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_queries_and_keys_are_normalised_in_every_mode(training: bool, gradients: bool) -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(32, 4, 48, dropout=0.0, qk_norm=True).train(training)
    shake(layer)
    x = torch.randn(2, 9, 32)
    with nullcontext() if gradients else torch.no_grad():
        out = layer(x)
        normed = layer.norm1(x)
        middle = x + dense_attention(layer.self_attn, normed, normed, torch.zeros(2, 9) > 0)
        expected = middle + layer.linear2(F.gelu(layer.linear1(layer.norm2(middle))))
        assert_close(out, expected, **CLOSE)
        layer.self_attn.q_norm = layer.self_attn.k_norm = None
        assert (layer(x) - expected).abs().max() > 0.01


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_cross_attention_equals_attention_written_out(qk_norm: bool) -> None:
    layer = Attention(32, 4, qk_norm=qk_norm)
    shake(layer)
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 11, 32)
    valid = torch.rand(2, 11) < 0.6
    out = layer.read(x, layer.remember(memory), key_mask(valid))
    assert_close(out, dense_attention(layer, x, memory, ~valid), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_attention_stays_near_float32(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 4, 17, 8)
    mask = torch.rand(2, 1, 1, 17) < 0.5
    mask[..., 0] = True
    exact = attend(q, KeyValues(k, v), mask)
    half = attend(q.to(dtype), KeyValues(k.to(dtype), v.to(dtype)), mask)
    assert half.dtype == dtype
    assert_close(half.float(), exact, atol=0.03, rtol=0)


def test_tokens_without_anything_to_see_stay_finite() -> None:
    layer = Attention(32, 4)
    valid = torch.tensor([[True, False, False], [False, False, False]])
    x = torch.randn(2, 3, 32)
    out = layer(x, key_mask(valid))
    out.sum().backward()
    assert out.isfinite().all()
    assert layer.in_proj_weight.grad is not None
    assert layer.in_proj_weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3,), (7, 5), (64, 33, 17)])
def test_dropout_keeps_the_mean_and_the_stated_share(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.ones(shape)
    out = drop(x, 0.1, training=True)
    assert ((out == 0) | ((out - 1 / 0.9).abs() < 1e-6)).all()
    if x.numel() > 10_000:
        assert float(out.mean()) == pytest.approx(1, abs=0.01)
        lag = (out.flatten()[1:] == 0) & (out.flatten()[:-1] == 0)
        assert float(lag.float().mean()) == pytest.approx(0.01, abs=0.003)
    assert drop(x, 0.1, training=False) is x
    assert drop(x, 0.0, training=True) is x


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first = drop(x, 0.3, training=True)
    assert not torch.equal(first, drop(x, 0.3, training=True))
    torch.manual_seed(3)
    assert torch.equal(first, drop(x, 0.3, training=True))


def test_attention_dropout_is_unbiased_and_off_in_evaluation() -> None:
    torch.manual_seed(0)
    layer = Attention(8, 2, dropout=0.5)
    x = torch.randn(1, 6, 8)
    exact = layer.eval()(x)
    assert torch.equal(exact, layer(x))
    layer.train()
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(0)
    assert_close(mean, exact, atol=0.05, rtol=0)
    assert not torch.equal(layer(x), exact)


def test_official_start_gives_equal_layers_and_torchs_defaults() -> None:
    torch.manual_seed(0)
    model = Clift(CliftShape(width=64, heads=4, feed_forward=128, encoder_layers=3))
    for stack in (model.encoder, model.decoder):
        first, *others = (layer.state_dict() for layer in stack.layers)
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)
        parameters = [set(layer.parameters()) for layer in stack.layers]
        assert not set.intersection(*parameters)
    attention = model.decoder.layers[0].multihead_attn
    bound = (6 / (64 + 3 * 64)) ** 0.5  # Xavier's, over the packed projection
    assert attention.in_proj_weight.abs().max() <= bound
    assert deviation(attention.in_proj_weight) == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()
    assert deviation(attention.out_proj.weight) == pytest.approx((1 / 64 / 3) ** 0.5, rel=0.05)
    assert deviation(model.linear_input.weight) == pytest.approx((1 / 576 / 3) ** 0.5, rel=0.05)
    assert not model.squeezer.linear1.weight.any()
    assert not model.squeezer.linear1.bias.any()


def test_small_start_scales_residual_outputs_and_the_head() -> None:
    torch.manual_seed(0)
    shape = CliftShape(
        width=64, heads=4, feed_forward=128, encoder_layers=3, decoder_layers=2, small_init=True
    )
    model = Clift(shape)
    spread = 0.8796  # deviation of a unit normal cut at two
    for stack, depth in ((model.encoder, 3), (model.decoder, 2)):
        first, last = stack.layers[0], stack.layers[-1]
        assert not torch.equal(first.linear1.weight, last.linear1.weight)
        down = spread / (2 * depth) ** 0.5
        assert deviation(first.self_attn.in_proj_weight) == pytest.approx(spread / 8, rel=0.04)
        assert deviation(first.linear1.weight) == pytest.approx(spread / 8, rel=0.04)
        assert deviation(last.linear2.weight) == pytest.approx(down / 128**0.5, rel=0.04)
        assert deviation(last.self_attn.out_proj.weight) == pytest.approx(down / 8, rel=0.04)
        assert not any(layer.linear1.bias.any() for layer in stack.layers)
    cross = model.decoder.layers[1].multihead_attn
    assert deviation(cross.out_proj.weight) == pytest.approx(spread / 16, rel=0.04)
    assert deviation(model.patch_to_image[0].weight) == pytest.approx(0.1 * spread / 8, rel=0.04)
    assert deviation(model.linear_target.weight) == pytest.approx(spread / 384**0.5, rel=0.04)
    assert not model.squeezer.linear1.weight.any()


def test_impossible_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="width=30: must be a multiple of heads=4"):
        Clift(CliftShape(width=30, heads=4))
    with pytest.raises(ValueError, match="encoder_layers=0: must be >= 1"):
        CliftShape(encoder_layers=0)
    with pytest.raises(ValueError, match="dropout=1"):
        CliftShape(dropout=1)
    with pytest.raises(ValueError, match="patch_size=4; resize or crop"):
        Clift(SMALL).encode(torch.rand(1, 1, 3, 10, 8), torch.rand(1, 1, 6, 10, 8))
