"""The heap of a window: blocks that live as long as the tensors over them, and are reused in stream order.

When the last tensor over a block is freed, queued work may still read the block. A free range therefore records which
streams used it, and a stream that takes the range waits for the other streams on the device. With a single stream there
is nothing to wait for.

* A block that is freed while its own stream is torch's current one was last used there: nothing is recorded.
* If another stream is current, the block was last used there, and an event is recorded on it. The block's own stream
  is recorded too. Work on a third stream must therefore be joined to one of these two before the last tensor is freed.
* A block taken while its stream is being captured into a CUDA graph belongs to that capture for good: each replay
  writes it again, and the end of a graph cannot be observed. Only the same capture can take it again.
* A block from before a capture that is freed during the capture is available after its end: until then no event can be
  recorded on its stream.

Calls of equal size that follow each other on one stream reuse the memory of the call before without a lock or a search:
a block that is freed eagerly on its own stream goes to a quick list, which the next request of that size on that stream
checks first. One that is freed eagerly on another stream goes there with an event, and is taken once that has passed:
so it is with the results of calls that run on a stream of their own. Memory on a quick list is as free as any range: it
goes back to the ranges (it is *settled*) before the heap makes a stream wait for another one, reports that it is full,
or gives a range to a graph or a large block.

`Block.__del__` may run in any thread, and within any call, `Heap.block` included: it only appends to deques.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tokenferry.errors import ClosedError, TokenferryError
from tokenferry.jit.driver import Device
from tokenferry.memory.ranges import Mark, Quick, Ranges, Waits, needs_others
from tokenferry.memory.streams import CudaStreams, HostStreams, Streams
from tokenferry.memory.tensor import bytes_at

ALIGNMENT = 512
"""Blocks begin at multiples of this."""
_EAGER = 0
_UNKNOWN = -1
_QUICK_LISTS = 16
"""Number of (size, stream) pairs with a quick list; a new pair replaces the oldest."""
_TRIMMED = 256
"""Least number of trimmed blocks after which those that are gone are forgotten."""
_LARGE = 16
"""A block is large if it takes more than this fraction (1 / 16) of the heap; quick lists are settled before it is
placed. It begins where a range begins, and others lie at the end of the last one: a small block that outlived a large
one beside it would leave two halves in which no larger one fits."""


class HeapFull(TokenferryError):  # noqa: N818 - reads as what happened, like PeerTimeout
    """No free range is large enough.

    Attributes:
        requested: Bytes requested.
        free: Bytes that are free.
        largest: Bytes of the largest free range.
        total: Bytes of the heap.
        captured: Bytes that belong to CUDA graphs.
    """

    def __init__(self, requested: int, free: int, largest: int, total: int, captured: int) -> None:
        graphs = f", {_mib(captured)} belong to CUDA graphs" if captured else ""
        super().__init__(
            f"the heap is full: {_mib(requested)} requested, {_mib(free)} of {_mib(total)} free, the largest free "
            f"range has {_mib(largest)}{graphs}; set TOKENFERRY_HEAP_MB higher, or release earlier results"
        )
        self.requested = requested
        self.free = free
        self.largest = largest
        self.total = total
        self.captured = captured


class Block:
    """A part of a heap, allocated as long as this object or a tensor of it is alive; made by `Heap.block`.

    Attributes:
        offset: Bytes from the window's base; a multiple of 512.
        num_bytes: Size of the block in bytes, as requested.
        address: Address of the block in this process.
    """

    __slots__ = ("_heap", "_quick", "_rest", "_size", "address", "num_bytes", "offset")

    def __init__(self, heap: Heap, quick: Quick, offset: int, num_bytes: int) -> None:
        self.offset = offset
        self.num_bytes = num_bytes
        self.address = heap.base + offset
        self._quick = quick
        self._size = quick.size
        # What `trim` has left over, as one range in a list: whoever takes it out of there frees it.
        self._rest: list[tuple[Any, ...]] | None = None
        self._heap = heap  # last: a block that an interrupt leaves without it frees nothing

    def tensor(self) -> Tensor:
        """Return a uint8 tensor ``[num_bytes]``; the tensor and its views keep the block alive."""
        return bytes_at(self.address, self.num_bytes, self._heap.device, self)

    def trim(self, num_bytes: int) -> None:
        """Keep the first ``num_bytes``; the rest, which must not have been used, is freed when memory becomes short.

        Until then the block keeps its size, so that the next one of that size takes its place without a search. Call it
        before `tensor`.

        Raises:
            ValueError: the block is smaller than ``num_bytes``.
        """
        if num_bytes > self.num_bytes:
            raise ValueError(f"trim: expected at most num_bytes={self.num_bytes}, got {num_bytes}")
        size, kept = self._take_rest(), _rounded(num_bytes)
        self.num_bytes = num_bytes
        if kept < size:
            here = (self._quick.stream, self._quick.capture)
            self._rest = [(self.offset + kept, size - kept, *here, *here, None, False)]
            self._heap._note_trimmed(self._rest)

    def _take_rest(self) -> int:
        """Take back what `trim` has left over, unless it has been freed; return the size of the block."""
        rest, self._rest = self._rest, None
        if rest is not None:
            try:
                rest.pop()
            except IndexError:
                self._size = _rounded(self.num_bytes)
        return self._size

    def __del__(self, finalizing: Any = sys.is_finalizing) -> None:  # noqa: ANN401 - bound: `sys` may be gone
        heap = getattr(self, "_heap", None)
        if heap is not None and not finalizing():
            heap._freed(self)


class Heap:
    """Blocks in ``[first, first + num_bytes)`` of a window. Thread-safe.

    Args:
        base: Address of the window in this process.
        num_bytes: Bytes of the heap.
        device: Device of the memory.
        first: Offset of the heap in the window.
        memory: Owner of the memory; kept alive while the heap is open, and as long as any block.
        streams: The streams of the device; None: those of ``device``.
    """

    def __init__(
        self,
        base: int,
        num_bytes: int,
        device: torch.device,
        first: int = 0,
        memory: object = None,
        streams: Streams | None = None,
    ) -> None:
        begin, end = -(-first // ALIGNMENT) * ALIGNMENT, (first + num_bytes) // ALIGNMENT * ALIGNMENT
        self.base = base
        self.device = device
        self.num_bytes = max(0, end - begin)
        self._memory = memory
        self._streams = streams or _streams_of(device)
        self._closed = False
        self._lock = threading.Lock()
        self._order = itertools.count()
        self._to_collect: deque[tuple[Any, ...]] = deque()
        self._limbo: list[tuple[int, int, int, int]] = []
        self._quicks: dict[tuple[int, int], Quick] = {}
        self._trimmed: deque[list[tuple[Any, ...]]] = deque()  # of each trimmed block, what is left over
        self._most_trimmed = _TRIMMED
        self._large = self.num_bytes // _LARGE
        self._pools = {_EAGER: Ranges()}
        self._kept: list[object] = []
        self._live = 0
        self._captured = 0
        if self.num_bytes:
            self._pools[_EAGER].give(begin, self.num_bytes, {})

    @property
    def num_live(self) -> int:
        """Number of blocks alive."""
        with self._lock:
            self._collect()
            return self._live - sum(len(quick.free) + len(quick.elsewhere) for quick in self._quicks.values())

    @property
    def free_bytes(self) -> int:
        """Bytes that are free, in ranges of any size; not those of CUDA graphs."""
        with self._lock:
            self._free_trimmed()
            self._settle()
            return self._pools[_EAGER].total

    @property
    def largest_free(self) -> int:
        """Bytes of the largest block that could be taken."""
        with self._lock:
            self._free_trimmed()
            self._settle()
            return self._pools[_EAGER].largest

    def has_room(self, num_bytes: int) -> bool:
        """Return whether ``num_bytes <= largest_free``; cheap, without settling anything, if that is known already."""
        ranges = self._pools[_EAGER]
        if ranges.largest_known >= num_bytes:
            return True
        if num_bytes > self.num_bytes:
            return False
        with self._lock:
            self._collect()
            if ranges.largest < num_bytes:
                self._settle()
            if ranges.largest < num_bytes and self._free_trimmed():
                self._settle()
            return ranges.largest >= num_bytes

    def block(self, num_bytes: int, stream: int, capture: int | None = None) -> Block:
        """Take a block for work on ``stream`` (a raw handle), which waits on the device for earlier users if necessary.

        Local; does not block the host; may be called while the stream is being captured.

        Args:
            num_bytes: Size of the block.
            stream: The stream that uses it first, and on which it should be freed.
            capture: The number of the capture that the stream takes part in, 0 if none; queried if None.

        Raises:
            HeapFull: no free range is large enough.
            ClosedError: the heap was closed.
        """
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT or ALIGNMENT
        if capture is None:
            capture = self._streams.capture(stream)
        if not capture:
            quick = self._quicks.get((size, stream))
            if quick is not None and quick.free:
                try:
                    return Block(self, quick, quick.free.pop(), num_bytes)
                except IndexError:  # another thread was faster
                    pass
            if quick is not None and quick.elsewhere:
                offset = self._passed(quick)
                if offset is not None:
                    return Block(self, quick, offset, num_bytes)
        return self._search(num_bytes, size, stream, capture)

    def close(self) -> None:
        """Refuse new blocks. Live blocks stay valid; the memory is freed with the last of them. Local, idempotent."""
        self._closed = True
        self._memory = None
        self._quicks = {}
        self._kept.clear()

    def _passed(self, quick: Quick) -> int | None:
        """Take the block of a quick list that was freed first on another stream, if that is done with it."""
        try:
            freed = quick.elsewhere.popleft()
        except IndexError:  # another thread was faster
            return None
        offset, _, mark = freed
        if self._streams.take_back(mark.event):
            return offset
        quick.elsewhere.appendleft(freed)
        if not quick.open:  # another thread has just closed it, and may have missed this block
            self._clear(quick)
        return None

    def _search(self, num_bytes: int, size: int, stream: int, capture: int) -> Block:
        """Take a block from the ranges; see `block`."""
        with self._lock:
            if self._closed:
                raise ClosedError("the heap of this group was closed; make a new group")
            if size > self._large:
                self._settle()
            elif self._to_collect:
                self._collect()
            if self._limbo:
                self._leave_limbo()
            start = self._take(size, stream, capture)
            if start is None and self._free_trimmed():
                start = self._take(size, stream, capture)
            if start is None:
                free = self._pools[_EAGER]
                raise HeapFull(num_bytes, free.total, free.largest, self.num_bytes, self._captured)
            self._live += 1
            return Block(self, self._quick_list(size, stream, capture), start, num_bytes)

    def _note_trimmed(self, rest: list[tuple[Any, ...]]) -> None:
        """Remember what a block has left over. Takes no lock."""
        trimmed = self._trimmed
        trimmed.append(rest)
        if len(trimmed) > self._most_trimmed:
            for _ in range(len(trimmed)):
                with suppress(IndexError):  # another thread frees them
                    oldest = trimmed.popleft()
                    if oldest:
                        trimmed.append(oldest)
            self._most_trimmed = max(_TRIMMED, 2 * len(trimmed))

    def _free_trimmed(self) -> bool:
        """Free what trimmed blocks do not need; return whether there were any."""
        found = False
        while self._trimmed:
            with suppress(IndexError):  # the block has gone, and has taken it along
                self._to_collect.append(self._trimmed.popleft().pop())
                found = True
        return found

    def _quick_list(self, size: int, stream: int, capture: int) -> Quick:
        """Return the quick list for a block that comes from the ranges; a new one replaces the oldest."""
        quicks, key = self._quicks, (size, stream)
        if capture:
            return Quick(size, stream, capture, self._memory)
        quick = quicks.get(key)
        if quick is None:
            if len(quicks) >= _QUICK_LISTS:
                oldest = quicks.pop(next(iter(quicks)))
                oldest.open = False
                self._clear(oldest)
            quick = quicks[key] = Quick(size, stream, capture, self._memory)
        return quick

    def _clear(self, quick: Quick) -> None:
        """Move the blocks of a quick list to the queue of `_collect`. Takes no lock."""
        here = (quick.stream, _EAGER)
        with suppress(IndexError):
            while True:
                self._to_collect.append((quick.free.pop(), quick.size, *here, *here, None, True))
        with suppress(IndexError):
            while True:
                offset, current, mark = quick.elsewhere.popleft()
                self._to_collect.append((offset, quick.size, *here, current, _EAGER, mark, True))

    def _settle(self) -> bool:
        """Give freed blocks, and those on quick lists, back to the ranges; return whether there were any."""
        for quick in self._quicks.values():
            if quick.free or quick.elsewhere:
                self._clear(quick)
        found = bool(self._to_collect)
        self._collect()
        return found

    def _take(self, size: int, stream: int, capture: int) -> int | None:
        """Return the offset of a block of ``size`` bytes, or None; ``stream`` waits for earlier users already."""
        pool = self._pools.setdefault(capture, Ranges())
        unfit: frozenset[int] = frozenset()
        at_end = size <= self._large
        while True:
            found = pool.best(size, stream, unfit, at_end=at_end)
            if found is None or needs_others(found[1], stream):
                if self._settle():
                    continue  # unfit ranges stay unfit, whatever they have merged with
                if found is None:
                    return self._take_for_capture(size, stream) if capture else None
                if not self._can_wait(found[1], stream, capture):
                    unfit |= {found[0]}
                    continue
                self._wait(found[1], stream)
            return pool.cut(found[0], size, at_end=at_end)

    def _take_for_capture(self, size: int, stream: int) -> int | None:
        """Take memory for good; at each replay, the graph waits for the eager work that used it."""
        pool, at_end = self._pools[_EAGER], size <= self._large
        found = pool.best(size, stream, at_end=at_end)
        if found is None:
            return None
        start, waits = found
        for other, mark in waits.items():
            # No event can stand for work that was queued on a stream before its capture. None is needed:
            # torch.cuda.graph synchronises the device before it captures.
            if mark is None and self._streams.capture(other):
                continue
            event = self._streams.record(other) if mark is None else mark.event
            self._streams.wait(stream, event, outside=True)
            self._kept.append(event)
        self._captured += size
        return pool.cut(start, size, at_end=at_end)

    def _can_wait(self, waits: Waits, stream: int, capture: int) -> bool:
        """Return whether missing events can be recorded: not on a stream that takes part in another capture."""
        return all(
            mark is not None or other == stream or self._streams.capture(other) == capture
            for other, mark in waits.items()
        )

    def _wait(self, waits: Waits, stream: int) -> None:
        for other, mark in waits.items():
            if other != stream:
                event = self._streams.record(other) if mark is None else mark.event
                self._streams.wait(stream, event, outside=False)

    def _freed(self, block: Block) -> None:
        """Record the streams that may still use a freed block. Takes no lock."""
        if self._closed:
            return
        quick = block._quick
        stream, capture, size = quick.stream, quick.capture, block._take_rest()
        mark, current = None, stream
        try:
            if quick.open and size == quick.size:
                eager = stream if self._streams.is_eager(stream) else self._streams.eager()
                if eager is not None:
                    current = eager
                    if current == stream:
                        quick.free.append(block.offset)
                    else:
                        quick.elsewhere.append((block.offset, current, self._mark(current, eager=True)))
                    if not quick.open:  # another thread has just closed it, and may have missed this block
                        self._clear(quick)
                    return
            current = self._streams.current()
            current_capture = self._streams.capture(current)
            if current != stream and current_capture == capture:
                mark = self._mark(current)
        except RuntimeError:  # the state of the stream cannot be queried now: try again later
            current_capture = _UNKNOWN
        self._to_collect.append((block.offset, size, stream, capture, current, current_capture, mark, True))

    def _mark(self, stream: int, *, eager: bool = False) -> Mark:
        """Record an event on a stream; ``eager``: see `Streams.record`."""
        # Take the number first: a higher one on the same stream then means a later event, whatever threads do.
        number = next(self._order)
        return Mark(number, self._streams.record(stream, eager=eager))

    def _collect(self) -> None:
        """Give freed blocks back to the ranges."""
        while self._to_collect:
            start, size, stream, capture, current, current_capture, mark, whole = self._to_collect.popleft()
            self._live -= whole
            if capture == current_capture:
                waits: Waits = {stream: None} if mark is None else {stream: None, current: mark}
                self._pools.setdefault(capture, Ranges()).give(start, size, waits)
            elif capture == _EAGER:
                self._limbo.append((start, size, stream, current))
            # else: a block of a capture that has ended, or that was freed outside of it, stays with its graph

    def _leave_limbo(self) -> None:
        """Give back blocks that were freed during captures that have ended."""
        waiting, self._limbo = self._limbo, []
        for start, size, stream, current in waiting:
            if self._is_captured(stream) or self._is_captured(current):
                self._limbo.append((start, size, stream, current))
            else:
                self._pools[_EAGER].give(start, size, {stream: None, current: None})

    def _is_captured(self, stream: int) -> bool:
        try:
            return self._streams.capture(stream) != _EAGER
        except RuntimeError:  # a capture forbids the query
            return True


def _streams_of(device: torch.device) -> Streams:
    return CudaStreams(Device(device.index or 0)) if device.type == "cuda" else HostStreams()


def _rounded(num_bytes: int) -> int:
    return max(ALIGNMENT, -(-num_bytes // ALIGNMENT) * ALIGNMENT)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
