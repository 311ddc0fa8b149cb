"""Affine autoregressive block: a causal transformer that shifts and scales tokens.

Paper section 3.1, equations 8 to 10.

A block turns tokens x into z = (x - mu) * exp(-a), where (mu, a) of token i come from the tokens
before i in the block's own order. Even and odd blocks read the tokens in opposite directions;
tokens are always stored in raster order.

Shape letters: B batch, N tokens, d channels of a token, W network width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.farmer.flow_guidance import FlowGuidance, extrapolate
from models.farmer.token_decoder import TokenDecoder
from models.farmer.transformer import KeyValueCache, Transformer


@dataclass(frozen=True)
class FlowShape:
    """Size and options of the flow.

    Attributes:
        blocks: Number of blocks n.
        layers: Transformer layers of a block.
        width: Transformer width W of a block, a multiple of ``head_dim``.
        head_dim: Width of one attention head.
        first_reverse: Whether the first block reads the tokens from last to first.
        class_conditional: Give the flow the class too (baseline only; FARMER's flow has none).
        output_norm: LayerNorm before the output projection of a block.
        position_affine: Learned (a, mu) per position, also for the first token of a block.
        soft_clip: Bound |a| smoothly by this value; null leaves a unbounded.
    """

    blocks: int
    layers: int
    width: int
    head_dim: int = 64
    first_reverse: bool = False
    class_conditional: bool = False
    output_norm: bool = False
    position_affine: bool = False
    soft_clip: float | None = None


class FlowOutput(NamedTuple):
    """What a flow, or one of its blocks, makes of its input.

    Attributes:
        tokens: (B, N, d) transformed tokens, raster order.
        log_det: (B,) log |det dz/dx| in nats.
        max_log_scale: () largest |a|; a large one announces an overflow of exp.
    """

    tokens: Tensor
    log_det: Tensor
    max_log_scale: Tensor


class InverseOptions(NamedTuple):
    """How the inverse of a block is computed.

    Attributes:
        chunk: Tokens solved together by Jacobi iteration; 1 is the exact sequential inverse.
        tolerance: Iteration of a chunk stops once no value moves by more than this. After
            ``chunk`` iterations a chunk is exact whatever the tolerance.
    """

    chunk: int = 1
    tolerance: float = 1e-4


SEQUENTIAL = InverseOptions()


class AffineBlock(nn.Module):
    """One affine autoregressive block (equations 8 to 10).

    Args:
        shape: Size and options; ``blocks`` and ``first_reverse`` do not matter here.
        tokens: Number of tokens N.
        channels: Channels d of a token.
        num_classes: Number of classes; only used by a class-conditional flow.
        reverse: Read the tokens from last to first.
        causal: False gives the bidirectional network of the one-step student, whose output for
            token i is not shifted and may depend on every token.
        activation_checkpointing: See `Transformer`.
    """

    def __init__(
        self,
        shape: FlowShape,
        tokens: int,
        channels: int,
        num_classes: int = 0,
        reverse: bool = False,
        causal: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.reverse = reverse
        self.soft_clip = shape.soft_clip
        self.proj_in = nn.Linear(channels, shape.width)
        self.positions = nn.Parameter(torch.randn(tokens, shape.width) * 1e-2)
        self.classes = (
            nn.Parameter(torch.randn(num_classes, shape.width) * 1e-2)
            if shape.class_conditional
            else None
        )
        self.transformer = Transformer(
            shape.layers,
            shape.width,
            shape.head_dim,
            causal=causal,
            activation_checkpointing=activation_checkpointing,
        )
        self.output_norm = nn.LayerNorm(shape.width) if shape.output_norm else nn.Identity()
        self.proj_out = nn.Linear(shape.width, 2 * channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.position_affine = (
            nn.Parameter(torch.zeros(tokens, 2 * channels)) if shape.position_affine else None
        )

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> FlowOutput:
        """Transform tokens (B, N, d) in one parallel pass.

        Args:
            tokens: (B, N, d), at least float32.
            labels: (B,) classes for a class-conditional block; -1 means no class.
        """
        x = self._ordered(tokens)
        log_scale, shift = self._affine(x, labels)
        z = (x - shift) * torch.exp(-log_scale)
        return FlowOutput(self._ordered(z), -log_scale.sum((1, 2)), log_scale.detach().abs().amax())

    def invert_parallel(self, tokens: Tensor) -> Tensor:
        """Apply the inverse affine form with (a, mu) read from the given tokens themselves.

        This is the student's step (section 1.8, algorithm 2): z (B, N, d) to x in one pass.
        """
        z = self._ordered(tokens)
        log_scale, shift = self._affine(z, None)
        return self._ordered(z * torch.exp(log_scale) + shift)

    def inverse(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        options: InverseOptions = SEQUENTIAL,
        guidance: FlowGuidance | None = None,
    ) -> tuple[Tensor, int]:
        """Invert the block with cached keys and values; the input is left untouched.

        Args:
            tokens: (B, N, d) output of `forward`.
            labels: (B,) classes for a class-conditional block.
            options: Sequential or block-wise Jacobi.
            guidance: Linear guidance for a class-conditional block.

        Returns:
            The tokens (B, N, d) before the block, and the number of network evaluations that had
            to follow one another.
        """
        z = self._ordered(tokens)
        copies = 1 if guidance is None else 2
        cache = self.transformer.empty_cache(copies * z.shape[0], z.shape[1], self.proj_in.weight)
        solve = self._solve_in_turn if options.chunk == 1 else self._solve_in_chunks
        x, evaluations = solve(z, self._condition(labels, guidance), cache, options, guidance)
        return self._ordered(x), evaluations

    def _solve_in_turn(
        self,
        z: Tensor,
        condition: Tensor | None,
        cache: KeyValueCache,
        options: InverseOptions,
        guidance: FlowGuidance | None,
    ) -> tuple[Tensor, int]:
        """Invert tokens z (B, N, d), in block order, one after another."""
        tokens = z.shape[1]
        # A GPU is better served by the fused attention kernel.
        decoder = TokenDecoder(self.transformer, cache) if z.device.type == "cpu" else None
        weight, offsets = self.proj_in.weight, self._positions() + self.proj_in.bias  # (N, W)
        log_scale, shift = self._split(self._first_affine(z).squeeze(1))
        solved = [z[:, 0] * torch.exp(log_scale) + shift]
        for position in range(1, tokens):
            inputs = F.linear(solved[-1], weight, offsets[position - 1])  # (B, W)
            inputs = inputs if guidance is None else inputs.repeat(2, 1)
            inputs = inputs if condition is None else inputs + condition.squeeze(1)
            if decoder is None:
                hidden = self.transformer.step(inputs.unsqueeze(1), cache, position - 1).squeeze(1)
            else:
                hidden = decoder.step(inputs, position - 1)
            raw = self._output(hidden, position, z.dtype).unsqueeze(1)  # (B, 1, 2d)
            log_scale, shift = self._split(extrapolate(raw, guidance, position, tokens).squeeze(1))
            solved.append(torch.addcmul(shift, z[:, position], torch.exp(log_scale)))
        return torch.stack(solved, 1), tokens - 1

    def _solve_in_chunks(
        self,
        z: Tensor,
        condition: Tensor | None,
        cache: KeyValueCache,
        options: InverseOptions,
        guidance: FlowGuidance | None,
    ) -> tuple[Tensor, int]:
        """Invert tokens z (B, N, d), in block order, chunk by chunk by Jacobi iteration."""
        x = torch.empty_like(z)
        log_scale, shift = self._split(self._first_affine(z))
        x[:, :1] = z[:, :1] * torch.exp(log_scale) + shift
        evaluations = 0
        for start in range(1, z.shape[1], options.chunk):
            stop = min(start + options.chunk, z.shape[1])
            x[:, start:stop] = z[:, start:stop]
            for _ in range(stop - start):
                inputs = self._embed(x[:, start - 1 : stop - 1], start - 1)
                inputs = inputs if guidance is None else inputs.repeat(2, 1, 1)
                inputs = inputs if condition is None else inputs + condition
                hidden = self.transformer.step(inputs, cache, start - 1)
                out = self._output(hidden, slice(start, stop), x.dtype)
                log_scale, shift = self._split(extrapolate(out, guidance, start, z.shape[1]))
                solved = z[:, start:stop] * torch.exp(log_scale) + shift
                evaluations += 1
                settled = stop - start == 1 or _close(solved, x[:, start:stop], options.tolerance)
                x[:, start:stop] = solved
                if settled:
                    break
        return x, evaluations

    def _ordered(self, tokens: Tensor) -> Tensor:
        """Raster order to the block's own order, and back."""
        return tokens.flip(1) if self.reverse else tokens

    def _embed(self, x: Tensor, start: int) -> Tensor:
        """Network input (B, T, W) for tokens x (B, T, d) at block positions start .."""
        stop = start + x.shape[1]
        embedded: Tensor = self.proj_in(x) + self._positions()[start:stop]
        return embedded

    def _positions(self) -> Tensor:
        return self.positions.flip(0) if self.reverse else self.positions

    def _condition(self, labels: Tensor | None, guidance: FlowGuidance | None) -> Tensor | None:
        """Class embeddings (B, 1, W); with guidance the unconditional ones follow, (2B, 1, W)."""
        if self.classes is None:
            return None
        if labels is None:
            raise ValueError("labels=None: a class-conditional flow needs a label per image")
        mean = self.classes.mean(0)
        known = self.classes[labels.clamp(min=0)]
        known = torch.where((labels < 0).unsqueeze(1), mean, known)  # (B, W)
        if guidance is not None:
            known = torch.cat([known, mean.expand_as(known)])
        return known.unsqueeze(1)

    def _affine(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """(a, mu), each (B, N, d), for tokens in block order."""
        causal = self.transformer.causal
        inputs = self._embed(x[:, :-1] if causal else x, 0)
        condition = self._condition(labels, None)
        inputs = inputs if condition is None else inputs + condition
        hidden = self.transformer(inputs)
        if not causal:
            return self._split(self._output(hidden, slice(0, x.shape[1]), x.dtype))
        later = self._output(hidden, slice(1, x.shape[1]), x.dtype)
        return self._split(torch.cat([self._first_affine(x), later], 1))

    def _output(self, hidden: Tensor, positions: slice | int, dtype: torch.dtype) -> Tensor:
        """(..., 2d) raw (a, mu) in the dtype of the tokens, never below float32."""
        out: Tensor = self.proj_out(self.output_norm(hidden)).to(dtype)
        return out if self.position_affine is None else out + self.position_affine[positions]

    def _first_affine(self, x: Tensor) -> Tensor:
        """(B, 1, 2d) raw (a, mu) of the first token, which no token precedes."""
        if self.position_affine is None:
            return x.new_zeros(x.shape[0], 1, 2 * x.shape[2])
        return self.position_affine[:1].to(x.dtype).expand(x.shape[0], 1, -1)

    def _split(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs (..., 2d) to (a, mu), a softly clipped if asked for."""
        log_scale, shift = raw.chunk(2, -1)
        if self.soft_clip is not None:
            log_scale = self.soft_clip * torch.tanh(log_scale / self.soft_clip)
        return log_scale, shift


def _close(new: Tensor, old: Tensor, tolerance: float) -> bool:
    return bool((new - old).abs().amax() <= tolerance)
