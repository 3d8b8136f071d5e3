"""Rails between the threads of an emulated group: queues of copies."""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.backends.cuda.across.rails import Compare, Parts, Transfer, between_nodes
from tokenferry.backends.cuda.context import Call
from tokenferry.errors import PeerTimeout, TokenferryError
from tokenferry.topology import Topology
from tokenferry.transports.base import peer_timeout
from tokenferry.transports.failures import FailureReports

_POLL_S = 0.05
ASK_S = 1.0
"""How long an exchange lasts before it asks whether another rank has failed."""


class Boxes:
    """The queues of a group, by source and destination.

    Attributes:
        group: Has a store, as a process group has.
    """

    def __init__(self) -> None:
        store = dist.HashStore()
        self.group: Any = SimpleNamespace(get_group_store=lambda: store)
        self._lock = threading.Lock()
        self._queues: dict[tuple[int, int], queue.SimpleQueue[list[bytes]]] = defaultdict(queue.SimpleQueue)

    def __getitem__(self, ends: tuple[int, int]) -> queue.SimpleQueue[list[bytes]]:
        with self._lock:
            return self._queues[ends]


def elsewhere(parts: Parts) -> tuple[Parts, object]:
    """Return the same parts, but for what is received in other memory, and this."""
    kept = [torch.empty(num_bytes, dtype=torch.uint8, device="cpu") for _, num_bytes, _, _ in parts]
    made = [part if part[3] else (there.data_ptr(), *part[1:]) for part, there in zip(parts, kept, strict=True)]
    return made, kept


def by_node(parts: Parts, *, sent: bool) -> dict[int, list[tuple[int, int]]]:
    """Return the addresses and bytes of what is sent, or received, by node."""
    found: dict[int, list[tuple[int, int]]] = {}
    for address, num_bytes, node, is_sent in parts:
        if is_sent is sent:
            found.setdefault(node, []).append((address, num_bytes))
    return found


class QueueRails:
    """As `tokenferry.backends.cuda.across.rails.Rails`. What has come is written only when it is waited for.

    Attributes:
        num_bytes: Bytes that this rank has sent.
        compared: What comparing calls has found, for each exchange that brings what ranks say.
    """

    name = "queues"

    def __init__(self, topology: Topology, boxes: Boxes, timeout_s: float) -> None:
        self.reports = FailureReports(boxes.group, 0, topology)
        self._rank, self._rail, self._boxes, self._timeout_s = topology.rank, topology.rail, boxes, timeout_s
        self._mismatched: Callable[[], bool] = lambda: False
        self.num_bytes = 0
        self.lost: PeerTimeout | None = None
        self.mismatch: TokenferryError | None = None
        self.compared: list[TokenferryError | None] = []

    def exchange(self, call: Call, parts: Parts, kept: object, compare: Compare | None = None) -> Transfer:
        for node, places in by_node(parts, sent=True).items():
            assert all(num_bytes for _, num_bytes in places)
            self.num_bytes += sum(num_bytes for _, num_bytes in places)
            self._boxes[self._rank, self._rail[node]].put([ctypes.string_at(*place) for place in places])
        return QueueTransfer(lambda: self._receive(call, parts, kept, compare), self.raise_lost)

    def _receive(self, of: Call, parts: Parts, _kept: object, compare: Compare | None) -> None:
        call = between_nodes(of)
        for node, places in by_node(parts, sent=False).items():
            peer = self._rail[node]
            start = time.monotonic()
            came = self._take(self._boxes[peer, self._rank])
            if came is None:
                raise peer_timeout(call, self._rank, [peer], "nothing came", time.monotonic() - start, "")
            for (address, num_bytes), there in itertools.zip_longest(places, came[: len(places)]):
                if there is None or len(there) != num_bytes:
                    # NCCL does not compare sizes, and may wait until the deadline. The exchange is given up, and ends.
                    self.lost = peer_timeout(call, self._rank, [peer], "other sizes came", 0.0, "")
                    break
                ctypes.memmove(address, there, num_bytes)
        if compare is not None:
            self.compared.append(compare())
            if self.lost is not None:
                self.mismatch = self.compared[-1]

    def _take(self, box: queue.SimpleQueue[list[bytes]]) -> list[bytes] | None:
        start = time.monotonic()
        while time.monotonic() < start + self._timeout_s and not self._mismatched():
            with suppress(queue.Empty):
                return box.get(timeout=_POLL_S)
            if time.monotonic() > start + ASK_S and self.reports.have_come():
                return None
        return None

    def end_soon_if(self, mismatched: Callable[[], bool]) -> None:
        """See `Rails.end_soon_if`; here they end at once."""
        self._mismatched = mismatched

    def raise_lost(self) -> None:
        """See `Rails.raise_lost`; an exchange that brings nothing at all raises where it is waited for."""
        if self.lost is not None:
            raise self.lost

    def finish(self) -> None:
        """Do nothing: what was sent is in the queues."""

    def close(self) -> None:
        """Do nothing: the queues are memory."""


class QueueTransfer:
    """An exchange under way; it receives once."""

    def __init__(self, receive: Callable[[], None], raise_lost: Callable[[], None]) -> None:
        self._receive: Callable[[], None] | None = receive
        self._raise_lost = raise_lost

    def join(self) -> None:
        receive, self._receive = self._receive, None
        if receive is not None:
            receive()

    def wait(self) -> None:
        self.join()
        self._raise_lost()
