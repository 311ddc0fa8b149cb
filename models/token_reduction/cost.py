"""Multiply-accumulate operations and memory of encoder, selector, projector and language model.

Analytic counts, for what is saved by fewer visual tokens; a table of them stands beside measured
times, never instead of them, since speed does not follow tokens. Counted are matrix products: those
of linear layers, of queries with keys and of weights with values (half of these under a causal
mask, which fused kernels skip). Norms, activations, biases and the language model's output layer,
which a prefill needs for one token only, are left out. A multiply-accumulate is 2 FLOP.

For a plain classifier a selector behind its encoder is pure overhead; only a costly consumer of the
tokens pays for it.

Example:
    >>> round(CLIP_L_336.macs * 2e-9)
    382
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of a stack of transformer blocks.

    Attributes:
        width: Channels C.
        layers: Blocks.
        feed_forward: Hidden width of the feed-forward network.
        key_value_width: Channels of keys, and of values; less than C where heads share them. 0
            means C.
        gated: Whether the feed-forward network has a gate, hence three matrices and not two.
        causal: Whether a token attends only to itself and earlier ones.
    """

    width: int
    layers: int
    feed_forward: int
    key_value_width: int = 0
    gated: bool = False
    causal: bool = False

    @property
    def weights(self) -> int:
        """Entries of all matrices: parameters without biases, norms and embeddings."""
        keys_values = 2 * self.width * (self.key_value_width or self.width)
        network = (3 if self.gated else 2) * self.width * self.feed_forward
        return self.layers * (2 * self.width**2 + keys_values + network)

    def macs(self, tokens: int) -> int:
        """Multiply-accumulate operations of one sequence of this many tokens."""
        attention = 2 * self.layers * self.width * tokens**2
        return tokens * self.weights + (attention // 2 if self.causal else attention)

    def cache_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Bytes of the keys and values of one sequence, in 16 bits unless said otherwise."""
        channels = 2 * (self.key_value_width or self.width)
        return self.layers * channels * tokens * bytes_per_value


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a vision transformer.

    Attributes:
        blocks: Its blocks, only those that are run for the chosen layer.
        patches: Patch tokens L of one image or tile.
        patch_size: Side of a patch in pixels.
        prefix: Class token and registers.
    """

    blocks: TransformerShape
    patches: int
    patch_size: int
    prefix: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of one image or tile."""
        embedding = self.patches * 3 * self.patch_size**2 * self.blocks.width
        return embedding + self.blocks.macs(self.patches + self.prefix)

    def selector(self, layers: int = 3, width: int = 0) -> TransformerShape:
        """Blocks of a selector behind this encoder: its own kind unless a width is given.

        A narrow selector keeps the encoder's ratio of feed-forward width to width.
        """
        width = width or self.blocks.width
        feed_forward = self.blocks.feed_forward * width // self.blocks.width
        return replace(self.blocks, width=width, layers=layers, feed_forward=feed_forward)


CLIP_L_336 = EncoderShape(TransformerShape(1024, 24, 4096), 24 * 24, 14, prefix=1)
"""CLIP ViT-L/14 at 336 pixels, LLaVA-NeXT's encoder; all 24 blocks, though layer -2 needs 23."""

SIGLIP_SO400M_384 = EncoderShape(TransformerShape(1152, 26, 4304), 27 * 27, 14)
"""SigLIP so400m/14 at 384 pixels, with the 26 blocks that LLaVA-OneVision keeps."""

VICUNA_7B = TransformerShape(4096, 32, 11008, gated=True, causal=True)
"""The language model of LLaVA-NeXT-7B (Vicuna)."""


class ReductionCost(NamedTuple):
    """What one image and its question cost up to the first word of the answer.

    Attributes:
        encoder: Multiply-accumulate operations of the encoder over all tiles.
        selector: Of the selector over all tiles; 0 without one.
        projector: Of the projector over the kept tokens.
        consumer: Of the language model's prefill.
        gather_bytes: Bytes read and written to gather the kept tokens; 0 without a selector.
        cache_bytes: Bytes of the language model's keys and values.
    """

    encoder: int
    selector: int
    projector: int
    consumer: int
    gather_bytes: int
    cache_bytes: int

    @property
    def macs(self) -> int:
        """All multiply-accumulate operations."""
        return self.encoder + self.selector + self.projector + self.consumer


def reduction_cost(
    encoder: EncoderShape,
    consumer: TransformerShape,
    kept: int,
    tiles: int = 1,
    text_tokens: int = 0,
    selector: TransformerShape | None = None,
    projector: tuple[int, ...] = (),
    bytes_per_value: int = 2,
) -> ReductionCost:
    """Cost of one image of which ``kept`` tokens of all its tiles reach the language model.

    Args:
        encoder: Run on each tile.
        consumer: The language model.
        kept: Visual tokens of the whole image that are kept.
        tiles: Tiles of the image, the small whole one included.
        text_tokens: Tokens of the prompt.
        selector: Run on each tile's patch tokens (its last layer to two logits is left out); None
            where all tokens are kept.
        projector: Widths of a per-token network between the two, e.g. (1024, 4096, 4096).
        bytes_per_value: Of a number in the cache and in gathered tokens.

    Raises:
        ValueError: If a count is out of range.
    """
    if tiles < 1 or text_tokens < 0:
        raise ValueError(f"tiles={tiles}, text_tokens={text_tokens}: must be >= 1 and >= 0")
    if kept < 1:
        raise ValueError(f"kept={kept}: at least one visual token is kept")
    if selector is not None and kept > tiles * encoder.patches:
        raise ValueError(f"kept={kept}: {tiles} tiles have {tiles * encoder.patches} tokens")
    per_token = sum(a * b for a, b in pairwise(projector))
    selecting = 0 if selector is None else tiles * selector.macs(encoder.patches)
    gathered = 0 if selector is None else 2 * kept * encoder.blocks.width * bytes_per_value
    return ReductionCost(
        encoder=tiles * encoder.macs,
        selector=selecting,
        projector=kept * per_token,
        consumer=consumer.macs(kept + text_tokens),
        gather_bytes=gathered,
        cache_bytes=consumer.cache_bytes(kept + text_tokens, bytes_per_value),
    )
