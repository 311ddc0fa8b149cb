"""Masked-autoregressive decoding of latents (arXiv 2508.05954, section 3).

All tokens start hidden; each of K steps predicts all hidden ones and writes some, ever more by a
cosine. With K = N and without guidance this is the released decoder. Two of its defects are
mended: it cannot take fewer steps than tokens, and it computes but never uses guidance that rises.
Letters: B items, N image tokens, C latent width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import cos, floor, pi
from typing import Literal

import torch
from torch import Tensor

from models.bifrost.branch import VisionBranch
from models.bifrost.branch_layer import Rotation
from models.bifrost.generator import image_rotation
from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.masking import mask_first, random_orders
from models.bifrost.text_states import TextStates, join_texts


@dataclass(frozen=True)
class DecodingOptions:
    """How latents are decoded.

    The paper decodes in random order. The two orders by confidence are this project's: latents
    are continuous, so there is no probability to sort by.

    Attributes:
        steps: K, from 1 to N.
        guidance: Weight w of the text against the empty text; 1 is without, and costs half.
        order: "random", or "confidence": the surest tokens are written first.
        ramp: Whether the weight rises from 1 to w with the share of tokens written, as the release
            meant it; else it is w throughout.
        confidence: "change": sure is a token whose prediction moved least since the last step, the
            first step being random. "energy": sure is a prediction of large norm; a mean over the
            possible latents is the shorter the more they differ, provided that latents have about
            one norm (standardised or layer-normed ones).
    """

    steps: int = 16
    guidance: float = 1.0
    order: Literal["random", "confidence"] = "random"
    ramp: bool = True
    confidence: Literal["change", "energy"] = "change"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be >= 1")
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance={self.guidance}: must be a number >= 0; 1 is without")
        if self.order not in ("random", "confidence"):
            raise ValueError(f"order={self.order!r}: must be random or confidence")
        if self.confidence not in ("change", "energy"):
            raise ValueError(f"confidence={self.confidence!r}: must be change or energy")


def hidden_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens are still hidden after each of K steps: falls strictly, 0 at the end.

    Raises:
        ValueError: There are more steps than tokens.
    """
    if not 1 <= steps <= tokens:
        raise ValueError(
            f"steps={steps}: must be from 1 to {tokens}, each step writes at least one token"
        )
    counts, before = [], tokens
    for step in range(1, steps):
        before = max(1, min(before - 1, floor(tokens * cos(pi / 2 * step / steps))))
        counts.append(before)
    return [*counts, 0]


def written_counts(tokens: int, steps: int) -> list[int]:
    """How many tokens each step writes."""
    counts = [tokens, *hidden_counts(tokens, steps)]
    return [before - after for before, after in pairwise(counts)]


def guidance_weights(tokens: int, options: DecodingOptions) -> list[float]:
    """The weight of every step.

    The ramp counts the tokens written when the step is done, of which the last step leaves out
    one, as released.
    """
    counts = hidden_counts(tokens, options.steps)
    if not options.ramp:
        return [options.guidance] * len(counts)
    rise = options.guidance - 1
    return [1 + rise * (tokens - max(1, count)) / tokens for count in counts]


@torch.no_grad()
def decode(
    branch: VisionBranch,
    language_model: FrozenLanguageModel,
    text: TextStates,
    options: DecodingOptions,
    *,
    empty_text: TextStates | None = None,
    orders: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Latents (B, N, C) float32 of B texts.

    Args:
        branch: Trained.
        language_model: That the branch was copied from.
        text: States of B texts, used in every step.
        options: Steps, guidance, order.
        empty_text: States of the prompt with an empty caption, for 1 or B items; needed with
            guidance other than 1.
        orders: (B, N) permutations; the last token of a row is written first. None draws them.
        generator: Of the CPU, for drawn orders.

    Raises:
        ValueError: K > N, something needed is missing, or orders are no permutations.
    """
    items, tokens = len(text), branch.tokens
    if branch.queries == "learned_2d" and options.steps != 1:
        raise ValueError(f"steps={options.steps}: learned queries read no latents; use steps=1")
    counts, weights = hidden_counts(tokens, options.steps), guidance_weights(tokens, options)
    device = branch.head.weight.device
    orders = _checked_orders(orders, items, tokens, generator).to(device)
    guided = options.guidance != 1
    states = join_texts([_matched(empty_text, text), text]) if guided else text
    rotation = image_rotation(branch, language_model, states)
    latents = torch.zeros(items, tokens, branch.latent_width, device=device)
    mask = torch.ones(items, tokens, dtype=torch.bool, device=device)
    ranking = _Ranking(options, orders)
    for count, weight in zip(counts, weights, strict=True):
        prediction = _guess(branch, latents, mask, states, rotation, weight if guided else None)
        still = ranking.hide(prediction, mask, count)
        written = mask & ~still
        latents = torch.where(written[..., None], prediction, latents)
        mask = still
    return latents


def _guess(
    branch: VisionBranch,
    latents: Tensor,
    mask: Tensor,
    states: TextStates,
    rotation: Rotation | None,
    weight: float | None,
) -> Tensor:
    """Float32 prediction (B, N, C); with a weight, ``states`` hold the empty texts first."""
    if weight is None:
        return branch(latents, mask, states, rotation).float()  # type: ignore[no-any-return]
    both: Tensor = branch(latents.repeat(2, 1, 1), mask.repeat(2, 1), states, rotation)
    without, given = both.float().chunk(2)
    return without + weight * (given - without)


class _Ranking:
    """Which tokens stay hidden after a step."""

    def __init__(self, options: DecodingOptions, orders: Tensor) -> None:
        self.options, self.orders = options, orders
        self.last: Tensor | None = None

    def hide(self, prediction: Tensor, mask: Tensor, count: int) -> Tensor:
        """(B, N) bool: the ``count`` tokens of each item that stay hidden, among hidden ones."""
        if self.options.order == "random":
            return mask_first(self.orders, count)
        if self.options.confidence == "energy":
            doubt = -prediction.square().mean(-1)
        elif self.last is None:
            self.last = prediction
            return mask_first(self.orders, count)
        else:
            doubt = (prediction - self.last).square().mean(-1)
        self.last = prediction
        # Written tokens come last; equal doubts keep the random order.
        doubt = doubt.masked_fill(~mask, -torch.inf).gather(1, self.orders)
        ranks = doubt.argsort(dim=1, descending=True, stable=True)
        return mask_first(self.orders.gather(1, ranks), count)


def _matched(empty_text: TextStates | None, text: TextStates) -> TextStates:
    """The empty text once for every item."""
    if empty_text is None or len(empty_text) not in (1, len(text)):
        found = "None" if empty_text is None else f"{len(empty_text)} items"
        raise ValueError(f"empty_text={found}: guidance needs it for 1 or {len(text)} items")
    return empty_text if len(empty_text) == len(text) else empty_text.repeat(len(text))


def _checked_orders(
    orders: Tensor | None, items: int, tokens: int, generator: torch.Generator | None
) -> Tensor:
    """Given orders, or new ones."""
    if orders is None:
        if generator is None:
            raise ValueError("orders=None, generator=None: give the orders or a generator")
        return random_orders(items, tokens, generator)
    every = torch.arange(tokens, device=orders.device).expand(items, -1)
    if orders.shape != (items, tokens) or not torch.equal(orders.sort(1).values, every):
        raise ValueError(
            f"orders {tuple(orders.shape)}: expected {items} permutations of {tokens} tokens"
        )
    return orders
