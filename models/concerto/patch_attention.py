"""Attention within patches of serialized points (arXiv 2312.10035, section 4.3).

A cloud of at most K points is one patch. A larger one is cut into patches of K consecutive points;
the last is completed with the points that precede it in the order, whose own outputs there are
discarded. Patches never cross clouds, and a small cloud does not shrink those of its companions.
Letters in shape comments: N points, C channels, H heads, E = C / H, P patches, K patch size.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.concerto.ordering import permute_rows


class Window(NamedTuple):
    """Consecutive places of the serialized points that are attended to at once.

    Attributes:
        start: First place read.
        end: End (exclusive) of the places read.
        patches: Number of equal patches among them.
        skip: Places at the start that are read but get no output.
    """

    start: int
    end: int
    patches: int
    skip: int


class Patches:
    """Patches of a batch of clouds.

    Args:
        offset: (B,) int64 cumulative numbers of points.
        size: Points of a patch, K.
    """

    def __init__(self, offset: Tensor, size: int) -> None:
        if size < 1:
            raise ValueError(f"patch_size={size}: must be >= 1")
        self.size = size
        self.device = offset.device
        ends = offset.tolist()
        self.clouds = list(zip([0, *ends], ends, strict=False))

    @property
    def windows(self) -> list[Window]:
        """Windows whose outputs, joined, are those of all places in turn."""
        found = []
        for start, end in self.clouds:
            count = end - start
            whole = max(count // self.size, 1)
            middle = min(start + whole * self.size, end)
            if middle > start:
                found.append(Window(start, middle, whole, 0))
            if end > middle:
                found.append(Window(end - self.size, end, 1, self.size - (end - middle)))
        return found

    @property
    def pad(self) -> Tensor:
        """Place (padded,) int64 that each padded position copies; borrowed ones end a patch."""
        parts = []
        for window in self.windows:
            own = window.start + window.skip
            parts += [torch.arange(own, window.end), torch.arange(window.start, own)]
        return torch.cat(parts).to(self.device)

    @property
    def unpad(self) -> Tensor:
        """Padded position (N,) int64 of the output of each place."""
        parts, position = [], 0
        for window in self.windows:
            length = window.end - window.start
            parts.append(torch.arange(position, position + length - window.skip))
            position += length
        return torch.cat(parts).to(self.device)

    @property
    def cu_seqlens(self) -> Tensor:
        """Borders (P + 1,) int64 of the patches among the padded positions."""
        lengths = [0]
        for window in self.windows:
            lengths += [(window.end - window.start) // window.patches] * window.patches
        return torch.tensor(lengths, device=self.device).cumsum(0)


class _Heads(torch.autograd.Function):
    """Queries, keys and values of windows as views; their gradients go to one buffer."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        qkv: Tensor,
        windows: list[Window],
        heads: int,
    ) -> tuple[Tensor, ...]:
        ctx.windows, ctx.heads, ctx.shape = windows, heads, qkv.shape
        found: list[Tensor] = []
        for window in windows:
            q, k, v = _split_heads(qkv, window, heads)
            found += [q[:, :, window.skip :], k, v]
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        total = gradients[0].new_empty(ctx.shape)
        for number, window in enumerate(ctx.windows):
            parts = _split_heads(total, window, ctx.heads)
            for part, gradient in zip(parts, gradients[3 * number :], strict=False):
                # Borrowed places come after the window they belong to, and have no queries.
                borrowed = gradient.shape[2] - (part.shape[2] - window.skip)
                part[:, :, :borrowed] += gradient[:, :, :borrowed]
                part[:, :, window.skip :] = gradient[:, :, borrowed:]
        return total, None, None


def _split_heads(qkv: Tensor, window: Window, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (P, H, K, E), of a window of rows (N, 3 * C)."""
    rows = qkv[window.start : window.end]
    packed = rows.view(window.patches, -1, 3, heads, qkv.shape[1] // (3 * heads))
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return q, k, v


class PatchAttention(nn.Module):
    """Multi-head attention within the patches of serialized points.

    Args:
        channels: C, a multiple of ``heads``.
        heads: H.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels={channels}: must be a multiple of heads={heads}")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, patches: Patches, order: Tensor, inverse: Tensor) -> Tensor:
        """Attend among the points of each patch.

        Args:
            x: (N, C) rows of the batch.
            patches: Of the same batch.
            order: (N,) row at each place of the order.
            inverse: (N,) place of each row.
        """
        qkv = self.qkv(permute_rows(x, order, inverse))  # (N, 3 * C): q, k, v, each of all heads
        parts = _Heads.apply(qkv, patches.windows, self.heads)  # (P, H, K, E), three a window
        outputs = [
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
            for q, k, v in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
        ]  # each (P * K, C), less what is skipped
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # (N, C)
        return permute_rows(self.proj(joined), inverse, order)
