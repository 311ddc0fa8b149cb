"""Hooks that let ``forward`` and ``generate`` of a vision-language model run on fewer image tokens.

The model's own ``get_image_features`` is called with its own arguments, by ``generate`` before the
prompt is expanded to beams, or by the hook before ``forward``. What it returns stands in for each
image: a tensor of the image's full number of rows with one channel. It goes through the library's
bookkeeping as the features would, and code that would read it as features fails at once. The hook
swaps it for the kept features and shortens the prompt to match.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from models.token_reduction.packing import PackedImage
from models.token_reduction.prompts import PromptShortener, ShortPrompt

Method = Callable[..., object]
Cached = tuple[object, ...] | ModelOutput
Positioned = Callable[[dict[str, Any]], None]


def _as_given(call: dict[str, Any]) -> None:
    """Leave the positions of a call."""


class ShortGeneration:
    """Shortens every call of one model that has images, and those that go on from its caches.

    Args:
        model: A model for conditional generation that takes ``mm_encoder_outputs``.
        shortener: Shortens the arguments.
        position: Completes the arguments of a call before it is shortened, in place, where
            positions are more than counted tokens.

    Raises:
        ValueError: If the installed transformers does not know ``mm_encoder_outputs``.
    """

    def __init__(
        self, model: PreTrainedModel, shortener: PromptShortener, position: Positioned = _as_given
    ) -> None:
        self._names = list(signature(cast("Method", model.forward)).parameters)
        if "mm_encoder_outputs" not in self._names:
            raise ValueError(
                f"{type(model).__name__}.forward: does not take mm_encoder_outputs; "
                "install transformers>=5.24"
            )
        self._shortener, self._position = shortener, position
        self._base: Any = model.base_model
        encoder = signature(cast("Method", self._base.get_image_features)).parameters
        # Not vision_aspect_ratio: OneVision's own forward does not hand it on either.
        self._encoder_names = set(encoder) - {"kwargs", "pixel_values", "vision_aspect_ratio"}
        self._images = WeakTensorKeyDictionary()  # stand-in: PackedImage
        self._prompts: WeakKeyDictionary[Cache, ShortPrompt] = WeakKeyDictionary()
        self._pending: ShortPrompt | None = None

    def stand_in(self, image: PackedImage) -> Tensor:
        """What ``get_image_features`` is to return for an image: (N, 1)."""
        blank = image.features.new_zeros(len(image.source), 1)
        self._images[blank] = image
        return blank

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Shorten the arguments of ``forward``; a pre-hook with keywords."""
        call = dict(zip(self._names, args, strict=False)) | kwargs
        cache = call.get("cache", call.get("past_key_values"))
        past = 0 if cache is None else int(cache.get_seq_length())
        self._pending = None
        if cache is not None and past == 0:
            self._prompts.pop(cache, None)  # emptied since
        images = self._take_images(call)
        if images is not None:
            if past:
                raise ValueError(
                    f"images after {past} cached tokens: not supported; pass the whole prompt anew"
                )
            self._position(call)
            self._pending = self._shortener.first(call, torch.cat([i.keep for i in images]))
        elif cache is not None and cache in self._prompts:
            self._position(call)
            self._shortener.following(call, self._prompts[cache], past)
        return (), call

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Cached) -> None:
        """Remember the cache that a shortened prompt went into; a forward hook."""
        if self._pending is None:
            return
        for value in output if isinstance(output, tuple) else output.values():
            if isinstance(value, Cache):
                self._prompts[value] = self._pending
        self._pending = None

    def _take_images(self, call: dict[str, Any]) -> list[PackedImage] | None:
        """Swap the images of a call for their kept features; None if it has no images."""
        outputs = dict(call.get("mm_encoder_outputs") or {})
        if call.get("pixel_values") is not None:
            if outputs:
                raise ValueError("pixel_values and mm_encoder_outputs: pass one of them")
            names = {name: call[name] for name in self._encoder_names if name in call}
            outputs["image"] = self._base.get_image_features(
                call["pixel_values"], return_dict=True, **names
            )
            call["pixel_values"] = None
        encoded = outputs.get("image")
        if encoded is None:
            return None
        images = [self._packed(stand_in) for stand_in in encoded.pooler_output]
        features = [image.features for image in images]
        outputs["image"] = type(encoded)(**{**encoded, "pooler_output": features})
        call["mm_encoder_outputs"] = outputs
        return images

    def _packed(self, stand_in: Tensor) -> PackedImage:
        """The image that a tensor stands in for."""
        if stand_in not in self._images:
            raise ValueError(
                f"image features of {tuple(stand_in.shape)}: not made inside this context; "
                "pass pixel_values, and generate without prefill_chunk_size"
            )
        return cast("PackedImage", self._images[stand_in])


def padding_id(config: PreTrainedConfig, *taken: int | None) -> int:
    """Id for padding: the configuration's, or the first one that stands for no image or video."""
    known = (getattr(c, "pad_token_id", None) for c in (config, config.get_text_config()))
    candidates: list[int | None] = [*known, *range(len(taken) + 1)]
    return next(i for i in candidates if i is not None and i not in taken)
