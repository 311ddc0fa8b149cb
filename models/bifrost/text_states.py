"""Keys and values of the text part, which image tokens read and never influence.

Text is causal and precedes the image, and its model is frozen: it is read once, without gradient,
and serves every decoding step and every epoch. Letters: L layers, B items, G key heads, T text
tokens (left padded), E channels of a head, D hidden width, N image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.bifrost.language_model import FrozenLanguageModel
from models.bifrost.packed_text import PackedReader


@dataclass(frozen=True)
class TextStates:
    """What image tokens read of a batch of texts.

    Attributes:
        keys: (L, B, G, T, E), rotated to their positions; 0 at padding.
        values: (L, B, G, T, E); 0 at padding.
        valid: (B, T) bool, False at padding, which is on the left.
        hidden: (B, T, D) states behind the final norm; 0 at padding.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        """Items B."""
        return len(self.valid)

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens without padding."""
        return self.valid.sum(1)

    def key_mask(self, tokens: int) -> Tensor | None:
        """(B, 1, 1, T + N) bool: the keys that image tokens read; None if they read all."""
        if bool(self.valid.all()):
            return None
        return F.pad(self.valid, (0, tokens), value=True)[:, None, None]

    def rows(self, index: Tensor) -> TextStates:
        """The states of some items, in the order of ``index`` (M,); common padding is left out."""
        valid = self.valid[index]
        start = _common_padding(valid)
        return TextStates(
            self.keys[:, index, :, start:],
            self.values[:, index, :, start:],
            valid[:, start:],
            self.hidden[index, start:],
        )

    def repeat(self, times: int) -> TextStates:
        """Every item ``times`` times in succession."""
        every = torch.arange(len(self), device=self.valid.device).repeat_interleave(times)
        return self.rows(every)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextStates:
        """On another device, numbers in another type."""
        return TextStates(
            self.keys.to(device, dtype),
            self.values.to(device, dtype),
            self.valid.to(device),
            self.hidden.to(device, dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name, whole and contiguous, for a cache file."""
        fields = {"keys": self.keys, "values": self.values, "hidden": self.hidden}
        return {k: v.contiguous() for k, v in (fields | {"valid": self.valid}).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of ``tensors``.

        Raises:
            ValueError: A field is missing, or the shapes contradict each other.
        """
        names = ("keys", "values", "valid", "hidden")
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"text states: {missing[0]} is missing; compute them again")
        states = cls(*(tensors[name] for name in names))
        items, length = states.valid.shape if states.valid.ndim == 2 else (-1, -1)
        sound = states.keys.ndim == 5 and states.hidden.shape[:2] == (items, length)
        sound = sound and states.keys.shape == states.values.shape
        if not sound or (states.keys.shape[1], states.keys.shape[3]) != (items, length):
            raise ValueError(
                f"text states: keys {tuple(states.keys.shape)} do not fit valid "
                f"{tuple(states.valid.shape)}; compute them again"
            )
        return states


def join_texts(parts: Sequence[TextStates]) -> TextStates:
    """One batch of several, padded on the left to the longest.

    Raises:
        ValueError: There are none.
    """
    if not parts:
        raise ValueError("parts=[]: expected at least one batch of text states")
    length = max(part.valid.shape[1] for part in parts)
    short = [length - part.valid.shape[1] for part in parts]
    pairs = list(zip(parts, short, strict=True))
    return TextStates(
        torch.cat([F.pad(part.keys, (0, 0, pad, 0)) for part, pad in pairs], 1),
        torch.cat([F.pad(part.values, (0, 0, pad, 0)) for part, pad in pairs], 1),
        torch.cat([F.pad(part.valid, (pad, 0)) for part, pad in pairs]),
        torch.cat([F.pad(part.hidden, (0, 0, pad, 0)) for part, pad in pairs]),
    )


@torch.no_grad()
def encode_text(
    language_model: FrozenLanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    states: bool = True,
) -> TextStates:
    """Read texts with the stock model's layers.

    Args:
        language_model: Frozen.
        input_ids: (B, T) int64, padded on the left; ids at padding are arbitrary.
        attention_mask: (B, T), 1 or True at tokens, 0 or False at padding.
        states: Whether the hidden states are wanted too. The branch reads none; without them
            ``hidden`` is (B, T, 0), and most of the last layer is saved.

    Returns:
        States without the padding that all items share: its amount changes nothing.

    Raises:
        ValueError: Shapes differ, or there is padding behind a token.
    """
    valid = attention_mask.bool()
    if input_ids.ndim != 2 or input_ids.shape != valid.shape or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)}, attention_mask {tuple(valid.shape)}: "
            "expected the same (B, T), at least one token"
        )
    if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise ValueError("attention_mask: padding behind a token; pad on the left")
    start = _common_padding(valid)
    ids, valid = input_ids[:, start:], valid[:, start:]
    reader = PackedReader(language_model, valid)
    packed = language_model.embed(ids[valid])  # (M, D)
    keys, values = [], []
    for number, layer in enumerate(language_model.layers, 1):
        wanted = states or number < len(language_model.layers)
        packed, key, value = reader.read(layer, packed, wanted)
        keys.append(key)
        values.append(value)
    packed = language_model.norm(packed) if states else packed[:, :0]
    return TextStates(torch.stack(keys), torch.stack(values), valid, reader.spread(packed))


def _common_padding(valid: Tensor) -> int:
    """Leading columns of (B, T) that are padding in every row; one column is always kept."""
    used = valid.any(0)
    used[-1] = True
    return int(used.long().argmax())
