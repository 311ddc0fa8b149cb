"""Caches and ``generate`` of LLaVAs with fewer image tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

from models.token_reduction.llava_reduction import reduced_llava
from models.token_reduction.prompts import Positions
from tests.models.tiny_vision_language import (
    EOS,
    IMAGE,
    PAD,
    Llava,
    batch,
    by_content,
    by_norm,
    llava_next,
    llava_onevision,
    prompt,
)

MODELS = pytest.mark.parametrize("make", [llava_next, llava_onevision], ids=["next", "onevision"])
POSITIONS = pytest.mark.parametrize("positions", ["compact", "original"])
PADDING = {"atol": 2e-5, "rtol": 1e-5}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": PAD}
Make = Callable[[], Llava]


def longer(call: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The call with further tokens (B, n) behind each prompt."""
    ids, mask = call["input_ids"], call["attention_mask"]
    more = {"input_ids": torch.cat([ids, tokens], 1)}
    return {**call, **more, "attention_mask": torch.cat([mask, torch.ones_like(tokens)], 1)}


@MODELS
@POSITIONS
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(
    make: Make, positions: Positions, masked: bool
) -> None:
    model = make()
    call = batch([prompt(model, i) for i in ((0, 3, 2) if masked else (3,))])
    new = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])[
        : len(call["input_ids"])
    ]
    with reduced_llava(model, by_content(0.3), positions=positions):
        whole = model(**longer(call, new)).logits[:, -5:]
        first = model(**call, use_cache=True)
        found = [first.logits[:, -1:]]
        for start, end in ((0, 2), (2, 3), (3, 4)):
            step = {"input_ids": new[:, start:end], "cache": first.cache, "use_cache": True}
            if masked:
                step["attention_mask"] = longer(call, new[:, :end])["attention_mask"]
            found.append(model(**step).logits)
    assert_close(torch.cat(found, 1), whole, **PADDING)


@MODELS
@torch.no_grad()
def test_generating_with_every_token_changes_no_bit(make: Make) -> None:
    model = make()
    call = batch([prompt(model, i) for i in (0, 3, 2)])
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    for beams in (1, 3):
        stock = model.generate(**call, **options, num_beams=beams)
        with reduced_llava(model, by_norm(1.0)):
            found = model.generate(**call, **options, num_beams=beams)
        assert torch.equal(found.sequences, stock.sequences)
        assert all(map(torch.equal, found.logits, stock.logits))


@MODELS
@POSITIONS
@torch.no_grad()
def test_generated_tokens_are_those_of_forward_passes(make: Make, positions: Positions) -> None:
    model = make()
    prompts = [prompt(model, i) for i in range(4)]
    call = batch(prompts)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with reduced_llava(model, by_content(0.3), positions=positions) as handle:
        found = model.generate(**call, **options)
        assert len(set(handle.kept_counts)) > 1
        length = call["input_ids"].shape[1]
        assert torch.equal(found.sequences[:, :length], call["input_ids"])
        new = found.sequences[:, length:]
        logits = model(**longer(call, new)).logits[:, -6:-1]
        assert_close(torch.stack(found.logits, 1), logits, **PADDING)
        logits[..., EOS] = -torch.inf  # which min_new_tokens forbids
        assert torch.equal(logits.argmax(-1), new)
        uncached = model.generate(**call, **options, use_cache=False)
        assert torch.equal(uncached.sequences, found.sequences)
        for row, own in zip(new, prompts, strict=True):
            alone = model.generate(**own, **GREEDY)
            assert torch.equal(alone[0, own["input_ids"].shape[1] :], row)


@MODELS
@torch.no_grad()
def test_beams_and_samples_of_a_prompt_read_its_own_image(make: Make) -> None:
    model = make()
    prompts = [prompt(model, i) for i in (0, 2)]
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    with reduced_llava(model, by_content(0.3)):
        together = model.generate(**batch(prompts), **options)[:, -5:]
        for rows, own in zip(together.split(2), prompts, strict=True):
            assert torch.equal(model.generate(**own, **options)[:, -5:], rows)
        # As many beams as sequences, so that the best beam is that of wider search over them all.
        same = model.generate(**batch(prompts), **{**GREEDY, "num_beams": 3})[:, -5:]
    assert torch.equal(same, together[::2])


@MODELS
@torch.no_grad()
def test_a_cache_may_be_emptied_and_used_for_another_prompt(make: Make) -> None:
    model = make()
    call = prompt(model, 0)
    text = torch.tensor([[1, 5, 9, 20, 31]])
    stock = model(input_ids=text).logits
    with reduced_llava(model, by_norm(0.3)):
        cache = DynamicCache(config=model.config)
        model(**call, cache=cache)
        cache.crop(-cache.get_seq_length())
        first = model(input_ids=text[:, :3], cache=cache).logits
        last = model(input_ids=text[:, 3:], cache=cache).logits
    assert_close(torch.cat([first, last], 1), stock, **PADDING)


@torch.no_grad()
def test_calls_that_cannot_be_shortened_are_refused() -> None:
    model = llava_next()
    call = prompt(model, 0)
    ids, mask = call["input_ids"], call["attention_mask"]
    outside = model.model.get_image_features(call["pixel_values"], call["image_sizes"])
    with reduced_llava(model, by_norm(0.3)):
        images = {name: call[name] for name in ("pixel_values", "image_sizes")}
        with pytest.raises(ValueError, match="input_ids: 68 image placeholders for 70"):
            model(**{**call, "input_ids": ids.clone().index_fill_(1, torch.tensor([8, 9]), 7)})
        with pytest.raises(ValueError, match="input_ids=None"):
            model(inputs_embeds=model.get_input_embeddings()(ids), **images)
        with pytest.raises(ValueError, match=r"image features of \(70, 32\): not made inside"):
            model(input_ids=ids, mm_encoder_outputs={"image": outside})
        with pytest.raises(ValueError, match=r"attention_mask of \(1, 1, 76, 76\)"):
            model(**{**call, "attention_mask": torch.ones(1, 1, 76, 76)})
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(**call, logits_to_keep=torch.tensor([0]))
        with pytest.raises(ValueError, match="generate without prefill_chunk_size"):
            model.generate(**call, **GREEDY, prefill_chunk_size=20)
        with pytest.raises(ValueError, match="dynamic cache"):
            model.generate(**call, **GREEDY, cache_implementation="static")
        cache = model(**call, use_cache=True).cache
        with pytest.raises(ValueError, match="images after 32 cached tokens"):
            model(**call, cache=cache)
        with pytest.raises(ValueError, match=r"attention_mask of \(1, 31\): expected \(B, 77\)"):
            model(input_ids=ids[:, :1], attention_mask=mask[:, :31], cache=cache)
        with pytest.raises(ValueError, match="position_ids from 31: expected 76"):
            model(input_ids=ids[:, :1], position_ids=torch.tensor([[31]]), cache=cache)
        more = torch.cat([ids, torch.tensor([[11, 12]])], 1)
        with pytest.raises(ValueError, match="new tokens"):
            model.generate(input_ids=more, cache=cache, **GREEDY)


def test_wrong_models_and_options_are_refused() -> None:
    model = llava_next()
    with (
        pytest.raises(ValueError, match="model=Linear: expected LLaVA"),
        reduced_llava(torch.nn.Linear(1, 1), by_norm(0.3)),
    ):
        pass
    for options in ({"positions": "compacted"}, {"newlines": "all"}):
        with (
            pytest.raises(ValueError, match="expected '"),
            reduced_llava(model, by_norm(0.3), **options),
        ):
            pass
    with reduced_llava(model, by_norm(0.3)):
        with (
            pytest.raises(ValueError, match="already replaced"),
            reduced_llava(model, by_norm(0.3)),
        ):
            pass
        call = prompt_with_class_token(model)
        with pytest.raises(ValueError, match=r"17 tokens of a tile on a grid of \(4, 4\)"):
            model(**call)


def prompt_with_class_token(model: Llava) -> dict[str, object]:
    return {
        "input_ids": torch.full((1, 3), IMAGE),
        "pixel_values": torch.zeros(1, 3, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 56]]),
        "vision_feature_select_strategy": "full",
    }
