"""Qwen2.5-VL with fewer image tokens, against the stock model fed by hand."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.token_reduction.qwen_reduction import reduced_qwen
from tests.models.tiny_vision_language import (
    EOS,
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
    batch_of_tokens,
    by_content,
    by_norm,
    footprint,
)

GRIDS = ((1, 8, 4), (1, 4, 6), (1, 4, 4))
PADDING = {"atol": 2e-5, "rtol": 1e-5}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": PAD}
Qwen = Qwen2_5_VLForConditionalGeneration


def qwen() -> Qwen:
    """Patches of 7 pixels, windows of 4 x 4 patches, merged 2 x 2."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 7,
        "window_size": 28,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(config).eval()


def prompt(index: int) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(index)
    _, rows, columns = GRIDS[index]
    image = torch.full((rows * columns // 4,), IMAGE)
    ids = torch.cat([torch.tensor([1, 5]), image, torch.arange(10, 14 + index)])[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(rows * columns, 2 * 3 * 7 * 7, generator=seeded),
        "image_grid_thw": torch.tensor([GRIDS[index]]),
    }


def batch(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    images = {n: torch.cat([p[n] for p in prompts]) for n in ("pixel_values", "image_grid_thw")}
    return {name: batch_of_tokens(prompts, name) for name in names} | images


@torch.no_grad()
def test_keeping_every_token_changes_no_bit() -> None:
    model = qwen()
    call = batch([prompt(i) for i in range(3)])
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    stock, written = model(**call), model.generate(**call, **options)
    model.model.rope_deltas = None
    before = footprint(model)
    with reduced_qwen(model, by_norm(1.0)) as handle:
        found, rewritten = model(**call), model.generate(**call, **options)
    assert torch.equal(found.logits, stock.logits)
    assert torch.equal(rewritten.sequences, written.sequences)
    assert all(map(torch.equal, rewritten.logits, written.logits))
    assert handle.kept_counts == [8, 6, 4]
    assert footprint(model) == before


@torch.no_grad()
def test_kept_tokens_keep_their_own_place_in_the_image() -> None:
    model = qwen()
    for index in range(3):
        call = prompt(index)
        with reduced_qwen(model, by_content(0.2)) as handle:
            found = model(**call).logits
        (image,) = handle.images
        stays = torch.ones_like(call["input_ids"], dtype=torch.bool)
        stays[call["input_ids"] == IMAGE] = image.mask[0]
        encoded = model.model.get_image_features(call["pixel_values"], call["image_grid_thw"])
        encoded.pooler_output = [encoded.pooler_output[0][image.mask[0]]]
        # Rows and columns of the merged grid; text goes on behind the longer side.
        _, rows, columns = (size // 2 or 1 for size in GRIDS[index])
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T + 2
        start = 2 + max(rows, columns)
        text = torch.arange(start, start + 4 + index).expand(3, -1)
        planes = torch.cat([torch.full((1, rows * columns), 2), places])
        positions = torch.cat([torch.arange(2).expand(3, -1), planes, text], 1)[:, None]
        expected = model(
            input_ids=call["input_ids"][stays][None],
            mm_encoder_outputs={"image": encoded},
            position_ids=positions[..., stays[0]],
        ).logits
        assert_close(found, expected, **PADDING)


@torch.no_grad()
def test_batches_steps_and_generation_agree() -> None:
    model = qwen()
    prompts = [prompt(i) for i in range(3)]
    call = batch(prompts)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with reduced_qwen(model, by_content(0.2)) as handle:
        together = model(**call, use_cache=True)
        assert len(set(handle.kept_counts)) > 1
        for row, own in zip(together.logits, prompts, strict=True):
            alone = model(**own).logits[0]
            assert_close(row[-len(alone) :], alone, **PADDING)
        written = model.generate(**call, **options)
        new = written.sequences[:, call["input_ids"].shape[1] :]
        found, mask = [together.logits[:, -1]], call["attention_mask"]
        for step in new.split(1, dim=1)[:-1]:
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            out = model(input_ids=step, attention_mask=mask, cache=together.cache)
            found.append(out.logits[:, -1])
        stepped = torch.stack(found, 1)
        assert_close(torch.stack(written.logits, 1), stepped, **PADDING)
        stepped[..., EOS] = -torch.inf
        assert torch.equal(stepped.argmax(-1), new)
        for row, own in zip(new, prompts, strict=True):
            assert torch.equal(model.generate(**own, **GREEDY)[0, own["input_ids"].shape[1] :], row)
        beams = model.generate(**call, **GREEDY, num_beams=3)[:, -5:]
        for row, own in zip(beams, prompts, strict=True):
            assert torch.equal(model.generate(**own, **GREEDY, num_beams=3)[0, -5:], row)


@torch.no_grad()
def test_gaps_do_not_reach_the_detection_of_packed_prompts() -> None:
    model, planes = qwen(), []

    def note(_: object, __: object, kwargs: dict[str, Tensor]) -> None:
        planes.append(len(kwargs["position_ids"]))  # a fourth would be the positions of the text

    model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    with reduced_qwen(model, by_norm(0.5)):
        model.generate(**prompt(0), **GREEDY)
    assert planes == [3] * 5


def test_other_models_are_refused() -> None:
    with (
        pytest.raises(ValueError, match="model=Linear: expected Qwen2"),
        reduced_qwen(torch.nn.Linear(1, 1), by_norm(0.3)),
    ):
        pass
