"""The stream of a call of `Buffer`, the event that it waits for, and the lifetime of its tensors.

On the CPU there are no streams: a call runs at once. On CUDA a call with ``async_finish=False`` runs on the caller's
current stream; with ``async_finish=True`` on the communication stream of the Buffer, and the caller's stream does not
wait for it until the caller waits for the returned event.

Memory that two streams use must not be reused by one of them while the other still reads or writes it:

* All inputs are kept alive until the call is done, as they were given, so that a plan makes no tensor for it. A CUDA
  graph cannot be asked whether it is: during a capture inputs are marked with `Tensor.record_stream`, too.
* Results in memory of torch, which goes back to the stream on which it was allocated, are marked for the caller's.
* Results in memory of the heap (rows, most plans), which such marks do not affect, go back after the stream on which
  they were allocated and the stream on which they are freed. These are the two that use them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenferry.checks import check_flags
from tokenferry.compat.deep_ep.current_stream import On, current_stream
from tokenferry.compat.deep_ep.utils.event import EventHandle, EventOverlap
from tokenferry.errors import ArgumentError

_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class When:
    """The arguments of a call that concern streams.

    Attributes:
        previous_event: An `EventOverlap` to wait for, or None.
        async_finish: Run on the communication stream, and return an event.
        allocate_on_comm_stream: Checked but otherwise unused: asynchronous calls always allocate on that stream.
    """

    previous_event: object = None
    async_finish: bool = False
    allocate_on_comm_stream: bool = False

    def event(self, call: str) -> EventHandle | None:
        """Return the event to wait for.

        Raises:
            ArgumentError: ``previous_event`` is of another type, a flag is not a bool, or ``allocate_on_comm_stream``
                was given without both of the others.
        """
        check_flags(call, async_finish=self.async_finish, allocate_on_comm_stream=self.allocate_on_comm_stream)
        event = self.previous_event
        event = event.event if isinstance(event, EventOverlap) else event
        if event is not None and not isinstance(event, EventHandle):
            raise ArgumentError(
                f"{call}: previous_event: expected an EventOverlap or None, got {type(event).__name__}; "
                "pass Buffer.capture() or the event of an earlier call"
            )
        if self.allocate_on_comm_stream and (event is None or not self.async_finish):
            raise ArgumentError(
                f"{call}: allocate_on_comm_stream: needs async_finish=True and a previous_event that holds an event, "
                f"got async_finish={self.async_finish} and {'no' if event is None else 'an'} event; pass both, or "
                "leave it out"
            )
        return event


NOW = When()


def when_of(previous_event: object, async_finish: bool, allocate_on_comm_stream: bool) -> When:
    """Return the arguments of a call that concern streams: `NOW` itself if they are left out, as they often are."""
    if previous_event is None and async_finish is False and allocate_on_comm_stream is False:
        return NOW
    return When(previous_event, async_finish, allocate_on_comm_stream)


class HoldsTensors:
    """Something that calls take or return, and that holds tensors; its class says which of them torch manages."""

    __slots__ = ()

    def managed_by_torch(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in memory that torch manages; they need not all differ."""
        raise NotImplementedError


class Lane:
    """The streams on which the calls of one `Buffer` run. For one thread at a time.

    Attributes:
        stream: The communication stream, or None on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
            self._before = torch.cuda.Event()  # type: ignore[no-untyped-call]
            if device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._pending: deque[tuple[EventHandle, tuple[Any, ...]]] = deque()

    def run(self, call: str, when: When, inputs: tuple[Any, ...], work: Callable[[], _T]) -> tuple[_T, EventOverlap]:
        """Run ``work``, which reads ``inputs``, on the stream of the call, after the event that it waits for. Local.

        Args:
            call: The method that was called, for errors.
            when: The arguments that concern streams.
            inputs: Tensors, tuples and `HoldsTensors`; anything else among them holds no tensors.
            work: The call itself. Its result is like ``inputs``.

        Returns:
            tuple: The result of ``work``, and the call's event, which is empty if the call was synchronous.

        Raises:
            ArgumentError: see `When.event`.
        """
        if when is NOW:
            return work(), EventOverlap()
        event = when.event(call)
        if self.stream is None or not when.async_finish:
            if event is not None:
                event.current_stream_wait()
            return work(), EventOverlap(EventHandle() if when.async_finish else None)
        current = current_stream(self._device.index)
        if event is None:
            self._before.record(current)
            self.stream.wait_event(self._before)
        else:
            event.delay(self.stream)
        with On(self.stream, current):
            try:
                result = work()
            except BaseException:  # it may have launched something
                with suppress(RuntimeError):  # of CUDA, whose events cannot be recorded any more
                    self._keep(EventHandle.behind(self.stream), inputs)
                raise
            done = EventHandle.behind(self.stream)
            capturing = self._keep(done, inputs)
        if not capturing:  # the last reference may go: a block of the heap is freed behind the current stream, too
            self._drop_done()
        _mark(result, current)
        return result, EventOverlap(done)

    def hand_over(self, result: object) -> None:
        """Let the current stream use a result of `run`, too, which may have been called on another one. Local."""
        if self.stream is not None:
            _mark(result, current_stream(self._device.index))

    def _keep(self, done: EventHandle, inputs: tuple[Any, ...]) -> bool:
        """Keep the inputs of a call alive until it is done; the communication stream must be current.

        Returns:
            bool: whether it is being captured.
        """
        done.keep(inputs)  # the program may drop this Buffer before it waits
        if torch.cuda.is_current_stream_capturing():
            # An event cannot be queried during a capture, but the program must wait for it before the capture ends.
            assert self.stream is not None
            _mark(inputs, self.stream)
            return True
        self._pending.append((done, inputs))
        return False

    def _drop_done(self) -> None:
        """Drop the inputs of calls that are done."""
        while self._pending and self._pending[0][0].has_passed():
            self._pending.popleft()


def _mark(value: object, stream: torch.cuda.Stream) -> None:
    """Let torch reuse the memory of tensors, where it manages it, only after the work that is now on a stream."""
    if isinstance(value, Tensor):
        value.record_stream(stream)
    elif isinstance(value, tuple):
        for part in value:
            _mark(part, stream)
    elif isinstance(value, HoldsTensors):
        _mark(value.managed_by_torch(), stream)
