"""A network between ranks of one process: the library of ring.cuh, and a thread that copies what kernels put.

The thread stands for the network card. It can delay puts, reorder and lose them, as a network may, and reports what it
has done.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tokenferry.backends.cuda.across.puts import Network, RegionSizes
from tokenferry.kernels.network import linked
from tokenferry.kernels.rail_receive import spec as receive_spec
from tokenferry.kernels.rail_send import spec as send_spec
from tokenferry.memory.tensor import bytes_at
from tokenferry.topology import Topology

_RING = (Path(__file__).parent / "ring.cuh").read_text()
SEND, RECEIVE = (linked(spec, _RING, relocatable=False) for spec in (send_spec.SPEC, receive_spec.SPEC))
_ENTRIES = 32
_IDLE_S = 0.0002


class _Entry(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("to", "source", "signal", "value")),
        *((name, ctypes.c_uint32) for name in ("bytes", "rank", "ready", "unused")),
    )


class _Ring(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("head", "taken", "complete", "unused")),
        ("entries", _Entry * _ENTRIES),
    )


@dataclass(frozen=True)
class Put:
    """A put that has not been done yet.

    Attributes:
        number: Its place among those of its rank.
        sender: Its rank.
        rank: The rank to which it goes.
        to: Where to, in the region of the sender.
        source: Where from.
        num_bytes: How much.
        signal: The word that is set afterwards, in the region of the sender.
        value: Its value.
        due: When it is done, at the earliest.
    """

    number: int
    sender: int
    rank: int
    to: int
    source: int
    num_bytes: int
    signal: int
    value: int
    due: float

    @property
    def exchange(self) -> int:
        """The number of its exchange."""
        return self.value >> 32


@dataclass(frozen=True)
class Weather:
    """What a network does to puts.

    Attributes:
        delay_s: The longest delay of a put.
        is_late: Returns whether the puts of a rank are delayed.
        reorder: Whether those that are due are done in any order.
        loses: Returns whether a put is lost.
        seed: Of delays and orders.
    """

    delay_s: float = 0.0
    is_late: Callable[[int], bool] = lambda _: True
    reorder: bool = False
    loses: Callable[[Put], bool] = lambda _: False
    seed: int = 0


CALM = Weather()


@dataclass
class Report:
    """What a network has done.

    Attributes:
        puts: Puts that were done.
        reordered: Those that were done after a later one of the same rank.
        delayed: Those that had to wait.
        lost: Those that were not done.
        num_bytes: Bytes that were put.
    """

    puts: int = 0
    reordered: int = 0
    delayed: int = 0
    lost: list[Put] = field(default_factory=list)
    num_bytes: int = 0


class FakeNetwork:
    """The network of R ranks.

    Args:
        num_ranks: R.
        sizes: The sizes of the memory that ranks put into.
        device: Where it is.
        weather: What happens to puts.

    Attributes:
        report: What has happened.
    """

    def __init__(self, num_ranks: int, sizes: RegionSizes, device: torch.device, weather: Weather) -> None:
        self._sizes, self._device, self._weather = sizes, device, weather
        self._pick = random.Random(weather.seed)
        self.report = Report()
        self._regions = [torch.zeros(sizes.num_bytes, dtype=torch.uint8, device=device) for _ in range(num_ranks)]
        pin = device.type == "cuda"
        self._memory = [
            torch.zeros(ctypes.sizeof(_Ring), dtype=torch.uint8, device="cpu", pin_memory=pin) for _ in range(num_ranks)
        ]
        self._rings = [_Ring.from_address(memory.data_ptr()) for memory in self._memory]
        self._latest = [-1] * num_ranks
        self._stream = torch.cuda.Stream(device) if pin else None
        self._value = torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=pin)
        if (
            self._stream is not None
        ):  # what copies is loaded now: a driver that loads it later waits for running kernels
            region, half = self._regions[0], sizes.num_bytes // 2
            for num_bytes in (16, half):
                self._copy_bytes(region.data_ptr() + half, region.data_ptr(), num_bytes)
            self._signal(region.data_ptr(), 0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def network(self, topology: Topology, mapped: Callable[[int], bool] = lambda _: False) -> Network:
        """Return the network of a rank.

        Args:
            topology: The nodes, as the rank sees them.
            mapped: Returns whether the memory of a rail peer is mapped.
        """
        rail = topology.rail
        peers = [self._regions[rank].data_ptr() if mapped(rank) and rank != topology.rank else 0 for rank in rail]
        words = [*peers, *rail, ctypes.addressof(self._rings[topology.rank])]
        table = torch.tensor(words, dtype=torch.int64, device=self._device)
        region = self._regions[topology.rank]
        return Network("fake", SEND, RECEIVE, self._sizes, region.data_ptr(), table, self)

    def num_complete(self, rank: int) -> int:
        """Return how many puts of a rank have been done, or lost."""
        return self._rings[rank].complete

    def close(self) -> None:
        """End the thread; what was put and not done stays so."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        waiting: list[Put] = []
        while not self._closed.is_set():
            for rank in range(len(self._rings)):
                waiting += self._take(rank)
            now = time.monotonic()
            due = [put for put in waiting if put.due <= now]
            if not due:
                time.sleep(_IDLE_S)
                continue
            put = self._pick.choice(due) if self._weather.reorder else due[0]
            waiting.remove(put)
            self._do(put)

    def _take(self, rank: int) -> list[Put]:
        """Return the puts that the kernels of a rank have written."""
        ring, taken = self._rings[rank], []
        delay_s = self._weather.delay_s if self._weather.is_late(rank) else 0.0
        while (entry := ring.entries[ring.taken % _ENTRIES]).ready == ring.taken + 1:
            due = time.monotonic() + delay_s * self._pick.random()
            ends = (entry.rank, entry.to, entry.source)
            taken.append(Put(ring.taken, rank, *ends, entry.bytes, entry.signal, entry.value, due))
            ring.taken += 1
        return taken

    def _do(self, put: Put) -> None:
        if self._weather.loses(put):
            self.report.lost.append(put)
        else:
            shift = self._regions[put.rank].data_ptr() - self._regions[put.sender].data_ptr()
            self._copy(put, shift)
            self.report.puts += 1
            self.report.num_bytes += put.num_bytes
            self.report.delayed += self._weather.delay_s > 0
            self.report.reordered += put.number < self._latest[put.sender]
            self._latest[put.sender] = max(put.number, self._latest[put.sender])
        self._rings[put.sender].complete += 1

    def _copy(self, put: Put, shift: int) -> None:
        """Copy the data, and then set the signal."""
        if self._stream is None:
            ctypes.memmove(put.to + shift, put.source, put.num_bytes)
            ctypes.c_uint64.from_address(put.signal + shift).value = put.value
            return
        self._copy_bytes(put.to + shift, put.source, put.num_bytes)
        self._signal(put.signal + shift, put.value)

    def _copy_bytes(self, to: int, source: int, num_bytes: int) -> None:
        with torch.cuda.stream(self._stream):
            bytes_at(to, num_bytes, self._device, self).copy_(bytes_at(source, num_bytes, self._device, self))
        self._stream.synchronize()

    def _signal(self, at: int, value: int) -> None:
        """Set a word, by a copy: the kernel of a fill may be one that is not loaded yet."""
        self._value.fill_(value)
        with torch.cuda.stream(self._stream):
            bytes_at(at, 8, self._device, self).view(torch.int64).copy_(self._value, non_blocking=True)
        self._stream.synchronize()
