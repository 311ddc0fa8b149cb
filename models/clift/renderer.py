"""Renderer: target rays read a scene's tokens and become pictures (arXiv 2507.08776, sec. 3.3).

Letters in shape comments: B scenes, T target views, L query tokens of a view, S scene tokens,
W width, H heads, E head width. R is the rows of a memory: B, or B * T when each target view has
tokens of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.clift.transformer import DecoderLayer, KeyValues, copies, key_mask


class SceneMemory(NamedTuple):
    """Scene tokens as each decoder layer reads them, made once and used for every target view.

    Attributes:
        layers: Keys and values of each layer, (R, H, S, E).
        valid: (R, S) bool; None when no token is padded.
    """

    layers: tuple[KeyValues, ...]
    valid: Tensor | None

    def take(self, positions: Tensor, valid: Tensor | None = None) -> "SceneMemory":
        """Keep some of the tokens, without projecting them anew.

        Args:
            positions: (B, S') for all target views of a scene, or (B, T, S') for each of them.
            valid: Same shape, bool; False is padding. Tokens padded in the memory stay so.
        """
        views = 1 if positions.ndim == 2 else positions.shape[1]
        flat = positions.reshape(-1, positions.shape[-1])  # (R', S')
        scene = torch.arange(len(flat), device=flat.device) // views
        kept = None if valid is None else valid.reshape(flat.shape)
        if self.valid is not None:
            own = self.valid[scene[:, None], flat]
            kept = own if kept is None else own & kept
        if kept is not None and bool(kept.all()):
            kept = None
        return SceneMemory(
            tuple(
                KeyValues(_take(keys, scene, flat), _take(values, scene, flat))
                for keys, values in self.layers
            ),
            kept,
        )

    def views(self, start: int, stop: int, scenes: int) -> "SceneMemory":
        """Memory of target views ``start .. stop - 1`` of each of ``scenes`` scenes."""
        rows = self.layers[0].keys.shape[0]
        if rows == scenes:
            return self

        def cut(x: Tensor) -> Tensor:
            return x.view(scenes, -1, *x.shape[1:])[:, start:stop].flatten(0, 1)

        layers = tuple(KeyValues(cut(keys), cut(values)) for keys, values in self.layers)
        return SceneMemory(layers, None if self.valid is None else cut(self.valid))


def _take(x: Tensor, scene: Tensor, positions: Tensor) -> Tensor:
    """Tokens (R', H, S', E) of x (B, H, S, E), from the given scene of each row."""
    batch, heads, count, _ = x.shape
    flat = x.transpose(1, 2).reshape(batch * count, -1)  # (B * S, H * E): a token per row
    rows = flat.index_select(0, (positions + count * scene[:, None]).flatten())
    return rows.view(*positions.shape, heads, -1).transpose(1, 2)


class Decoder(nn.Module):
    """Stack of decoder layers without a final norm; all layers start from the same weights."""

    def __init__(self, layer: DecoderLayer, depth: int) -> None:
        super().__init__()
        self.layers = copies(layer, depth)

    def remember(self, tokens: Tensor, valid: Tensor | None = None) -> SceneMemory:
        """Project scene tokens (B, S, W) once for all layers and target views.

        Args:
            tokens: (B, S, W), not normalised.
            valid: (B, S) bool; padded tokens are never read.
        """
        if valid is not None and bool(valid.all()):
            valid = None
        layers = tuple(layer.multihead_attn.remember(tokens) for layer in self._layers())
        if not torch.is_grad_enabled():
            # One head after the other: every block of every view reads them, a tenth faster so.
            layers = tuple(KeyValues(*(part.contiguous() for part in both)) for both in layers)
        return SceneMemory(layers, valid)

    def forward(self, queries: Tensor, memory: SceneMemory) -> Tensor:
        """Transform the query tokens of each target view (B, T, L, W), views apart."""
        x = queries.flatten(0, 1)  # (B * T, L, W)
        mask = None if memory.valid is None else key_mask(memory.valid)
        for layer, known in zip(self._layers(), memory.layers, strict=True):
            x = layer(x, _Reader(layer, known, mask))
        return x.view_as(queries)

    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


class _Reader(NamedTuple):
    """Cross-attention to a remembered memory, all target views of a row as one set of queries."""

    layer: DecoderLayer
    memory: KeyValues
    mask: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Read for queries x (B * T, L, W)."""
        rows = x.reshape(self.memory.keys.shape[0], -1, x.shape[-1])  # (R, B * T / R * L, W)
        read = self.layer.multihead_attn.read(rows, self.memory, self.mask)
        return read.view_as(x)
