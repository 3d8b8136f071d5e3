"""Free memory of a heap: ranges with what must be waited for, and blocks to be taken again. Knows nothing of CUDA."""

from __future__ import annotations

import bisect
from collections import deque
from typing import Any

Mark = tuple[int, Any] | None
"""An event that a stream has to pass, and its place in the order of all events. None: all that is queued when asked."""
Waits = dict[int, Mark]
"""What must be done before a range is used again: a mark for each stream that used it. Replaced, never changed."""


class Ranges:
    """Ranges that do not touch: neighbours merge, and so does what they wait for. In order of their starts.

    Attributes:
        largest_known: Bytes of a range that is known to be there. Any thread may read it.
    """

    def __init__(self) -> None:
        self.largest_known = 0
        self._starts: list[int] = []
        self._sizes: list[int] = []
        self._waits: list[Waits] = []

    @property
    def total(self) -> int:
        """Bytes of all ranges."""
        return sum(self._sizes)

    @property
    def largest(self) -> int:
        """Bytes of the largest range."""
        self.largest_known = largest = max(self._sizes, default=0)
        return largest

    def give(self, start: int, size: int, waits: Waits) -> None:
        """Add a range that overlaps none."""
        starts, sizes, all_waits = self._starts, self._sizes, self._waits
        at = bisect.bisect_left(starts, start)
        before = at > 0 and starts[at - 1] + sizes[at - 1] == start
        behind = at < len(starts) and starts[at] == start + size
        if before:
            sizes[at - 1] += size
            all_waits[at - 1] = _both(all_waits[at - 1], waits)
            if behind:
                sizes[at - 1] += sizes[at]
                all_waits[at - 1] = _both(all_waits[at - 1], all_waits[at])
                del starts[at], sizes[at], all_waits[at]
        elif behind:
            starts[at] = start
            sizes[at] += size
            all_waits[at] = _both(all_waits[at], waits)
        else:
            starts.insert(at, start)
            sizes.insert(at, size)
            all_waits.insert(at, waits)

    def best(self, size: int, stream: int, unfit: frozenset[int] = frozenset()) -> tuple[int, Waits] | None:
        """Start and waits of the range to take ``size`` bytes from, but none whose start is ``unfit``.

        First those for which ``stream`` need not wait: waiting would tie streams together that the user keeps apart. Of
        these the smallest, so that large ranges stay whole.
        """
        found, least = -1, (True, 0)
        for at, has in enumerate(self._sizes):
            if has < size or (unfit and self._starts[at] in unfit):
                continue
            rank = (needs_others(self._waits[at], stream), has)
            if found < 0 or rank < least:
                found, least = at, rank
                if rank == (False, size):
                    break
        return None if found < 0 else (self._starts[found], self._waits[found])

    def cut(self, start: int, size: int) -> None:
        """Take the first ``size`` bytes of the range that starts here; what is left waits for the same."""
        at = bisect.bisect_left(self._starts, start)
        if self._sizes[at] >= self.largest_known:  # perhaps the one that was known; what is left of it is still there
            self.largest_known = self._sizes[at] - size
        if self._sizes[at] > size:
            self._starts[at] += size
            self._sizes[at] -= size
        else:
            del self._starts[at], self._sizes[at], self._waits[at]


class Quick:
    """What blocks of one size that were taken on one stream have in common, and those of them that are free again.

    Attributes:
        size: Bytes, a multiple of 512.
        stream: The raw handle.
        capture: The capture that they were taken in; 0: none.
        memory: Kept alive.
        free: Offsets of blocks that died eagerly on ``stream`` and are not settled.
        open: Whether there may be more of them.
    """

    __slots__ = ("capture", "free", "memory", "open", "size", "stream")

    def __init__(self, size: int, stream: int, capture: int, memory: object) -> None:
        self.size = size
        self.stream = stream
        self.capture = capture
        self.memory = memory
        self.free: deque[int] = deque()
        self.open = not capture


def needs_others(waits: Waits, stream: int) -> bool:
    """Whether anything but ``stream`` itself has to be waited for."""
    return len(waits) > 1 or (bool(waits) and stream not in waits)


def _both(one: Waits, other: Waits) -> Waits:
    """What to wait for where one range is made of two: of each stream the later mark, and None is later than any."""
    if not other or one == other:
        return one
    merged = dict(one)
    for stream, mark in other.items():
        mine = merged.get(stream, mark)
        merged[stream] = None if mark is None or mine is None else max(mine, mark, key=_order)
    return merged


def _order(mark: tuple[int, Any]) -> int:
    return mark[0]
