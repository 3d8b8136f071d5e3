"""Timing a collective call on R ranks: drained and chained, and what the samples say together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist

Step = Callable[[int], object]
"""One collective call; the argument is the iteration, so that every iteration can bring other data."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What n iterations took, each the maximum over ranks.

    Attributes:
        n: Iterations.
        median_us: Median, microseconds.
        p05_us: 5th percentile.
        p95_us: 95th percentile.
    """

    n: int
    median_us: float
    p05_us: float
    p95_us: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile of ``values``, linear between the two nearest samples.

    Raises:
        ValueError: there are no values, or ``percent`` is outside [0, 100].
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"percentile: expected values and 0 <= percent <= 100, got {len(values)} values, {percent}")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(seconds: Sequence[Sequence[float]]) -> Summary:
    """Summarize ``seconds[rank][iteration]``: the slowest rank of each iteration, then percentiles over iterations.

    Raises:
        ValueError: ranks have different numbers of iterations, or none.
    """
    slowest = [max(ranks) * 1e6 for ranks in zip(*seconds, strict=True)]
    return Summary(len(slowest), percentile(slowest, 50), percentile(slowest, 5), percentile(slowest, 95))


def drained(pg: dist.ProcessGroup, steps: Sequence[Step], *, iters: int, warmup: int) -> list[list[float]]:
    """Time each step with the ranks synchronised before each call; seconds ``[step][iteration]`` of this rank.

    The steps take turns within each iteration, so that what disturbs the machine disturbs all of them alike.
    Contract: collective.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for i in range(warmup + iters):
        for samples, step in zip(seconds, steps, strict=True):
            dist.barrier(pg)
            start = time.perf_counter()
            step(i)
            samples.append(time.perf_counter() - start)
    return [samples[warmup:] for samples in seconds]


def chained(pg: dist.ProcessGroup, steps: Sequence[Step], *, iters: int, warmup: int) -> list[list[float]]:
    """Time each step in runs of calls back to back; seconds ``[step][iteration]`` of this rank.

    A run is a barrier, ``warmup`` calls that do not count, and up to ten that do; the steps take turns, run by run.
    Contract: collective.
    """
    seconds: list[list[float]] = [[] for _ in steps]
    for first in range(0, iters, 10):
        for samples, step in zip(seconds, steps, strict=True):
            dist.barrier(pg)
            for i in range(warmup):
                step(i)
            last = time.perf_counter()
            for i in range(first, min(first + 10, iters)):
                step(i)
                now = time.perf_counter()
                samples.append(now - last)
                last = now
    return seconds
