"""The branch against the official code, the stock model beside it, and the paper's sizes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from benchmarks.dual_branch import DualBranch
from models.bifrost.branch import VisionBranch
from models.bifrost.checkpoint import official_name
from models.bifrost.generator import latent_loss, predict
from models.bifrost.language_model import FrozenLanguageModel, weights_digest
from models.bifrost.positions import PositionKind, image_positions
from models.bifrost.sharding import shard_branch
from models.bifrost.text_states import encode_text
from tests.models.bifrost_networks import (
    IMAGE_ID,
    VISION_END,
    VISION_START,
    captions,
    golden_networks,
    llama,
    qwen2,
    read_case,
    trained_branch,
    vision_language_model,
)

KINDS: tuple[PositionKind, ...] = ("learned", "2drope", "1drope", "separate_2drope")


def batch(items: int, width: int = 64, tokens: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (B, N, C) and a mask (B, N) with hidden and visible tokens in every row."""
    seeded = torch.Generator().manual_seed(seed)
    latents = torch.randn(items, tokens, width, generator=seeded)
    return latents, torch.rand(items, tokens, generator=seeded) < 0.7


@pytest.mark.parametrize("case", ["branch_n16", "branch_n64_b4"])
def test_official_code_is_matched_with_gradients(case: str) -> None:
    description, golden = read_case(case)
    near = description["tolerance"]
    model, branch = golden_networks(description["config"])
    length, mask = golden["text_embeds"].shape[1], golden["ar_mask"].bool()
    valid, latents = golden["attention_mask_2d"][:, :length], golden["image_latents"]
    ids = golden["input_ids"][:, :length]
    assert_close(model.embed(ids), golden["text_embeds"], **near)
    text = encode_text(model, ids, valid)
    cut = length - text.hidden.shape[1]
    assert_close(text.hidden, golden["expected_hidden_text"][:, cut:], **near)
    seen: list[Tensor] = []
    branch.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert torch.equal(branch.inputs(latents, mask), golden["expected_inputs_embeds_image"])

    prediction = predict(branch, model, latents, mask, text)
    assert_close(seen[0], golden["expected_hidden_image"], **near)
    assert_close(prediction, golden["expected_pred"], **near)
    loss = latent_loss(prediction, latents, mask)
    assert_close(loss[None], golden["expected_loss"], **near)
    loss.backward()
    gradients = {official_name(k): p.grad for k, p in branch.named_parameters()}
    stored = [key for key in golden if key.startswith("grad.")]
    assert len(stored) >= 6
    for key in stored:
        assert_close(gradients[key.removeprefix("grad.")], golden[key], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((3584, 28, 28, 4, 18944), 6.539e9), ((2048, 36, 16, 2, 11008), 2.779e9)],
)
def test_paper_sizes(sizes: tuple[int, ...], expected: float) -> None:
    hidden, layers, heads, keys, mlp = sizes
    config = Qwen2_5_VLTextConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
    )
    with torch.device("meta"):
        model = FrozenLanguageModel(Qwen2_5_VLTextModel(config))
    branch = VisionBranch.copy_of(model, tokens=256)
    count = sum(parameter.numel() for parameter in branch.parameters())
    assert count == pytest.approx(expected, abs=0.5e6)


def understanding_inputs() -> dict[str, Any]:
    """A prompt with an image of 4 merged tokens, as the processor would make it."""
    seeded = torch.Generator().manual_seed(3)
    ids = torch.tensor([[5, 6, VISION_START, *[IMAGE_ID] * 4, VISION_END, 7, 8, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_ID).int(),
        "pixel_values": torch.randn(16, 1176, generator=seeded),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def test_stock_model_stays_what_it_is_through_training() -> None:
    stock = vision_language_model()
    inputs = understanding_inputs()
    with torch.no_grad():
        logits = stock(**inputs).logits
    answer = stock.generate(**inputs, max_new_tokens=5, do_sample=False)
    weights, names = weights_digest(stock), list(dict(stock.named_parameters()))

    model = FrozenLanguageModel(stock)
    identity = model.identity
    branch = VisionBranch.copy_of(model, 16)
    text, (latents, mask) = encode_text(model, *captions((6, 4), 6)), batch(2)
    optimizer = torch.optim.AdamW(branch.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = latent_loss(predict(branch, model, latents, mask, text), latents, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (weights_digest(stock), list(dict(stock.named_parameters()))) == (weights, names)
    assert FrozenLanguageModel(stock).identity == identity
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, logits)
    assert torch.equal(stock.generate(**inputs, max_new_tokens=5, do_sample=False), answer)


def test_gradient_reaches_every_parameter_of_the_branch_and_none_of_the_model() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    latents, mask = batch(2)
    prediction = predict(branch, model, latents, mask, encode_text(model, *captions((6, 4), 6)))
    latent_loss(prediction, latents, mask).backward()
    for name, parameter in branch.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not list(model.parameters())


def assert_follows_release(model: FrozenLanguageModel, kind: PositionKind) -> None:
    branch = trained_branch(model, positions=kind)
    (ids, valid), (latents, mask) = captions((9, 5), 9), batch(2)
    with torch.no_grad():
        ours = predict(branch, model, latents, mask, encode_text(model, ids, valid))
        theirs = DualBranch(model, branch)(ids, valid.bool(), latents, mask)
    assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_padding_follow_the_released_computation(kind: PositionKind) -> None:
    assert_follows_release(FrozenLanguageModel(vision_language_model()), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_position_ids(kind: PositionKind) -> None:
    found = image_positions(kind, torch.tensor([7, 3]), 4, 3)[:, 0].tolist()
    expected = {
        "learned": [[0] * 4] * 3,
        "2drope": [[7] * 4, [7, 7, 8, 8], [7, 8, 7, 8]],
        "1drope": [[6, 7, 8, 9]] * 3,
        "separate_2drope": [[0] * 4, [0, 0, 1, 1], [0, 1, 0, 1]],
    }
    assert found == expected[kind]


@pytest.mark.parametrize("kind", ["learned", "1drope"])
@pytest.mark.parametrize(
    "stock",
    [
        lambda: llama(num_key_value_heads=4),
        lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=32),
        qwen2,
    ],
)
def test_plain_language_models(stock: Any, kind: PositionKind) -> None:  # noqa: ANN401
    assert_follows_release(FrozenLanguageModel(stock()), kind)


def test_an_item_does_not_depend_on_the_others() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    text, (latents, mask) = encode_text(model, *captions((9, 5, 2), 9)), batch(3)
    with torch.no_grad():
        together = predict(branch, model, latents, mask, text)
        for row in range(3):
            one = torch.tensor([row])
            alone = predict(branch, model, latents[one], mask[one], text.rows(one))
            assert_close(alone, together[one], atol=1e-5, rtol=1e-5)


def test_hidden_latents_do_not_matter_and_visible_ones_do() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    text, (latents, mask) = encode_text(model, *captions((6, 4), 6)), batch(2)
    with torch.no_grad():
        first = predict(branch, model, latents, mask, text)
        hidden = torch.where(mask[..., None], torch.nan, latents)
        assert torch.equal(predict(branch, model, hidden, mask, text), first)
        visible = torch.where(mask[..., None], latents, latents + 1)
        assert (predict(branch, model, visible, mask, text) - first).abs().max() > 0.01


def gradients(branch: VisionBranch, model: FrozenLanguageModel) -> dict[str, Tensor]:
    """Gradients of one step."""
    text, (latents, mask) = encode_text(model, *captions((6, 4), 6)), batch(2)
    branch.zero_grad()
    latent_loss(predict(branch, model, latents, mask, text), latents, mask).backward()
    return {name: p.grad.clone() for name, p in branch.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = FrozenLanguageModel(vision_language_model())
    plain, saving = trained_branch(model), trained_branch(model, checkpointing=True)
    expected, found = gradients(plain, model), gradients(saving, model)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", [torch.float32, torch.bfloat16])
def test_bfloat16_stays_near(model_type: torch.dtype) -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    (ids, valid), (latents, mask) = captions((6, 4), 6), batch(2)
    exact = predict(branch, model, latents, mask, encode_text(model, ids, valid))
    model.to(model_type)
    with torch.autocast("cpu", torch.bfloat16):
        rough = predict(branch, model, latents, mask, encode_text(model, ids, valid))
        loss = latent_loss(rough, latents, mask)
    assert rough.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in branch.parameters())


def test_copies_are_float32_whatever_the_model_is() -> None:
    model = FrozenLanguageModel(vision_language_model().to(torch.bfloat16))
    branch = VisionBranch.copy_of(model, 16)
    assert {p.dtype for p in branch.parameters()} == {torch.float32}
    own, original = branch.layers[1].mlp.up_proj.weight, model.layers[1].mlp.up_proj.weight
    assert torch.equal(own, original.float())


def test_sharded_branch_gives_the_same_gradients() -> None:
    model = FrozenLanguageModel(vision_language_model())
    expected = gradients(trained_branch(model), model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        branch = trained_branch(model, checkpointing=True)
        shard_branch(branch, init_device_mesh("cpu", (1,)))
        found = {k: v.full_tensor() for k, v in gradients(branch, model).items()}
    finally:
        dist.destroy_process_group()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert_close(found[name], value)


def test_learned_queries_read_no_latents() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model, queries="learned_2d")
    text, (latents, mask) = encode_text(model, *captions((6, 4), 6)), batch(2)
    first = predict(branch, model, latents, mask, text)
    assert torch.equal(predict(branch, model, latents + 1, ~mask, text), first)
    assert {name for name in branch.state_dict() if "layers" not in name} == {
        "positions",
        "norm.weight",
        "head.weight",
        "head.bias",
    }


def test_latents_of_another_width_are_projected() -> None:
    model = FrozenLanguageModel(llama())
    branch = trained_branch(model, latent_width=24)
    text, (latents, mask) = encode_text(model, *captions((6, 4), 6)), batch(2, width=24)
    prediction = predict(branch, model, latents, mask, text)
    assert prediction.shape == latents.shape
    latent_loss(prediction, latents, mask).backward()
    assert branch.input_projection is not None
    assert branch.input_projection.weight.grad.abs().max() > 0


def test_loss_on_masked_tokens_only() -> None:
    latents, mask = batch(3)
    prediction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))
    errors = (prediction - latents).square().mean(-1)
    assert_close(latent_loss(prediction, latents, mask), errors.mean())
    assert_close(latent_loss(prediction, latents, mask, "masked"), errors[mask].mean())
    assert latent_loss(prediction, latents, torch.zeros_like(mask), "masked") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens=0: must be >= 1"),
        ({"tokens": 15, "positions": "2drope"}, "tokens=15: must be a square"),
        ({"positions": "3drope"}, "positions='3drope': must be one of"),
        ({"queries": "none"}, "queries='none': must be masked or learned_2d"),
        ({"latent_width": 0}, "latent_width=0: must be >= 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    model = FrozenLanguageModel(vision_language_model())
    with pytest.raises(ValueError, match=message) as caught:
        VisionBranch.copy_of(model, **{"tokens": 16} | options)
    assert "\n" not in str(caught.value)


def test_two_dimensions_need_three_axes() -> None:
    with pytest.raises(ValueError, match=r"positions='2drope': .* 1 axis; use learned or 1drope"):
        VisionBranch.copy_of(FrozenLanguageModel(llama()), 16, positions="2drope")


def test_wrong_inputs_are_refused() -> None:
    model = FrozenLanguageModel(vision_language_model())
    branch = trained_branch(model)
    text, (latents, mask) = encode_text(model, *captions((6, 4), 6)), batch(2)
    with pytest.raises(ValueError, match=r"mask \(2, 16\) of torch.float32: expected"):
        predict(branch, model, latents, mask.float(), text)
    with pytest.raises(ValueError, match=r"latents \(1, 16, 64\)"):
        predict(branch, model, latents[:1], mask, text)
    other = encode_text(FrozenLanguageModel(llama(num_hidden_layers=3)), *captions((6, 4), 6))
    with pytest.raises(ValueError, match=r"text states of .* \(3, 2, 16\): the branch reads"):
        predict(branch, model, latents, mask, other)
    with pytest.raises(ValueError, match="loss_on='some'"):
        latent_loss(latents, latents, mask, "some")  # type: ignore[arg-type]
