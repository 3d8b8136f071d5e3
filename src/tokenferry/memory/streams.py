"""Streams and events for the heap, behind an interface, so that the heap can be tested without a GPU."""

from __future__ import annotations

import sys
from collections import deque
from contextlib import suppress
from typing import Any, Protocol

import torch

from tokenferry.jit.driver import Device, check

_NOT_READY = 600


class Streams(Protocol):
    """The streams of one device, as raw handles."""

    def current(self) -> int:
        """Return the stream on which torch would launch in this thread."""

    def capture(self, stream: int) -> int:
        """Return the number of the CUDA graph capture that a stream is part of, 0 if none; numbers are not reused."""

    def is_eager(self, stream: int) -> bool:
        """Return whether a stream is the current one and not being captured; False also if only `capture` can tell."""

    def eager(self) -> int | None:
        """Return the current stream, if `is_eager` is True of it."""

    def record(self, stream: int, *, eager: bool = False) -> object:
        """Record and return an event after everything queued on a stream; ``eager``: `eager` has just returned it."""

    def take_back(self, event: Any) -> bool:  # noqa: ANN401 - what `record` returned
        """Return whether all work before an event is done; if so, `record` may use it again, and nobody else may."""

    def wait(self, stream: int, event: Any, *, outside: bool) -> None:  # noqa: ANN401 - what `record` returned
        """Make a stream wait for an event; ``outside``: the stream is being captured, and the event is not."""


class HostStreams:
    """The streams for host memory, where work is done as soon as it is queued."""

    def current(self) -> int:
        """Return 0, the only stream."""
        return 0

    def capture(self, stream: int) -> int:
        """Return 0: nothing is captured."""
        return 0

    def is_eager(self, stream: int) -> bool:
        """Return whether it is the only stream."""
        return stream == 0

    def eager(self) -> int:
        """Return 0, the only stream."""
        return 0

    def record(self, stream: int, *, eager: bool = False) -> object:
        """Return None: there is nothing to wait for."""
        return None

    def take_back(self, event: object) -> bool:
        """Return True: the work is done already."""
        return True

    def wait(self, stream: int, event: object, *, outside: bool) -> None:
        """Do nothing: the work is done already."""


class CudaStreams:
    """The streams of a CUDA device.

    Raises:
        BackendUnavailable: (by every method) the driver reports an error; names the action and the code.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._index = device.index
        self._cuda = device.cuda
        # Bound here: they are called for each block, and `torch` may be gone when the last tensors are freed.
        self._current = torch._C._cuda_getCurrentRawStream
        self._capturing = torch._C._cuda_isCurrentStreamCapturing
        self._current_device = torch._C._cuda_getDevice
        self._idle: deque[_Event] = deque()

    def current(self) -> int:
        """See `Streams.current`."""
        return int(self._current(self._index))

    def capture(self, stream: int) -> int:
        """See `Streams.capture`.

        For the current stream of the current device, asking torch costs a quarter of asking the driver.
        """
        if self.is_eager(stream):
            return 0
        with self._device.current():
            status, number, *_ = check(self._cuda.cuStreamGetCaptureInfo(stream), "asking whether a stream is captured")
        return int(number) if int(status) else 0

    def is_eager(self, stream: int) -> bool:
        """See `Streams.is_eager`."""
        index = self._index
        return self._current(index) == stream and self._current_device() == index and not self._capturing()

    def eager(self) -> int | None:
        """See `Streams.eager`."""
        index = self._index
        if self._capturing() or self._current_device() != index:
            return None
        current: int = self._current(index)
        return current

    def record(self, stream: int, *, eager: bool = False) -> object:
        """See `Streams.record`."""
        cuda = self._cuda
        if eager and self._idle:  # `eager` has entered the context, and to leave and enter it takes longest
            with suppress(IndexError):  # another thread was faster
                event = self._idle.pop()
                if event.handle is not None:
                    check(cuda.cuEventRecord(event.handle, stream), "recording an event")
                    return event
        with self._device.current():
            flags = cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING
            event = _Event(check(cuda.cuEventCreate(flags), "making an event"), self._device)
            check(cuda.cuEventRecord(event.handle, stream), "recording an event")
        return event

    def take_back(self, event: Any) -> bool:  # noqa: ANN401 - as the protocol
        """See `Streams.take_back`."""
        handle = event.handle
        if handle is None or int(self._cuda.cuEventQuery(handle)[0]) != 0:  # not done, or nothing can be known now
            return False
        self.reuse(event)
        return True

    def new(self, priority: int) -> int:
        """Return a new stream, which does not wait for the default stream; see `destroy`.

        Nobody else has it: torch has 32 of a priority, which it gives away again and again.
        """
        with self._device.current():
            flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
            return int(check(self._cuda.cuStreamCreateWithPriority(flags, priority), "making a stream"))

    def destroy(self, stream: int) -> None:
        """Destroy a stream that `new` has returned, when its work is done."""
        with self._device.current():
            check(self._cuda.cuStreamDestroy(stream), "destroying a stream")

    def can_ask(self) -> bool:
        """Return whether this thread may ask about events: not in a forked child, nor while it captures a graph."""
        return not self._device.inherited and not self._capturing()

    def is_done(self, event: Any) -> bool:  # noqa: ANN401 - what `record` returned
        """Return whether all work before an event is done."""
        result = self._cuda.cuEventQuery(event.handle)
        if int(result[0]) == _NOT_READY:
            return False
        check(result, "asking about an event")
        return True

    def reuse(self, event: Any) -> None:  # noqa: ANN401 - what `record` returned
        """Let `record` use an event again; all work before it is known to be done, as `is_done` has said."""
        handle, event.handle = event.handle, None
        if handle is not None:
            self._idle.append(_Event(handle, self._device))

    def wait_eagerly(self, stream: int, event: Any) -> None:  # noqa: ANN401 - what `record` returned
        """Make a stream wait for an event, neither of them in a capture, after `eager` or `is_eager`."""
        check(self._cuda.cuStreamWaitEvent(stream, event.handle, 0), "waiting for an event")

    def wait(self, stream: int, event: Any, *, outside: bool) -> None:  # noqa: ANN401 - as the protocol
        """See `Streams.wait`."""
        # 1 is CU_EVENT_WAIT_EXTERNAL: the wait becomes a node of the graph. Without it a stream that is being captured
        # may only wait for events of its own capture; outside of a capture the flag is an error.
        with self._device.current():
            check(self._cuda.cuStreamWaitEvent(stream, event.handle, int(outside)), "waiting for an event")


class _Event:
    """A CUDA event that is destroyed with its last reference; work that already waits for it is not affected.

    Attributes:
        handle: Its handle; None if it has been destroyed, or `CudaStreams.reuse` has taken it. When a cycle of objects
            is collected, finalizers run in any order: that of an event before or after one that gives the event back.
    """

    __slots__ = ("_device", "handle")

    def __init__(self, handle: Any, device: Device) -> None:  # noqa: ANN401 - an object without a type
        self.handle = handle
        self._device = device

    def __del__(self, finalizing: Any = sys.is_finalizing) -> None:  # noqa: ANN401 - bound: `sys` may be gone
        handle, self.handle = self.handle, None
        if handle is not None and not finalizing() and not self._device.inherited:
            self._device.cuda.cuEventDestroy(handle)
