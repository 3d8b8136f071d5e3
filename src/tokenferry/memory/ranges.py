"""Free memory of a heap: ranges with the streams to wait for, and quick lists of blocks. Independent of CUDA."""

from __future__ import annotations

import bisect
from collections import deque
from typing import Any, NamedTuple


class Mark(NamedTuple):
    """An event to wait for, and its number in the order of all events."""

    number: int
    event: Any


Waits = dict[int, "Mark | None"]
"""A mark for each stream that used a range, all to be passed before it is used again; None: everything queued so far.
Replaced, never changed."""


class Ranges:
    """Free ranges, ordered by start. Adjacent ranges merge, and so do their waits.

    Attributes:
        largest_known: Size in bytes of a range that certainly exists. Any thread may read it.
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
        """Add a range, which must not overlap another."""
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

    def best(
        self, size: int, stream: int, unfit: frozenset[int] = frozenset(), *, at_end: bool = False
    ) -> tuple[int, Waits] | None:
        """Return start and waits of the best range for ``size`` bytes, or None; skip starts in ``unfit``.

        Ranges for which ``stream`` need not wait come first: waiting would serialise streams that the user keeps
        separate. Of these the smallest is best, so that large ranges stay whole; or the last one, ``at_end``, unless
        one has just this size.
        """
        found, least = -1, (True, True, 0)
        for at, has in enumerate(self._sizes):
            if has < size or (unfit and self._starts[at] in unfit):
                continue
            rank = (needs_others(self._waits[at], stream), has != size, -at if at_end else has)
            if found < 0 or rank < least:
                found, least = at, rank
                if rank[:2] == (False, False):
                    break
        return None if found < 0 else (self._starts[found], self._waits[found])

    def cut(self, start: int, size: int, *, at_end: bool = False) -> int:
        """Take the first, or the last, ``size`` bytes of the range at ``start``; return where they begin.

        The rest keeps its waits.
        """
        at = bisect.bisect_left(self._starts, start)
        if self._sizes[at] >= self.largest_known:  # this may be the known range, of which the rest still exists
            self.largest_known = self._sizes[at] - size
        if self._sizes[at] == size:
            del self._starts[at], self._sizes[at], self._waits[at]
            return start
        self._sizes[at] -= size
        if at_end:
            return start + self._sizes[at]
        self._starts[at] += size
        return start


class Quick:
    """The quick list of one size and stream: the common properties of its blocks, and the free ones among them.

    Attributes:
        size: Bytes of each block, a multiple of 512.
        stream: Raw handle of the stream.
        capture: Number of the capture in which the blocks were taken, 0 if none.
        memory: Owner of the memory, kept alive.
        free: Offsets of blocks that were freed eagerly on ``stream`` and are not settled.
        elsewhere: Those that were freed eagerly on another stream, oldest first: offset, stream, and an event there.
        open: Whether freed blocks may be added.
    """

    __slots__ = ("capture", "elsewhere", "free", "memory", "open", "size", "stream")

    def __init__(self, size: int, stream: int, capture: int, memory: object) -> None:
        self.size = size
        self.stream = stream
        self.capture = capture
        self.memory = memory
        self.free: deque[int] = deque()
        self.elsewhere: deque[tuple[int, int, Mark]] = deque()
        self.open = not capture


def needs_others(waits: Waits, stream: int) -> bool:
    """Return whether streams other than ``stream`` itself have to be waited for."""
    return len(waits) > 1 or (bool(waits) and stream not in waits)


def _both(one: Waits, other: Waits) -> Waits:
    """Return the waits of two merged ranges: the later mark of each stream, where None is later than any."""
    if not other or one == other:
        return one
    merged = dict(one)
    for stream, mark in other.items():
        mine = merged.get(stream, mark)
        merged[stream] = None if mark is None or mine is None else max(mine, mark, key=_order)
    return merged


def _order(mark: Mark) -> int:
    return mark.number
