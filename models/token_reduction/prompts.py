"""Prompts of a vision-language model, shortened to the image tokens that were kept.

The caller passes the processor's full ``input_ids``; a hook before the model's ``forward`` drops
the placeholders of dropped tokens, and what belongs to them in the attention mask, positions and
labels. A cache filled with a shortened prompt is remembered: later calls with it may go on as if
nothing had been dropped, which is what ``generate`` does.

Letters: B prompts, T tokens of a full prompt, S tokens of a shortened one, Q new tokens.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Positions = Literal["compact", "original"]
IGNORED_LABEL = -100


class ShortPrompt(NamedTuple):
    """How a batch of prompts was shortened.

    Attributes:
        order: (B, S) int64 place in the full prompt of each remaining token.
        mask: (B, S) bool, False for padding.
        full_length: T.
        next_full: (..., B) position that follows the prompt, before anything is dropped.
        next_short: Same shape, position of the next token now.
    """

    order: Tensor
    mask: Tensor
    full_length: int
    next_full: Tensor
    next_short: Tensor

    def take(self, x: Tensor, fill: int) -> Tensor:
        """Remaining columns of x (..., B, T), padding filled."""
        order = self.order.expand(*x.shape[:-1], -1)
        return x.gather(-1, order).masked_fill(~self.mask, fill)


def shorten(
    keep: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    positions: Positions,
) -> tuple[ShortPrompt, Tensor]:
    """Drop tokens of each prompt and pad the rest to a common length.

    Padding goes where the given mask has it; to the left, as generation needs, if there is none.

    Args:
        keep: (B, T) bool.
        attention_mask: (B, T), zero for padding.
        position_ids: (..., B or 1, T) positions in the full prompt; None counts valid tokens.
        positions: "compact" numbers the remaining tokens anew, "original" leaves the gaps.

    Returns:
        The shortened prompt and its positions (..., B, S), 0 at padding.
    """
    valid = keep if attention_mask is None else keep & attention_mask.bool()
    every = torch.ones_like(keep) if attention_mask is None else attention_mask.bool()
    length = int(valid.sum(1).max())
    if bool(every[:, -1].all()):  # padded left or not at all
        order = valid.long().argsort(dim=1, stable=True)[:, -length:]
    else:
        order = (~valid).long().argsort(dim=1, stable=True)[:, :length]
    mask = valid.gather(1, order)
    if position_ids is None:
        position_ids = every.cumsum(1) - 1
    full = position_ids.expand(*position_ids.shape[:-2], *keep.shape)
    next_full = full.masked_fill(~every, -1).amax(-1) + 1  # (..., B)
    counted = (mask.cumsum(1) - 1).masked_fill(~mask, 0)
    if positions == "compact":
        prompt = ShortPrompt(order, mask, keep.shape[1], next_full, mask.sum(1))
        return prompt, counted
    prompt = ShortPrompt(order, mask, keep.shape[1], next_full, next_full)
    return prompt, prompt.take(full, 0)


class PromptShortener:
    """Shortens the arguments of ``forward`` of one model, and of the calls that go on from them.

    Args:
        placeholder: Id of the image token.
        padding: Id that stands at padding.
        positions: Numbering of the remaining tokens.
    """

    def __init__(self, placeholder: int, padding: int, positions: Positions) -> None:
        self.placeholder, self.padding, self.positions = placeholder, padding, positions

    def first(self, call: dict[str, Any], kept: Tensor) -> ShortPrompt | None:
        """Shorten a call with images, in place.

        Args:
            call: Arguments of ``forward`` by name.
            kept: Bool for every image placeholder of ``input_ids``, row after row.

        Returns:
            How; None if nothing is dropped, the call then stays as it is.
        """
        _check_placeholders(call.get("input_ids"), self.placeholder, len(kept))
        if bool(kept.all()):
            return None
        _check_moved(call)
        ids, mask = call["input_ids"], call.get("attention_mask")
        keep = torch.ones_like(ids, dtype=torch.bool)
        keep[ids == self.placeholder] = kept.to(keep.device)
        prompt, position_ids = shorten(keep, mask, call.get("position_ids"), self.positions)
        fills = {"input_ids": self.padding, "attention_mask": 0, "labels": IGNORED_LABEL}
        fills |= {"token_type_ids": 0, "mm_token_type_ids": 0}
        for name, fill in fills.items():
            if call.get(name) is not None:
                call[name] = prompt.take(call[name], fill)
        if mask is None and (self.positions == "original" or not bool(prompt.mask.all())):
            # Without a mask the library takes gaps for the borders of packed prompts.
            call["attention_mask"] = prompt.mask.long()
        call["position_ids"] = position_ids
        return prompt

    def following(self, call: dict[str, Any], prompt: ShortPrompt, past: int) -> None:
        """Fit a call that goes on from a shortened prompt to its cache, in place.

        Args:
            call: Arguments of ``forward`` by name, as they would be if nothing had been dropped.
            prompt: How the prompt in the cache was shortened.
            past: Tokens in the cache.
        """
        given = call.get("input_ids")
        given = call["inputs_embeds"] if given is None else given
        grown, new = past - prompt.mask.shape[1], given.shape[1]
        mask = call.get("attention_mask")
        if mask is None:
            recent = prompt.mask.new_ones(len(given), grown + new).long()
        else:
            _check_mask(mask, prompt.full_length + grown + new)
            recent = mask[:, prompt.full_length :]
        ages = recent.bool().long().cumsum(1)[:, -new:] - 1  # (B, Q)
        position_ids = call.get("position_ids")
        if position_ids is not None:
            expected = prompt.next_full[..., None] + ages  # (..., B, Q)
            if not bool((position_ids == expected).all()):
                raise ValueError(
                    f"position_ids from {int(position_ids.min())}: expected "
                    f"{int(expected.min())}, the place after the cached tokens; "
                    "give the new tokens alone, with their positions in the full prompt or none"
                )
        if mask is not None or not bool(prompt.mask.all()):
            call["attention_mask"] = torch.cat([prompt.mask.to(recent.dtype), recent], 1)
        call["position_ids"] = prompt.next_short[..., None] + ages


def _check_placeholders(ids: Tensor | None, placeholder: int, packed: int) -> None:
    """Refuse prompts that do not hold a placeholder for each packed token."""
    if ids is None:
        raise ValueError("input_ids=None: needed to find the image placeholders; do not embed")
    count = int((ids == placeholder).sum())
    if count != packed:
        raise ValueError(
            f"input_ids: {count} image placeholders for {packed} packed image tokens; "
            "pass the processor's full input_ids"
        )


def _check_moved(call: dict[str, Any]) -> None:
    """Refuse arguments whose places cannot follow the shortened prompt."""
    if call.get("attention_mask") is not None:
        _check_mask(call["attention_mask"], call["input_ids"].shape[1])
    if isinstance(call.get("logits_to_keep"), Tensor):
        raise ValueError("logits_to_keep: must be a number of last tokens, places move")


def _check_mask(mask: Tensor, length: int) -> None:
    """Refuse an attention mask that is not (B, length)."""
    if mask.ndim != 2 or mask.shape[1] != length:
        raise ValueError(
            f"attention_mask of {tuple(mask.shape)}: expected (B, {length}), as for the full "
            "prompt; use a dynamic cache, and pass only new tokens with a cache"
        )
