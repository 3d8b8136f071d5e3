"""The device under measurement and its clock. The same programs run on the CPU, where tests can look at them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Device(Protocol):
    """A device that runs work, and its clock."""

    torch_device: torch.device
    num_sms: int

    def synchronize(self) -> None: ...  # noqa: D102 - wait for all work of the device
    def stamp(self) -> object: ...  # noqa: D102 - the time at which the work so far is done
    def seconds(self, start: object, end: object) -> float: ...  # noqa: D102 - between two stamps; after synchronize
    def passed(self, stamp: object) -> bool: ...  # noqa: D102 - whether the device has reached a stamp by now
    def hold(self, seconds: float) -> None: ...  # noqa: D102 - keep the current stream busy for about so long
    def side(self, *, first: bool = True) -> Side: ...  # noqa: D102 - a stream beside the current one
    def capture(self, work: Callable[[], object]) -> Callable[[], None]: ...  # noqa: D102 - as a graph, to be replayed
    def used_bytes(self) -> int: ...  # noqa: D102 - memory of the device that is in use, by any process


_CALIBRATION_CYCLES = 4_000_000
"""About two milliseconds: long beside a launch, which is in it."""

Side = Callable[[], AbstractContextManager[Any]]
"""``with side():`` puts work on another stream. It is ordered after what the current stream holds on entry."""


class CpuDevice:
    """The CPU: work is done when a call returns, and stamps are the host's clock."""

    torch_device = torch.device("cpu")
    num_sms = 0

    def synchronize(self) -> None:
        """Do nothing: nothing is under way."""

    def stamp(self) -> float:
        """Return the time now, in seconds."""
        return time.perf_counter()

    def seconds(self, start: object, end: object) -> float:
        """Return the difference."""
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start

    def passed(self, stamp: object) -> bool:
        """Return True: a stamp is taken when it is asked for."""
        return True

    def hold(self, seconds: float) -> None:
        """Do nothing: the host does the work itself and cannot get ahead of it."""

    def side(self, *, first: bool = True) -> Side:
        """Return the only stream there is."""
        return nullcontext

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Return the work itself: there are no graphs."""

        def replay() -> None:
            work()

        return replay

    def used_bytes(self) -> int:
        """Return 0: not counted."""
        return 0


class CudaDevice:
    """This rank's GPU; stamps are events on torch's current stream."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.num_sms = int(torch.cuda.get_device_properties(self.torch_device).multi_processor_count)
        self._cycles_per_s = 0.0

    def synchronize(self) -> None:
        """Wait until all streams of the device are idle."""
        torch.cuda.synchronize(self.torch_device)

    def stamp(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: object, end: object) -> float:
        """Return the time between two events that have happened."""
        assert isinstance(start, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return float(start.elapsed_time(end)) / 1e3

    def passed(self, stamp: object) -> bool:
        """Return whether an event has happened by now."""
        assert isinstance(stamp, torch.cuda.Event)
        return bool(stamp.query())  # type: ignore[no-untyped-call]

    def hold(self, seconds: float) -> None:
        """Let one thread count cycles on the current stream."""
        # There is no public way to keep a stream busy; torch's own tests use this one.
        torch.cuda._sleep(int(seconds * self._cycle_rate()))  # type: ignore[no-untyped-call]

    def _cycle_rate(self) -> float:
        """Return the cycles of a held second, measured at first use."""
        if not self._cycles_per_s:
            for _ in range(2):  # the first loads the kernel
                start = self.stamp()
                torch.cuda._sleep(_CALIBRATION_CYCLES)  # type: ignore[no-untyped-call]
                end = self.stamp()
                self.synchronize()
                self._cycles_per_s = _CALIBRATION_CYCLES / self.seconds(start, end)
        return self._cycles_per_s

    def side(self, *, first: bool = True) -> Side:
        """Return a stream whose blocks go before those of other streams, or, with ``first=False``, an ordinary one."""
        stream = torch.cuda.Stream(self.torch_device, priority=-1 if first else 0)  # type: ignore[no-untyped-call]

        @contextmanager
        def enter() -> Iterator[None]:
            stream.wait_stream(torch.cuda.current_stream(self.torch_device))
            with torch.cuda.stream(stream):
                yield

        return enter

    def capture(self, work: Callable[[], object]) -> Callable[[], None]:
        """Run the work once, then record it as a CUDA graph; return what replays it."""
        side = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream(self.torch_device).wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
            work()

        def replay() -> None:
            graph.replay()

        return replay

    def used_bytes(self) -> int:
        """Return all memory that is not free, whichever process uses it."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total - free


def device_for(backend: str) -> Device:
    """Return the device of ``"cpu"``, or of ``"cuda"``: torch's current device."""
    return CudaDevice() if backend == "cuda" else CpuDevice()


def gather(pg: dist.ProcessGroup, item: Any) -> list[Any]:  # noqa: ANN401 - whatever can be pickled
    """Return the items of all ranks, by rank. Collective; over the CPU, also between GPUs."""
    items: list[Any] = [None] * pg.size()
    dist.all_gather_object(items, item, group=pg)
    return items


def slowest(pg: dist.ProcessGroup, seconds: Sequence[float]) -> list[float]:
    """Return the maximum over ranks of each iteration. Collective."""
    return [max(ranks) for ranks in zip(*gather(pg, list(seconds)), strict=True)]


@contextmanager
def no_collections() -> Iterator[None]:
    """Keep Python from collecting garbage in the middle of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
