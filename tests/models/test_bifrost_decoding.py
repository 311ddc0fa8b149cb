"""Decoding against the official loop, and beyond it with fewer steps than tokens."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from models.bifrost.branch import VisionBranch
from models.bifrost.decoding import (
    DecodingOptions,
    decode,
    guidance_weights,
    hidden_counts,
    written_counts,
)
from models.bifrost.generator import predict
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.masking import mask_first, random_orders
from models.bifrost.text_states import TextStates, encode_text, join_texts
from tests.models.bifrost_networks import (
    captions,
    golden_networks,
    read_case,
    trained_branch,
    vision_language_model,
)


@pytest.mark.parametrize("case", ["decode_n16_w1", "decode_n16_w3"])
def test_official_loop_is_matched_at_one_token_a_step(case: str) -> None:
    description, golden = read_case(case)
    config, near = description["config"], description["tolerance"]
    model, branch = golden_networks(config)
    length, orders = golden["text_embeds"].shape[1], golden["orders"]
    ids = golden["input_ids"][:, :length]
    text = encode_text(model, ids, ids != config["pad_id"])
    empty, given = text.rows(torch.arange(2)), text.rows(torch.arange(2, 4))
    hidden = torch.ones(4, 16, dtype=torch.bool)
    with torch.no_grad():
        first = predict(branch, model, torch.zeros(4, 16, 64), hidden, text)
    assert_close(first, golden["expected_pred_step0"], **near)
    options = DecodingOptions(16, config["cfg_weight"], ramp=False)
    latents = decode(branch, model, given, options, empty_text=empty, orders=orders)
    assert_close(latents, golden["expected_tokens"], **near)


@pytest.mark.parametrize(
    ("tokens", "steps", "first", "last"),
    [
        (256, 16, [2, 3, 7, 8, 11, 13], 25),
        (256, 8, [5, 15, 24, 31, 39, 45, 48], 49),
        (256, 1, [], 256),
        (16, 16, [1] * 15, 1),
    ],
)
def test_cosine_schedule(tokens: int, steps: int, first: list[int], last: int) -> None:
    written = written_counts(tokens, steps)
    assert written[: len(first)] == first
    assert written[-1] == last


@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 49, 256])
def test_every_step_writes_a_token(tokens: int) -> None:
    for steps in range(1, tokens + 1):
        written = written_counts(tokens, steps)
        assert len(written) == steps
        assert min(written) >= 1
        assert sum(written) == tokens
        assert hidden_counts(tokens, steps)[-1] == 0


def test_guidance_rises_with_the_written_share() -> None:
    weights = guidance_weights(16, DecodingOptions(4, 5.0))
    counts = hidden_counts(16, 4)
    assert weights[:3] == pytest.approx([1 + 4 * (16 - count) / 16 for count in counts[:3]])
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(1 + 4 * 15 / 16)
    assert guidance_weights(16, DecodingOptions(4, 5.0, ramp=False)) == [5.0] * 4


def networks() -> tuple[FrozenLanguageModel, VisionBranch, TextStates, TextStates]:
    """A model, its branch, three texts and the empty one."""
    model = FrozenLanguageModel(vision_language_model())
    text = encode_text(model, *captions((7, 4, 6), 7))
    return model, trained_branch(model), text, encode_text(model, *captions((2,), 2, seed=4))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3, 7, 16])
@torch.no_grad()
def test_kept_text_changes_nothing(steps: int, guidance: float) -> None:
    """The loop written plainly, all texts read anew in every step, bit for bit."""
    model, branch, text, empty = networks()
    options = DecodingOptions(steps, guidance)
    orders = random_orders(3, 16, torch.Generator().manual_seed(1))
    latents, hidden = torch.zeros(3, 16, 64), torch.ones(3, 16, dtype=torch.bool)
    weights = guidance_weights(16, options)
    for count, weight in zip(hidden_counts(16, steps), weights, strict=True):
        again = encode_text(model, *captions((7, 4, 6), 7))
        if guidance == 1:
            guess = predict(branch, model, latents, hidden, again)
        else:
            nothing = encode_text(model, *captions((2,), 2, seed=4)).repeat(3)
            both = join_texts([nothing, again])
            twice = latents.repeat(2, 1, 1), hidden.repeat(2, 1)
            plain, guess = predict(branch, model, *twice, both).chunk(2)
            guess = plain + weight * (guess - plain)
        still = mask_first(orders, count)
        latents = torch.where((hidden & ~still)[..., None], guess, latents)
        hidden = still
    found = decode(branch, model, text, options, empty_text=empty, orders=orders)
    assert torch.equal(found, latents)


def test_an_item_is_decoded_alone_as_in_a_batch() -> None:
    model, branch, text, empty = networks()
    options, orders = DecodingOptions(3, 2.0), random_orders(3, 16, torch.Generator())
    together = decode(branch, model, text, options, empty_text=empty, orders=orders)
    for row in range(3):
        one = torch.tensor([row])
        alone = decode(branch, model, text.rows(one), options, empty_text=empty, orders=orders[one])
        assert_close(alone, together[one], atol=1e-4, rtol=1e-4)


def test_guidance_of_one_needs_no_empty_text() -> None:
    model, branch, text, empty = networks()
    orders = random_orders(3, 16, torch.Generator().manual_seed(1))
    without = decode(branch, model, text, DecodingOptions(4), orders=orders)
    near = DecodingOptions(4, 1 + 1e-7, ramp=False)
    assert_close(
        without,
        decode(branch, model, text, near, empty_text=empty, orders=orders),
        atol=1e-4,
        rtol=1e-4,
    )


def test_drawn_orders_are_decided_by_the_generator() -> None:
    model, branch, text, _ = networks()

    def drawn(seed: int) -> Tensor:
        seeded = torch.Generator().manual_seed(seed)
        return decode(branch, model, text, DecodingOptions(4), generator=seeded)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


class Scripted(VisionBranch):
    """A branch whose predictions are given, one for each step; notes what it is shown."""

    def __init__(self, branch: VisionBranch, script: list[Tensor]) -> None:
        super().__init__(branch.shape, branch.tokens)
        self.script, self.shown = script, []

    def forward(self, latents: Tensor, mask: Tensor, *_: Any) -> Tensor:  # noqa: ANN401
        self.shown.append(mask.clone())
        return self.script[len(self.shown) - 1]


@pytest.mark.parametrize("confidence", ["change", "energy"])
def test_surest_tokens_are_written_first(confidence: Literal["change", "energy"]) -> None:
    model, branch, text, _ = networks()
    one = text.rows(torch.tensor([0]))
    size = torch.arange(1.0, 17)[None, :, None].expand(1, 16, 64)
    # By energy the last token is surest; by change, the second prediction of the first is nearest.
    scripted = Scripted(branch, [size, 2 * size, 3 * size])
    options = DecodingOptions(3, order="confidence", confidence=confidence)
    orders = random_orders(1, 16, torch.Generator().manual_seed(3))
    latents = decode(scripted, model, one, options, orders=orders)
    counts = hidden_counts(16, 3)
    after_one, after_two = scripted.shown[1][0], (latents[0, :, 0] == 3 * size[0, :, 0])
    assert after_one.sum() == counts[0]
    assert after_two.sum() == counts[1]
    if confidence == "energy":
        assert after_one.nonzero().flatten().tolist() == list(range(counts[0]))
        assert after_two.nonzero().flatten().tolist() == list(range(counts[1]))
    else:
        assert torch.equal(after_one[None], mask_first(orders, counts[0]))
        left = after_one.nonzero().flatten()
        assert torch.equal(after_two.nonzero().flatten(), left[-counts[1] :])


def test_a_confident_order_of_a_branch_is_finite_and_whole() -> None:
    model, branch, text, empty = networks()
    for confidence in ("change", "energy"):
        options = DecodingOptions(5, 2.0, "confidence", confidence=confidence)
        seeded = torch.Generator().manual_seed(0)
        latents = decode(branch, model, text, options, empty_text=empty, generator=seeded)
        assert latents.isfinite().all()
        assert latents.abs().amin(-1).max() > 0


def test_wrong_options_are_refused() -> None:
    model, branch, text, empty = networks()
    orders = random_orders(3, 16, torch.Generator())
    with pytest.raises(ValueError, match="steps=17: must be from 1 to 16"):
        decode(branch, model, text, DecodingOptions(17), orders=orders)
    with pytest.raises(ValueError, match="empty_text=None: guidance needs it"):
        decode(branch, model, text, DecodingOptions(2, 3.0), orders=orders)
    twice = empty.repeat(2)
    with pytest.raises(ValueError, match="empty_text=2 items: guidance needs it for 1 or 3"):
        decode(branch, model, text, DecodingOptions(2, 3.0), empty_text=twice, orders=orders)
    with pytest.raises(ValueError, match="orders=None, generator=None"):
        decode(branch, model, text, DecodingOptions(2))
    with pytest.raises(ValueError, match="expected 3 permutations of 16 tokens"):
        decode(branch, model, text, DecodingOptions(2), orders=orders.clamp(max=3))
    with pytest.raises(ValueError, match="steps=0"):
        DecodingOptions(0)
    with pytest.raises(ValueError, match="guidance=-1"):
        DecodingOptions(guidance=-1)
    with pytest.raises(ValueError, match="order='raster'"):
        DecodingOptions(order="raster")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence='luck'"):
        DecodingOptions(confidence="luck")  # type: ignore[arg-type]
    learned = VisionBranch.copy_of(model, 16, queries="learned_2d")
    with pytest.raises(ValueError, match="learned queries read no latents; use steps=1"):
        decode(learned, model, text, DecodingOptions(2), orders=orders)
