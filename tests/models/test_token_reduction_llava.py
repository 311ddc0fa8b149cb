"""LLaVA-NeXT and LLaVA-OneVision with fewer image tokens, against the stock models fed by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.token_reduction.llava_reduction import reduced_llava
from models.token_reduction.prompts import Positions
from models.token_reduction.selection import Selection
from tests.models.tiny_vision_language import (
    IMAGE,
    PAD,
    Llava,
    batch,
    by_content,
    by_norm,
    footprint,
    llava_next,
    llava_onevision,
    prompt,
)

MODELS = pytest.mark.parametrize("make", [llava_next, llava_onevision], ids=["next", "onevision"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])
POSITIONS = pytest.mark.parametrize("positions", ["compact", "original"])
PADDING = {"atol": 2e-5, "rtol": 1e-5}
Make = Callable[[], Llava]


def packed_mask(model: Llava, call: dict[str, Tensor], masks: list[Tensor]) -> Tensor:
    """Which placeholders stay, by sending ones and zeros through the model's own packing."""
    packing = {"vision_feature_select_strategy": "default"}
    if "onevision" in model.config.model_type:
        packing = {"vision_aspect_ratio": "anyres_max_9"}
    tiles = [mask[..., None].float() for mask in masks]
    newline = torch.ones(1)
    packed, _ = model.model.pack_image_features(
        tiles, call["image_sizes"], image_newline=newline, **packing
    )
    return torch.cat(packed)[:, 0].bool()


def fed_by_hand(model: Llava, call: dict[str, Tensor], masks: list[Tensor], gaps: bool) -> Tensor:
    """Last logits of a prompt whose dropped tokens were cut out of the stock model's inputs."""
    encoded = model.model.get_image_features(call["pixel_values"], call["image_sizes"])
    kept = packed_mask(model, call, masks)
    encoded.pooler_output = [torch.cat(encoded.pooler_output)[kept]]
    ids = call["input_ids"]
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[ids == IMAGE] = kept
    places = stays[0].nonzero().T  # (1, S)
    return model(
        input_ids=ids[stays][None],
        mm_encoder_outputs={"image": encoded},
        position_ids=places if gaps else torch.arange(places.shape[1])[None],
    ).logits[0]


@MODELS
@SIDES
@torch.no_grad()
def test_keeping_every_token_changes_no_bit(make: Make, side: str) -> None:
    model = make()
    call = batch([prompt(model, i) for i in (0, 3, 2)], side)
    call["labels"] = call["input_ids"].masked_fill(call["input_ids"] == IMAGE, -100)
    stock = model(**call)
    for newlines in ("keep", "drop"):
        with reduced_llava(model, by_norm(share=1.0), newlines=newlines) as handle:
            found = model(**call)
        assert torch.equal(found.logits, stock.logits)
        assert torch.equal(found.loss, stock.loss)
        for image, own in zip(handle.images, stock.image_outputs.pooler_output, strict=True):
            assert torch.equal(image.features, own)
            assert image.tokens + image.newlines == len(own)


@MODELS
@POSITIONS
@torch.no_grad()
def test_logits_are_those_of_the_stock_model_fed_by_hand(make: Make, positions: Positions) -> None:
    model = make()
    for index in range(4):
        call = prompt(model, index)
        with reduced_llava(model, by_content(0.3), positions=positions) as handle:
            found = model(**call).logits[0]
        (image,) = handle.images
        expected = fed_by_hand(model, call, [image.mask], positions == "original")
        assert_close(found, expected, **PADDING)
        assert len(found) == call["input_ids"].shape[1] - len(image.source) + int(image.keep.sum())


@MODELS
@torch.no_grad()
def test_only_tokens_that_are_read_are_projected(make: Make) -> None:
    model, shapes = make(), []
    layer = model.model.multi_modal_projector.linear_1  # reached by the real calls and empty ones
    layer.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
    call = batch([prompt(model, i) for i in (0, 2)])
    shapes.clear()
    with reduced_llava(model, by_norm(0.5)) as handle:
        model(**call)
    assert shapes == [(8, 0), (1, sum(handle.kept_counts))]
    shapes.clear()
    with reduced_llava(model, by_norm(1.0)):
        model(**call)
    assert shapes == [(8, 0), (8, 16)]  # as the stock model, or larger models differ in some bits


@torch.no_grad()
def test_gaps_are_no_borders_of_packed_prompts() -> None:
    model = llava_next()
    call = prompt(model, 0)
    with reduced_llava(model, by_norm(0.3), positions="original"):
        expected = model(**call).logits
        del call["attention_mask"]
        assert_close(model(**call, use_cache=False).logits, expected, **PADDING)
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    refused = pytest.raises(ValueError, match="flash attention takes gaps")
    with refused, reduced_llava(model, by_norm(0.3), positions="original"):
        pass


@MODELS
@torch.no_grad()
def test_positions_modes_differ(make: Make) -> None:
    model = make()
    call = prompt(model, 0)
    logits = []
    for positions in ("compact", "original"):
        with reduced_llava(model, by_norm(share=0.3), positions=positions):
            logits.append(model(**call).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@MODELS
@SIDES
@POSITIONS
@torch.no_grad()
def test_batch_gives_what_each_prompt_gives_alone(
    make: Make, side: str, positions: Positions
) -> None:
    model = make()
    prompts = [prompt(model, i) for i in range(4)]
    with reduced_llava(model, by_content(0.3), positions=positions) as handle:
        together = model(**batch(prompts, side)).logits
        counts = handle.kept_counts
        assert len(set(counts)) > 1
        for row, call, count in zip(together, prompts, counts, strict=True):
            alone = model(**call).logits[0]
            assert handle.kept_counts == [count]
            own = row[-len(alone) :] if side == "left" else row[: len(alone)]
            assert_close(own, alone, **PADDING)
    assert together.shape[1] < batch(prompts)["input_ids"].shape[1]


@MODELS
@torch.no_grad()
def test_prompts_of_equal_length_without_a_mask_may_keep_different_numbers(make: Make) -> None:
    model = make()
    first, second = prompt(model, 0), prompt(model, 0)
    second["pixel_values"] = second["pixel_values"].flip(-1) * 2
    call = batch([first, second])
    del call["attention_mask"], first["attention_mask"], second["attention_mask"]
    with reduced_llava(model, by_content(0.6)) as handle:
        together = model(**call).logits
        assert handle.kept_counts[0] != handle.kept_counts[1]
        for row, own in zip(together, (first, second), strict=True):
            alone = model(**own).logits[0]
            assert_close(row[-len(alone) :], alone, **PADDING)


@MODELS
@torch.no_grad()
def test_counts_are_those_of_the_selection_without_the_images_padding(make: Make) -> None:
    model = make()
    call = batch([prompt(model, i) for i in range(4)])
    with reduced_llava(model, by_norm(share=0.5)) as handle:
        model(**call)
        masks = [image.mask for image in handle.images]
        assert all(int(mask.sum()) == mask.numel() // 2 for mask in masks)
        assert all((mask.sum(1) == 8).all() for mask in masks)  # of each tile
        kept = int(packed_mask(model, call, masks).sum())
        newlines = sum(image.newlines for image in handle.images)
        assert sum(handle.kept_counts) == kept - newlines
        assert min(handle.kept_counts) < min(masks[2].sum(), masks[0].sum())  # some were padding
    with reduced_llava(model, by_norm(share=0.5, budget="batch")) as handle:
        model(**call)
        masks = [image.mask for image in handle.images]
        assert all(int(mask.sum()) == mask.numel() // 2 for mask in masks)
        assert any((mask.sum(1) != 8).any() for mask in masks)  # of each image instead


@MODELS
def test_labels_and_gradients_follow_the_kept_tokens(make: Make) -> None:
    model = make()
    call = batch([prompt(model, i) for i in (0, 2)], "right")
    call["labels"] = call["input_ids"].masked_fill(call["input_ids"] == PAD, -100)
    call["labels"] = call["labels"].masked_fill(call["labels"] == IMAGE, -100)
    with reduced_llava(model, by_norm(share=0.4)):
        found = model(**call)
    found.loss.backward()
    logits, total, count = found.logits, 0.0, 0
    for row, index in enumerate((0, 2)):  # the text after the image: 4 and 6 tokens, unpadded
        length = int((call["labels"][row] >= 0).sum()) - 2
        question = call["input_ids"][row][call["attention_mask"][row].bool()][-length:]
        with reduced_llava(model, by_norm(share=0.4)) as handle:
            model(**prompt(model, index))
        end = 2 + int(handle.images[0].keep.sum()) + length
        targets = torch.cat([torch.tensor([5]), question])
        places = torch.cat([torch.tensor([0]), torch.arange(end - length - 1, end - 1)])
        losses = torch.nn.functional.cross_entropy(
            logits[row, places].float(), targets, reduction="sum"
        )
        total, count = total + losses, count + len(targets)
    assert_close(found.loss, total / count, atol=1e-5, rtol=1e-5)
    base = model.model
    for parameter in (*base.multi_modal_projector.parameters(), base.image_newline):
        assert parameter.grad is not None
        assert parameter.grad.any()


@MODELS
def test_nothing_remains_after_the_context(make: Make) -> None:
    model = make()
    call = prompt(model, 1)
    with torch.no_grad():
        stock = model(**call)
        before = footprint(model)
        with reduced_llava(model, by_norm(share=0.3)):
            assert footprint(model) != before
            model(**call)
        assert footprint(model) == before

        def broken(tokens: Tensor, grid: tuple[int, int]) -> Selection:
            raise RuntimeError("no choice")

        with pytest.raises(RuntimeError, match="no choice"), reduced_llava(model, broken):
            model(**call)
        assert footprint(model) == before
        assert torch.equal(model(**call).logits, stock.logits)


@MODELS
@torch.no_grad()
def test_text_alone_is_read_as_ever(make: Make) -> None:
    model = make()
    ids = torch.tensor([[1, 5, 9, 20, 31]])
    stock = model(input_ids=ids).logits
    with reduced_llava(model, by_norm(share=0.3)) as handle:
        assert torch.equal(model(input_ids=ids).logits, stock)
    assert handle.images == []


@torch.no_grad()
def test_videos_and_several_images_of_onevision() -> None:
    model = llava_onevision()
    video = torch.randn(1, 2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor([1]), torch.full((9,), 97), torch.tensor([7, 8])])[None]
    stock = model(input_ids=ids, pixel_values_videos=video).logits
    tiles = torch.randn(2, 1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    call = {
        "input_ids": torch.tensor([[1] + [IMAGE] * 17 + [6] + [IMAGE] * 17 + [7]]),
        "pixel_values": tiles,
        "image_sizes": torch.tensor([[40, 56], [28, 28]]),
        "batch_num_images": torch.tensor([2]),
    }
    with reduced_llava(model, by_norm(share=0.25)) as handle:
        with pytest.raises(ValueError, match="expect to be of 4 or 5 dimensions"):
            model(**{**call, "pixel_values": tiles[0, 0]})
        assert torch.equal(model(input_ids=ids, pixel_values_videos=video).logits, stock)
        logits = model(**call).logits
        assert handle.kept_counts == [4, 4]
        assert logits.shape[1] == 3 + 2 * (4 + 1)


@torch.no_grad()
def test_onevisions_interpolation_is_refused_and_can_be_turned_off() -> None:
    model = llava_onevision()
    call = prompt(model, 3)  # 3 x 3 tiles
    model.config.vision_aspect_ratio = "anyres_max_4"
    with reduced_llava(model, by_norm(share=0.5)):
        with pytest.raises(ValueError, match="vision_aspect_ratio='anyres_max_4': would interp"):
            model(**call)
        model.config.vision_aspect_ratio = "anyres_max_9"
        model(**call)
