"""Fewer image tokens for Qwen2.5-VL.

Its merger, which joins 2 x 2 patches and projects them, is part of the vision tower. Tokens are
therefore chosen among the merged ones, on the merged grid and in the width of the language model;
the merger's work is not saved. Kept tokens keep their own time, row and column (M-RoPE), and the
text keeps its positions behind the full image.

Letters: L merged tokens of an image, D channels of the language model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from models.token_reduction.attaching import Reduce, check_selection, shadow_method
from models.token_reduction.generation import ShortGeneration, padding_id
from models.token_reduction.packing import PackedImage
from models.token_reduction.prompts import PromptShortener

_POSITIONED_BY = (
    "input_ids",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "inputs_embeds",
    "attention_mask",
    "cache",
    "mm_token_type_ids",
)


class QwenReduction:
    """What a reduced Qwen2.5-VL did with the images of its last call.

    Attributes:
        images: Selection and kept features of each image, in the order of the prompts.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, reduce: Reduce) -> None:
        self.images: list[PackedImage] = []
        self._model, self._reduce = model, reduce
        self._base: Any = model.model
        config = model.config
        padding = padding_id(config, config.image_token_id, config.video_token_id)
        shortener = PromptShortener(config.image_token_id, padding, "original")
        self._generation = ShortGeneration(model, shortener, self._position)
        self._encode = self._base.get_image_features

    @property
    def kept_counts(self) -> list[int]:
        """Image tokens that the language model reads of each image."""
        return [image.tokens for image in self.images]

    def _attach(self, stack: ExitStack) -> None:
        """Hook into the model until the stack is closed."""
        generation = self._generation
        for handle in (
            self._model.register_forward_pre_hook(generation.before_forward, with_kwargs=True),
            self._model.register_forward_hook(generation.after_forward),
        ):
            stack.callback(handle.remove)
        stack.enter_context(shadow_method(self._base, "get_image_features", self._encode_images))

    def _encode_images(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **options: object
    ) -> object:
        """``get_image_features`` with a stand-in for each image; see ``ShortGeneration``."""
        encoded = self._encode(pixel_values, image_grid_thw, **{**options, "return_dict": True})
        merge = self._base.visual.spatial_merge_size
        self.images = [
            self._choose(tokens, (int(rows) // merge, int(columns) // merge))
            for tokens, (_, rows, columns) in zip(
                encoded.pooler_output, image_grid_thw.tolist(), strict=True
            )
        ]
        encoded.pooler_output = [self._generation.stand_in(image) for image in self.images]
        return encoded

    def _choose(self, tokens: Tensor, grid: tuple[int, int]) -> PackedImage:
        """Keep some of the tokens (L, D) of an image."""
        selection = check_selection(self._reduce(tokens[None], grid), tokens[None])
        source = torch.arange(len(tokens), device=tokens.device)
        keep = selection.mask[0]
        return PackedImage(source, keep, selection.mask, selection.scores, tokens[keep])

    def _position(self, call: dict[str, Any]) -> None:
        """Give a call positions (3, B, T) of time, row and column, as the model itself would."""
        given = call.get("position_ids")
        if given is None and call.get("mm_encoder_outputs"):
            known = {name: call.get(name) for name in _POSITIONED_BY}
            call["position_ids"] = self._base.compute_3d_position_ids(**known)
        elif given is not None and given.ndim == 3 and len(given) == 4:
            call["position_ids"] = given[1:]  # the first plane counts text, for packed prompts


@contextmanager
def reduced_qwen(
    model: Qwen2_5_VLForConditionalGeneration, reduce: Reduce
) -> Iterator[QwenReduction]:
    """Let a Qwen2.5-VL read fewer tokens of its images, inside the context; videos stay whole.

    Inputs stay those of the processor, with ``mm_token_type_ids``. As ``reduced_llava`` otherwise:
    prompts, masks and labels are shortened, caches go on as if nothing had been dropped.

    Args:
        model: The stock class, with a dynamic cache.
        reduce: Chooses among the merged tokens (1, L, D) of one image.

    Yields:
        The handle that reports what was kept.

    Raises:
        ValueError: For another kind of model; inside the context, for inputs that cannot be
            shortened.
    """
    if not isinstance(model, Qwen2_5_VLForConditionalGeneration):
        raise ValueError(f"model={type(model).__name__}: expected Qwen2.5-VL")
    handle = QwenReduction(model, reduce)
    with ExitStack() as stack:
        handle._attach(stack)
        yield handle
