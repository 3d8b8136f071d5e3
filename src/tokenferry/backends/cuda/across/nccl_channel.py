"""The connections of a rail over NCCL: how they are made, and where exchanges lie among the work of the device."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from tokenferry.backends.cuda.across.nccl import Communicator, NcclError
from tokenferry.backends.cuda.across.rails import Parts
from tokenferry.backends.cuda.bounded import BoundedDict

_MAX_STREAMS = 64


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

    def start(self, parts: Parts) -> Marks:
        """Begin an exchange, behind the work of the current stream.

        Raises:
            NcclError: a connection has failed.
        """
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


class NcclChannel:
    """See `RailChannel`.

    Args:
        communicator: The ranks of the rail, in the order of nodes.
        device: The device of this rank.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator = communicator
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._captured = False
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._streams: BoundedDict[int, Any] = BoundedDict(_MAX_STREAMS)
        self.error, self.abort = communicator.error, communicator.abort

    def greet(self) -> None:
        """Exchange a byte with each other rank, for NCCL connects two ranks when they first do. Blocks."""
        ranks = range(self._communicator.num_ranks)
        words = torch.zeros(2, len(ranks), dtype=torch.uint8, device=self._stream.device)
        others = [rank for rank in ranks if rank != self._communicator.rank]
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._communicator.exchange(
            [(words[sent, rank].data_ptr(), 1, rank, bool(sent)) for rank in others for sent in (0, 1)],
            self._stream.cuda_stream,
        )
        self._stream.synchronize()

    def start(self, parts: Parts) -> Marks:
        """See `RailChannel.start`."""
        begun, ended, stream = torch.cuda.Event(), torch.cuda.Event(), self._stream  # type: ignore[no-untyped-call]
        begun.record(self._current())
        begun.wait(stream)
        if not torch.cuda.is_current_stream_capturing():
            self._communicator.exchange(parts, stream.cuda_stream)
            ended.record(stream)
            return Marks(begun.query, ended.query, lambda: ended.wait(self._current()))
        self._captured = True
        # Events of a capture only order it. Those that can be asked about replays are nodes of the graph.
        reached, left = torch.cuda.Event(external=True), torch.cuda.Event(external=True)  # type: ignore[no-untyped-call]
        reached.record(stream)
        self._communicator.exchange(parts, stream.cuda_stream)
        left.record(stream)
        ended.record(stream)
        return Marks(reached.query, left.query, ended.wait, captured=True)

    def _current(self) -> Any:  # noqa: ANN401 - a stream of torch
        """Return the current stream, sooner than torch, which events ask for it otherwise."""
        handle = torch._C._cuda_getCurrentRawStream(self._index)
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = torch.cuda.current_stream(self._index)
        return stream

    def close(self) -> None:
        """See `RailChannel.close`."""
        if not self._captured:  # NCCL waits for the end of graphs
            self._communicator.close()


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
    late = threading.Event()

    def run() -> None:
        try:
            made.append(make())
            made[0].greet()
        except Exception as error:  # noqa: BLE001 - raised below
            failures.append(error)
        if made and late.is_set():
            made[0].abort()

    thread = threading.Thread(target=run, name="tokenferry-connect", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        late.set()
        for channel in made:
            channel.abort()
        raise NcclError(f"connecting the ranks of a rail did not end within {timeout_s:.0f} s")
    for failure in failures:
        for channel in made:
            channel.abort()
        raise failure
    return made[0]
