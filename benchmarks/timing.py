"""CPU time of calls made in turn."""

import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def best_seconds(calls: Sequence[Call], repeats: int) -> list[float]:
    """Smallest CPU time of each call, made alternately; other load can only add to it."""
    return [min(seconds) for seconds in alternate_seconds(calls, repeats)]


def alternate_seconds(calls: Sequence[Call], repeats: int) -> list[list[float]]:
    """CPU times of ``repeats`` rounds of each call, so that other load falls on all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seconds in zip(calls, times, strict=True):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
    return times


def matrix_rate() -> float:
    """GFLOP/s of a 1024 x 1024 float32 product here."""
    matrix = torch.randn(1024, 1024)
    return 2e-9 * 1024**3 / best_seconds([lambda: matrix @ matrix], 10)[0]
