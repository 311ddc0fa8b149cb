"""Text states: those of the stock model, without padding, kept and joined without loss."""

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, DynamicCache

from models.bifrost.generator import predict
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.text_states import TextStates, encode_text, join_texts
from tests.models.bifrost_networks import (
    captions,
    llama,
    qwen2,
    trained_branch,
    vision_language_model,
)

STOCK = [vision_language_model, llama, qwen2]


def fields(text: TextStates) -> list[torch.Tensor]:
    return [text.keys, text.values, text.valid, text.hidden]


@pytest.mark.parametrize("stock", STOCK)
def test_states_are_those_of_the_stock_model(stock: type) -> None:
    model = FrozenLanguageModel(stock())
    ids, mask = captions((7, 4), 7)
    text = encode_text(model, ids, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0).masked_fill(mask == 0, 1)
    if model.axes == 3:
        positions = positions.expand(3, -1, -1)
    cache = DynamicCache(config=model.text.config)
    with torch.no_grad():
        output = model.text(
            ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
    kept = mask.bool()
    assert_close(text.hidden[kept], output.last_hidden_state[kept], atol=1e-5, rtol=1e-5)
    for ours, values, layer in zip(text.keys, text.values, cache.layers, strict=True):
        for mine, theirs in ((ours, layer.keys), (values, layer.values)):
            mine, theirs = (part.transpose(1, 2)[kept] for part in (mine, theirs))
            assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert not text.hidden[~kept].any()
    assert not text.keys.transpose(2, 3)[:, ~kept].any()


def test_padding_of_any_length_changes_nothing() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    latents, mask = torch.randn(2, 16, 64), torch.rand(2, 16) < 0.7
    ids, kept = captions((7, 4), 7)
    text = encode_text(model, ids, kept)
    with torch.no_grad():
        expected = predict(branch, model, latents, mask, text)
    for pads in (1, 5, 40):
        filler = torch.randint(0, 300, (2, pads))  # ids at padding are arbitrary
        longer = torch.cat([filler, ids], 1), torch.cat([torch.zeros_like(filler), kept], 1)
        found = encode_text(model, *longer)
        for mine, theirs in zip(fields(found), fields(text), strict=True):
            assert torch.equal(mine, theirs)
        with torch.no_grad():
            assert torch.equal(predict(branch, model, latents, mask, found), expected)
    # Beside a longer text the padding stays, and still changes nothing.
    long = captions((20,), 20, seed=5)
    joined = join_texts([text, encode_text(model, *long)])
    with torch.no_grad():
        three = predict(branch, model, latents[[0, 1, 0]], mask[[0, 1, 0]], joined)
    assert_close(three[:2], expected, atol=1e-5, rtol=1e-5)


def test_text_never_depends_on_image_tokens() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    ids, kept = captions((7, 4), 7)
    text = encode_text(model, ids, kept)
    before = [part.clone() for part in fields(text)]
    latents, mask = torch.randn(2, 16, 64), torch.rand(2, 16) < 0.7
    predict(branch, model, latents, mask, text).sum().backward()
    again = encode_text(model, ids, kept)
    for part, old, new in zip(fields(text), before, fields(again), strict=True):
        assert torch.equal(part, old)
        assert torch.equal(part, new)
        assert not part.requires_grad


def test_rows_repeat_join_and_files() -> None:
    model = FrozenLanguageModel(llama())
    text = encode_text(model, *captions((7, 4, 2), 7))
    short = text.rows(torch.tensor([2, 1]))
    assert short.valid.shape == (2, 4)
    assert short.lengths.tolist() == [2, 4]
    assert torch.equal(short.keys[:, 1], text.keys[:, 1, :, 3:])
    assert text.repeat(2).lengths.tolist() == [7, 7, 4, 4, 2, 2]
    joined = join_texts([short, text.rows(torch.tensor([0]))])
    for mine, theirs in zip(
        fields(joined.rows(torch.tensor([2, 1, 0]))), fields(text), strict=True
    ):
        assert torch.equal(mine, theirs)
    back = TextStates.from_tensors(text.tensors())
    assert all(part.is_contiguous() for part in text.tensors().values())
    assert all(torch.equal(a, b) for a, b in zip(fields(back), fields(text), strict=True))
    assert text.to("cpu", torch.bfloat16).keys.dtype == torch.bfloat16
    assert text.to("cpu", torch.bfloat16).valid.dtype == torch.bool
    assert short.key_mask(3).shape == (2, 1, 1, 7)
    assert short.rows(torch.tensor([1])).key_mask(3) is None


def test_states_may_be_left_out() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model, positions="2drope")
    ids, kept = captions((7, 4), 7)
    text, lean = encode_text(model, ids, kept), encode_text(model, ids, kept, states=False)
    assert lean.hidden.shape == (2, 7, 0)
    for mine, theirs in zip(fields(lean)[:3], fields(text)[:3], strict=True):
        assert torch.equal(mine, theirs)
    latents, mask = torch.randn(2, 16, 64), torch.rand(2, 16) < 0.7
    with torch.no_grad():
        expected = predict(branch, model, latents, mask, text)
        assert torch.equal(predict(branch, model, latents, mask, lean), expected)


def test_a_text_may_be_empty() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    ids, kept = captions((5, 0), 5)
    for rows in ([0, 1], [1]):
        text = encode_text(model, ids[rows], kept[rows])
        latents, mask = torch.randn(len(rows), 16, 64), torch.ones(len(rows), 16).bool()
        assert predict(branch, model, latents, mask, text).isfinite().all()


def test_wrong_texts_are_refused() -> None:
    model = FrozenLanguageModel(llama())
    ids, mask = captions((5, 3), 5)
    with pytest.raises(ValueError, match="padding behind a token; pad on the left"):
        encode_text(model, ids, mask.flip(1))
    with pytest.raises(ValueError, match="expected the same"):
        encode_text(model, ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"parts=\[\]"):
        join_texts([])
    tensors = encode_text(model, ids, mask).tensors()
    with pytest.raises(ValueError, match="hidden is missing"):
        TextStates.from_tensors({k: v for k, v in tensors.items() if k != "hidden"})
    with pytest.raises(ValueError, match="do not fit valid"):
        TextStates.from_tensors(tensors | {"keys": tensors["keys"][:, :1]})


def test_unfit_models_are_refused() -> None:
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"model=CLIPTextModel: expected Qwen2\.5-VL, Llama or"):
        FrozenLanguageModel(clip)
    sliding = qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="use_sliding_window=False"):
        FrozenLanguageModel(sliding)
    dynamic = llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        FrozenLanguageModel(dynamic)


def test_identity_tells_models_apart() -> None:
    first = FrozenLanguageModel(llama())
    assert first.identity == FrozenLanguageModel(llama()).identity
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    turned = llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    kinds = {FrozenLanguageModel(m).identity for m in (other, turned)}
    assert len(kinds | {first.identity}) == 3
    assert first.to(torch.bfloat16).identity not in kinds
