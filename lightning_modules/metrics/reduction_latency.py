"""Measured time and operations of a reduction: encoder, selector, gather and a consumer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from models.token_reduction.reducer import TokenReducer
from models.token_reduction.selection import gather_kept, select
from models.token_reduction.transformer import TokenTransformer

Call = Callable[[], object]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:  # noqa: ANN401
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


# Torch counts its attention kernels for GPUs alone.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@dataclass(frozen=True)
class ConsumerShape:
    """A transformer that reads kept tokens, in place of a language model.

    Attributes:
        width: Channels, a multiple of 64.
        layers: Blocks; 0 measures no consumer.
    """

    width: int = 512
    layers: int = 8

    def __post_init__(self) -> None:
        if self.width < 64 or self.width % 64 or self.layers < 0:
            raise ValueError(
                f"width={self.width}, layers={self.layers}: expected a multiple of 64 and >= 0"
            )


@dataclass(frozen=True)
class LatencyRow:
    """One part at one retained share.

    Attributes:
        part: "encoder", "selector", "gather", "consumer", or "selector to consumer".
        share: Retained share.
        tokens: Tokens that the part takes of each image.
        milliseconds: Median wall time for each image.
        gflop: Operations for each image, in 1e9, counted while running; 0 for moving data.
        speed_up: Time of the consumer of all tokens over that of selector, gather and consumer;
            None for the parts alone.
    """

    part: str
    share: float
    tokens: int
    milliseconds: float
    gflop: float
    speed_up: float | None = None


class Consumer(nn.Module):
    """Projects kept tokens to its width and runs its blocks over them; random weights.

    Args:
        width: Channels of the tokens.
        shape: Of the consumer.
        grid: Of the tokens.
    """

    def __init__(self, width: int, shape: ConsumerShape, grid: tuple[int, int]) -> None:
        super().__init__()
        self.projector = nn.Linear(width, shape.width)
        heads = shape.width // 64
        self.blocks = TokenTransformer(shape.width, heads, shape.layers, 4.0, grid).blocks

    def forward(self, tokens: Tensor) -> Tensor:
        """Read (B, K, C) tokens: (B, K, width)."""
        read: Tensor = self.blocks(self.projector(tokens))
        return read


@torch.inference_mode()
def measure_latency(
    encode: Callable[[], Tensor],
    reducer: TokenReducer,
    consumer_shape: ConsumerShape,
    shares: Sequence[float],
    repeats: int = 5,
) -> list[LatencyRow]:
    """Time all parts alternately on one batch, each after a warm-up.

    Args:
        encode: Runs the encoder on the batch: (B, L, C) raw tokens.
        reducer: Selector with its standardiser.
        consumer_shape: What reads the kept tokens.
        shares: Retained shares; 1 means all tokens, without selector.
        repeats: Timed turns, >= 1; the median counts.
    """
    tokens = encode()
    grid, length = reducer.shape.grid, tokens.shape[1]
    scores = reducer.scores(tokens)
    calls: dict[tuple[str, float], Call] = {
        ("encoder", 1.0): encode,
        ("selector", 1.0): lambda: reducer.scores(tokens),
    }
    consumer: nn.Module | None = None
    if consumer_shape.layers:
        consumer = Consumer(tokens.shape[2], consumer_shape, grid).to(tokens.device).eval()
    for share in sorted({1.0, *shares}):
        kept = tokens
        if share < 1:
            kept = select(tokens, scores, share=share, grid=grid).kept
            calls["gather", share] = _gather(tokens, scores, share, grid)
        if consumer is not None:
            calls["consumer", share] = _consume(consumer, kept)
    seconds = dict(zip(calls, _median_seconds(list(calls.values()), tokens, repeats), strict=True))
    rows = []
    for (part, share), call in calls.items():
        counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        with counter:
            call()
        per_image = 1e-9 * counter.get_total_flops() / len(tokens)
        count = max(1, round(share * length)) if part == "consumer" else length
        milliseconds = 1000 * seconds[part, share] / len(tokens)
        rows.append(LatencyRow(part, share, count, milliseconds, per_image))
    return rows + _totals(rows)


def _gather(tokens: Tensor, scores: Tensor, share: float, grid: tuple[int, int]) -> Call:
    return lambda: gather_kept(tokens, select(tokens, scores, share=share, grid=grid).indices)


def _consume(consumer: nn.Module, kept: Tensor) -> Call:
    return lambda: consumer(kept)


def _totals(rows: Sequence[LatencyRow]) -> list[LatencyRow]:
    """Selector, gather and consumer together, against the consumer of all tokens."""
    times = {(row.part, row.share): row for row in rows}
    full = times.get(("consumer", 1.0))
    if full is None:
        return []
    totals = []
    selector = times["selector", 1.0]
    for row in rows:
        if row.part != "consumer" or row.share == 1:
            continue
        parts = (selector, times["gather", row.share], row)
        spent = sum(part.milliseconds for part in parts)
        operations = sum(part.gflop for part in parts)
        totals.append(
            LatencyRow(
                "selector to consumer",
                row.share,
                row.tokens,
                spent,
                operations,
                full.milliseconds / spent,
            )
        )
    return totals


def _median_seconds(calls: Sequence[Call], like: Tensor, repeats: int) -> list[float]:
    """Median wall time of each call, made in turn after one of each to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            _wait(like)
            start = time.perf_counter()
            call()
            _wait(like)
            if turn:
                found.append(time.perf_counter() - start)
    return [median(found) for found in times]


def _wait(like: Tensor) -> None:
    """Let a device that works by itself finish."""
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
