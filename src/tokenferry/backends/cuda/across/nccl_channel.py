"""The connections of a rail over NCCL: how they are made, and where exchanges lie among the work of the device."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple, Protocol

import torch

from tokenferry.backends.cuda.across.nccl import Communicator, NcclError
from tokenferry.backends.cuda.across.rails import Parts
from tokenferry.memory.streams import CudaStreams


class Marks(NamedTuple):
    """Where an exchange lies among the work of the device.

    Attributes:
        begun: Returns whether the stream has reached it.
        ended: Returns whether everything has come and gone.
        join: Makes the current stream wait until then.
        captured: Whether it is part of a CUDA graph. Then `begun` and `ended` speak of the latest replay.
    """

    begun: Callable[[], bool]
    ended: Callable[[], bool]
    join: Callable[[], None]
    captured: bool = False


class RailChannel(Protocol):
    """The connections of a rail."""

    def start(self, parts: Parts, stream: int, *, captured: bool) -> Marks:
        """Begin an exchange, behind the work of the current stream.

        Args:
            parts: What to send, and where to receive.
            stream: Handle of the current stream.
            captured: Whether a CUDA graph captures it.

        Raises:
            NcclError: a connection has failed.
        """
        ...

    def aside(self) -> AbstractContextManager[object]:
        """Return a context in which the current stream of this thread is one on which no other work is queued."""
        ...

    def error(self) -> str:
        """Return what has gone wrong on the way; empty: nothing."""
        ...

    def abort(self) -> None:
        """End what is under way."""
        ...

    def close(self) -> None:
        """Wait until what was sent has left, and free the connections."""
        ...


class _Events:
    """Events before and after an exchange. They are used again when nobody can ask about it any more.

    Events of torch would do, but to make, record and wait for two takes the host 50 % longer.
    """

    __slots__ = ("_begun", "_ended", "_over", "_streams")

    def __init__(self, streams: CudaStreams, begun: object, ended: object) -> None:
        self._streams, self._begun, self._ended, self._over = streams, begun, ended, False

    def has_begun(self) -> bool:
        return self._streams.is_done(self._begun)

    def has_ended(self) -> bool:
        self._over = self._over or self._streams.is_done(self._ended)
        return self._over

    def join(self) -> None:
        streams = self._streams
        stream = streams.eager()
        if stream is None:
            streams.wait(streams.current(), self._ended, outside=False)
        else:
            streams.wait_eagerly(stream, self._ended)

    def __del__(self, finalizing: Any = sys.is_finalizing) -> None:  # noqa: ANN401 - bound: `sys` may be gone
        if finalizing():
            return
        if self._over:  # the thread that looks after exchanges has asked, and should not do so again for each
            self._streams.reuse(self._begun)
            self._streams.reuse(self._ended)
        elif self._streams.can_ask():
            self._streams.take_back(self._begun)
            self._streams.take_back(self._ended)


class NcclChannel:
    """See `RailChannel`.

    Args:
        communicator: The ranks of the rail, in the order of nodes.
        device: The device of this rank.
        streams: Its streams.
    """

    def __init__(self, communicator: Communicator, device: torch.device, streams: CudaStreams) -> None:
        self._communicator = communicator
        self._streams = streams
        self._captured = False
        self.error, self.abort = communicator.error, communicator.abort
        self._owned: list[int] = []
        try:
            for _ in range(2):
                self._owned.append(streams.new(priority=-1))
        except RuntimeError:  # the rail peers have made theirs
            self.abort()
            self.close()
            raise
        self._handle, self._other = self._owned
        self._stream = torch.cuda.ExternalStream(self._handle, device)  # type: ignore[no-untyped-call]
        self._aside = torch.cuda.ExternalStream(self._other, device)  # type: ignore[no-untyped-call]

    def greet(self) -> None:
        """Exchange a byte with each other rank, since NCCL connects two ranks in their first exchange. Blocks."""
        ranks = range(self._communicator.num_ranks)
        words = torch.zeros(2, len(ranks), dtype=torch.uint8, device=self._stream.device)
        others = [rank for rank in ranks if rank != self._communicator.rank]
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._communicator.exchange(
            [(words[sent, rank].data_ptr(), 1, rank, bool(sent)) for rank in others for sent in (0, 1)],
            self._stream.cuda_stream,
        )
        self._stream.synchronize()

    def start(self, parts: Parts, stream: int, *, captured: bool) -> Marks:
        """See `RailChannel.start`."""
        if captured:
            return self._capture(parts)
        streams, handle = self._streams, self._handle
        eager = streams.is_eager(stream)
        begun = streams.record(stream, eager=eager)
        if eager:
            streams.wait_eagerly(handle, begun)
        else:
            streams.wait(handle, begun, outside=False)
        self._communicator.exchange(parts, handle)
        events = _Events(streams, begun, streams.record(handle, eager=eager))
        return Marks(events.has_begun, events.has_ended, events.join)

    def _capture(self, parts: Parts) -> Marks:
        begun, ended, stream = torch.cuda.Event(), torch.cuda.Event(), self._stream  # type: ignore[no-untyped-call]
        begun.record()
        begun.wait(stream)
        self._captured = True
        # Events of a capture only order it. Those that can be asked about replays are nodes of the graph.
        reached, left = torch.cuda.Event(external=True), torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        reached.record(stream)
        self._communicator.exchange(parts, stream.cuda_stream)
        left.record(stream)
        ended.record(stream)
        return Marks(reached.query, left.query, ended.wait, captured=True)

    def aside(self) -> AbstractContextManager[object]:
        """See `RailChannel.aside`."""
        return torch.cuda.stream(self._aside)

    def close(self) -> None:
        """See `RailChannel.close`."""
        if not self._captured:  # NCCL waits for the end of graphs
            self._communicator.close()
        owned, self._owned = self._owned, []
        for stream in owned:
            with suppress(RuntimeError):  # the CUDA context is broken, and all of its streams with it
                self._streams.destroy(stream)


def connect(make: Callable[[], NcclChannel], timeout_s: float) -> NcclChannel:
    """Return a channel whose ranks are connected to each other. Collective.

    NCCL gives no deadline for this, so a thread does it. One that is late may stay in NCCL until the process ends, or
    the other ranks come.

    Args:
        make: Returns the channel; may block.
        timeout_s: Seconds that all may take.

    Raises:
        NcclError: it failed, or took too long.
    """
    made: list[NcclChannel] = []
    failures: list[Exception] = []
    ended, late, aborted = threading.Event(), threading.Event(), threading.Event()
    deciding = threading.Lock()  # which of the two comes first

    def run() -> None:
        try:
            made.append(make())
            if not late.is_set():  # looked up when the channel is where it can be aborted
                made[0].greet()
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
        with deciding:
            ended.set()
        if late.is_set():
            aborted.wait(timeout_s)  # the other thread may still use the streams
            _discard(made)

    thread = threading.Thread(target=run, name="tokenferry-connect", daemon=True)
    thread.start()
    thread.join(timeout_s)
    with deciding:
        if not ended.is_set():
            late.set()
    if late.is_set():
        try:
            for channel in made:
                channel.abort()  # which ends the greeting; the thread closes it
        finally:
            aborted.set()
        raise NcclError(f"connecting the ranks of a rail did not end within {timeout_s:.0f} s")
    if failures:
        _discard(made)
        raise failures.pop()  # not from a variable: its traceback holds this frame
    return made[0]


def _discard(made: list[NcclChannel]) -> None:
    """Free channels whose ranks have not all come."""
    for channel in made:
        channel.abort()
        channel.close()
