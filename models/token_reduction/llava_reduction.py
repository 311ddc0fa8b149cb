"""Fewer image tokens for LLaVA-NeXT and LLaVA-OneVision (arXiv 2503.16660, sec. 5).

The selector reads what the projector would read: each tile's features after the vision tower. Only
kept tokens are projected; they reach the language model in the order of the full packing.

Example: ``with reduced_llava(model, reduce) as handle: model.generate(**inputs)`` where ``inputs``
come from the model's processor as ever and ``reduce(tokens, grid)`` returns
``select(tokens, scores, share=0.5)``.

Letters: T tiles of an image, L tokens of a tile, N packed tokens, C channels of the vision tower, D
channels of the language model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from models.token_reduction.attaching import Reduce, check_selection, shadow_method
from models.token_reduction.generation import ShortGeneration, padding_id
from models.token_reduction.packing import NEWLINE, Newlines, PackedImage, kept_places
from models.token_reduction.prompts import Positions, PromptShortener

Llava = LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
# More tiles than any image has: the packing then interpolates nothing.
_NEVER_COMPRESSED = "anyres_max_1000000"


class LlavaReduction:
    """What a reduced LLaVA did with the images of its last call.

    Attributes:
        images: Layout, selection and kept features of each image, in the order of the prompts.
    """

    def __init__(
        self, model: Llava, reduce: Reduce, positions: Positions, newlines: Newlines
    ) -> None:
        self.images: list[PackedImage] = []
        self._model, self._base = model, model.model
        self._reduce, self._newlines = reduce, newlines
        config = model.config
        vision: Any = config.vision_config
        side = vision.image_size // vision.patch_size
        self._grid = (side, side)
        video = getattr(config, "video_token_id", None)
        padding = padding_id(config, config.image_token_id, video)
        shortener = PromptShortener(config.image_token_id, padding, positions)
        self._generation = ShortGeneration(model, shortener)
        self._encode, self._pack = self._base.get_image_features, self._base.pack_image_features
        self._encoding = False
        self._tokens: Tensor | None = None  # (tiles of all images, L, C) before the projector

    @property
    def kept_counts(self) -> list[int]:
        """Image tokens that the language model reads of each image, newlines not counted."""
        return [image.tokens for image in self.images]

    def _attach(self, stack: ExitStack) -> None:
        """Hook into the model until the stack is closed."""
        projector, generation = self._base.multi_modal_projector, self._generation
        handles = [
            projector.register_forward_pre_hook(self._hold_tokens),
            projector.register_forward_hook(self._number_tokens),
            self._model.register_forward_pre_hook(generation.before_forward, with_kwargs=True),
            self._model.register_forward_hook(generation.after_forward),
        ]
        for handle in handles:
            stack.callback(handle.remove)
        shadows = {
            "get_image_features": self._encode_images,
            "pack_image_features": self._pack_images,
        }
        for name, method in shadows.items():
            stack.enter_context(shadow_method(self._base, name, method))

    def _encode_images(self, *args: object, **kwargs: object) -> object:
        """``get_image_features`` with a stand-in for each image; see ``ShortGeneration``."""
        self._encoding = True
        try:
            return self._encode(*args, **kwargs)
        finally:
            self._encoding, self._tokens = False, None

    def _hold_tokens(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Keep the projector's input; it is projected once it is known what is read."""
        if not self._encoding:  # a video, or the kept tokens
            return None
        tokens: Tensor = args[0]
        if tokens.shape[1] != self._grid[0] * self._grid[1]:
            raise ValueError(
                f"{tokens.shape[1]} tokens of a tile on a grid of {self._grid}: expected all and "
                "no class token; check config.vision_feature_select_strategy"
            )
        self._tokens = tokens
        return (tokens[:, :0],)

    def _number_tokens(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Give the packing the number of every token, (tiles, L, 1), instead of its features."""
        if not self._encoding or self._tokens is None:
            return None
        count = self._tokens.shape[0] * self._tokens.shape[1]
        return torch.arange(count, device=output.device).view(*self._tokens.shape[:2], 1)

    def _pack_images(
        self,
        image_features: Sequence[Tensor],
        image_sizes: object,
        *args: object,
        **packing: object,
    ) -> object:
        """``pack_image_features`` that selects among tokens, given their numbers of each image."""
        if not self._encoding or self._tokens is None:
            return self._pack(image_features, image_sizes, *args, **packing)
        tokens, self._encoding = self._tokens, False
        newline = cast("Tensor", packing["image_newline"])
        layouts, lengths = self._lay_out(image_features, image_sizes, packing)
        read, parts = [], []
        for numbers, layout in zip(image_features, layouts, strict=True):
            first = int(numbers[0, 0, 0])
            tiles = slice(first // tokens.shape[1], first // tokens.shape[1] + len(numbers))
            selection = check_selection(self._reduce(tokens[tiles], self._grid), tokens[tiles])
            source = torch.where(layout == NEWLINE, layout, layout - first)
            keep = kept_places(source, selection.mask, self._newlines)
            parts.append((source, keep, selection))
            read.append(layout[keep])
        everything = all(bool(selection.mask.all()) for _, _, selection in parts)
        rows = self._project(tokens, torch.cat(read), newline, everything)
        features = torch.split(rows, [len(numbers) for numbers in read])
        self.images = [
            PackedImage(source, keep, selection.mask, selection.scores, own)
            for (source, keep, selection), own in zip(parts, features, strict=True)
        ]
        return [self._generation.stand_in(image) for image in self.images], lengths

    def _lay_out(
        self,
        numbers: Sequence[Tensor],
        image_sizes: object,
        packing: dict[str, object],
    ) -> tuple[list[Tensor], Tensor]:
        """Numbers of the tokens of each image as they are packed, (N,), and the N of each."""
        marker = torch.full((1,), NEWLINE, device=numbers[0].device)
        exact = {**packing, "image_newline": marker}
        if "vision_aspect_ratio" in packing:
            exact["vision_aspect_ratio"] = _NEVER_COMPRESSED
        layouts, lengths = self._pack(numbers, image_sizes, **exact)
        if "vision_aspect_ratio" in packing:
            floats = [tile.float() for tile in numbers]  # whole numbers cannot be interpolated
            _, stock = self._pack(floats, image_sizes, **{**packing, "image_newline": marker})
            if not torch.equal(stock, lengths):
                raise ValueError(
                    f"vision_aspect_ratio={packing['vision_aspect_ratio']!r}: would interpolate "
                    f"an image of {int(lengths.max())} tokens, which mixes kept with dropped ones; "
                    "give processor and model.config a larger anyres_max_, or a smaller image"
                )
        return [layout[:, 0] for layout in layouts], lengths

    def _project(self, tokens: Tensor, read: Tensor, newline: Tensor, everything: bool) -> Tensor:
        """Features (M, D) of the packed places that are read, ``read`` (M,) token numbers."""
        is_token = read != NEWLINE
        chosen = read[is_token]
        if everything:  # in the shape of the untouched model, for equal bits
            rows = self._base.multi_modal_projector(tokens).flatten(0, 1)[chosen]
        else:
            rows = self._base.multi_modal_projector(tokens.flatten(0, 1)[chosen][None])[0]
        features = newline.to(rows).repeat(len(read), 1)
        features[is_token] = rows
        return features


@contextmanager
def reduced_llava(
    model: Llava,
    reduce: Reduce,
    *,
    positions: Positions = "compact",
    newlines: Newlines = "keep",
) -> Iterator[LlavaReduction]:
    """Let a LLaVA read fewer image tokens, in ``forward`` and ``generate``, inside the context.

    Inputs stay those of the processor. Prompts are shortened to what is kept, padded on the side
    that the attention mask pads, otherwise left; logits and labels follow the shortened prompts,
    generated sequences begin with the full ones. Calls that go on from a cache pass attention mask
    and positions as if nothing had been dropped, or none. Where every token is kept, outputs are
    the model's own, bit for bit.

    Args:
        model: The stock class, with a dynamic cache.
        reduce: Chooses among the tokens (T, L, C) of one image's tiles, base tile first. It is
            called for each image alone, so a budget over its batch is one over the image.
        positions: "compact" numbers the remaining tokens anew; "original" leaves gaps, and the
            text stays as far from the image as in the full prompt.
        newlines: "keep", or "drop" for those of rows without any kept token.

    Yields:
        The handle that reports what was kept.

    Raises:
        ValueError: For another kind of model or unknown options; inside the context, for inputs
            that cannot be shortened and for images that OneVision would interpolate.
    """
    if not isinstance(model, get_args(Llava)):
        raise ValueError(f"model={type(model).__name__}: expected LLaVA-NeXT or LLaVA-OneVision")
    if positions not in get_args(Positions):
        raise ValueError(f"positions={positions!r}: expected 'compact' or 'original'")
    if newlines not in get_args(Newlines):
        raise ValueError(f"newlines={newlines!r}: expected 'keep' or 'drop'")
    if positions == "original" and "flash" in str(
        model.config.get_text_config()._attn_implementation
    ):
        raise ValueError(
            "positions='original': flash attention takes gaps for the borders of packed prompts; "
            "use attn_implementation='sdpa'"
        )
    handle = LlavaReduction(model, reduce, positions, newlines)
    with ExitStack() as stack:
        handle._attach(stack)
        yield handle
