"""Samples of all ranks put together: the slowest rank of each iteration, then percentiles over iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """The times of n iterations, each the maximum over ranks.

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
