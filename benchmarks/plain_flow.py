"""An affine autoregressive flow in its plainest form, the yardstick of `benchmarks/farmer.py`.

Same arithmetic as the released TarFlow code and as our flow: a boolean triangle as attention mask,
caches that grow by concatenation, one module call for everything. It is timed in the same process
as our flow, so that the ratio of the two means the same on every machine.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLayer(nn.Module):
    """Pre-norm attention and feed-forward network; remembers keys and values while sampling."""

    def __init__(self, width: int, head_dim: int = 64) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.seen: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Transform tokens x (B, T, W)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, tokens, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, E)
        if self.seen is not None:
            self.seen.append((key, value))
            key, value = (torch.cat(part, 2) for part in zip(*self.seen, strict=True))
        out = F.scaled_dot_product_attention(query, key, value, mask)
        x = x + self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        transformed: Tensor = x + self.mlp(self.norms[1](x))
        return transformed


class PlainBlock(nn.Module):
    """Shifts and scales every token by what a causal transformer makes of those before it."""

    def __init__(self, layers: int, width: int, tokens: int, channels: int, reverse: bool) -> None:
        super().__init__()
        self.reverse = reverse
        self.embed, self.head = nn.Linear(channels, width), nn.Linear(width, 2 * channels)
        self.positions = nn.Parameter(torch.randn(tokens, width) * 1e-2)
        self.layers = nn.ModuleList(PlainLayer(width) for _ in range(layers))
        self.register_buffer("mask", torch.ones(tokens, tokens).tril().bool())

    def _turn(self, x: Tensor, dim: int = 1) -> Tensor:
        return x.flip(dim) if self.reverse else x

    def _run(self, x: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.embed(x) + positions
        for layer in self.layers:
            hidden = layer(hidden, mask)
        log_scale, shift = self.head(hidden).chunk(2, -1)
        return log_scale, shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, d) to latent tokens and their log-determinant (B,)."""
        x = self._turn(x)
        parts = self._run(x, self._turn(self.positions, 0), self.mask)
        log_scale, shift = (F.pad(part[:, :-1], (0, 0, 1, 0)) for part in parts)
        return self._turn((x - shift) * torch.exp(-log_scale)), -log_scale.sum((1, 2))

    def inverse(self, z: Tensor) -> Tensor:
        """Latent tokens (B, N, d) back to tokens, one by one."""
        for layer in self.layers:
            layer.seen = []
        tokens = list(self._turn(z).split(1, 1))
        positions = self._turn(self.positions, 0).split(1)
        for before, after in pairwise(range(len(tokens))):
            log_scale, shift = self._run(tokens[before], positions[before], None)
            tokens[after] = tokens[after] * torch.exp(log_scale) + shift
        for layer in self.layers:
            layer.seen = None
        return self._turn(torch.cat(tokens, 1))


class PlainFlow(nn.Module):
    """Stack of four plain blocks with alternating direction."""

    def __init__(self, layers: int, width: int, tokens: int, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PlainBlock(layers, width, tokens, channels, bool(index % 2)) for index in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, d) to latent tokens and log-determinant (B,)."""
        log_det = x.new_zeros(x.shape[0])
        for block in self.blocks:
            x, part = block(x)
            log_det = log_det + part
        return x, log_det

    @torch.no_grad()
    def inverse(self, z: Tensor) -> Tensor:
        """Latent tokens (B, N, d) back to tokens."""
        for block in reversed(self.blocks):
            z = block.inverse(z)
        return z
