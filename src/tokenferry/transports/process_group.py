"""ProcessGroupTransport: messages over a torch.distributed process group, by its own send and receive of CPU tensors.

Works wherever gloo does, across hosts too. A message is two sends: a header of fixed size (floor, body size, the
backend's integers) and then the body, whose receive is posted when its size is known.

Tags: 0x40000000 | group id (14 bits) | call (15 bits) | part, so that groups on one process group, and calls under way
together, do not take each other's messages. A wait per peer and direction is what lets an error name the peer.

When one wait times out, gloo closes every connection of the process group. So the first failure of a call is the true
one, and nothing can go on after it: `PeerTimeout` on this transport ends the process group too.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.errors import BackendUnavailable, PeerTimeout
from tokenferry.transports.base import HEADER_INTS, CallId, Check, Deadline, Floor, LastHeard, Message, peer_timeout

_TAG = 0x40000000
_LINGER_S = 5.0


@dataclass(slots=True, eq=False)
class _Flight:
    """One call under way: what was sent, and what is being received from whom."""

    call: CallId
    buffers: list[Tensor]
    readers: frozenset[int] = frozenset()
    sends: list[tuple[int, dist.Work]] = field(default_factory=list)
    head_sends: list[dist.Work] = field(default_factory=list)
    heads: dict[int, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    bodies: dict[int, tuple[dist.Work | None, Message]] = field(default_factory=dict)
    failed: dict[int, PeerTimeout] = field(default_factory=dict)


class ProcessGroupTransport:
    """The transport that needs nothing but a process group with CPU send and receive."""

    name = "process_group"

    def __init__(self, group: dist.ProcessGroup, group_id: int = 0) -> None:
        self.rank = group.rank()
        self.num_ranks = group.size()
        self._group = group
        self._tag = _TAG | (group_id & 0x3FFF) << 16
        self._floor = Floor(self.num_ranks)
        self._heard = LastHeard(self.num_ranks)
        self._flights: dict[int, _Flight] = {}
        self._lingering: deque[_Flight] = deque()

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return plain tensors; see `Transport.open`."""
        self._drop_lingering()
        flight = _Flight(call, [torch.empty(size, dtype=torch.uint8) for size in sizes])
        self._flights[call.number] = flight
        return flight.buffers

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Start all sends and the receives of all headers; see `Transport.post`."""
        flight = self._flights[call.number]
        flight.readers = frozenset(range(self.num_ranks)) - {self.rank} - skip
        flight.bodies[self.rank] = (None, Message(headers[self.rank], flight.buffers[self.rank]))
        for peer in sorted(flight.readers):
            try:
                self._post_to(peer, flight, headers[peer])
            except PeerTimeout as error:  # the others still get theirs; `take` reports this one
                flight.failed[peer] = error

    def take(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for one message; the first take of a call posts the receives of all bodies. See `Transport.take`."""
        flight = self._flights[call.number]
        for error in flight.failed.values():
            raise error
        # All headers first: bodies of several peers then arrive while the first is awaited.
        for peer in list(flight.heads):
            self._receive_header(flight, peer, deadline, check)
        work, message = flight.bodies.pop(src)
        if work is not None:
            self._wait(work, call, src, deadline)
        self._heard.note(src, call)
        return message

    def finish(self, call: CallId, deadline: Deadline | None) -> None:
        """Free the call's buffers now if the deadline allows to wait, else when its readers' floors have passed it."""
        flight = self._flights.pop(call.number)
        self._floor.finish(call.number)
        if deadline is None:
            self._lingering.append(flight)
            return
        for peer, work in flight.sends:
            self._wait(work, call, peer, deadline)

    def forget(self, src: int) -> None:
        """Wait no more for ``src``, neither for its messages nor until it has ours. See `Transport.forget`."""
        for flight in self._flights.values():
            flight.heads.pop(src, None)
            flight.bodies.pop(src, None)
            flight.failed.pop(src, None)
            flight.sends = [(peer, work) for peer, work in flight.sends if peer != src]

    def tell_number(self, number: int, skip: frozenset[int]) -> None:
        """Do nothing: nobody comes back here, since one timeout ends the process group; see the base class."""

    def heard_number(self) -> int:
        """Nobody tells. See `Transport.heard_number`."""
        return 0

    def go_on_from(self, number: int) -> None:
        """Ranks are in step. See `Transport.go_on_from`."""

    def close(self, *, linger: bool) -> None:
        """Let go of everything; the process group is the caller's and stays. See `Transport.close`."""
        deadline = Deadline(_LINGER_S if linger else 0.0)
        works = [work for flight in self._lingering for _, work in flight.sends]
        # Of a call that failed here peers need the header, to see why; its body they may never fetch.
        works += [work for flight in self._flights.values() for work in flight.head_sends]
        for work in works:
            if deadline.left() == 0:
                break
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=deadline.left()))
        self._lingering.clear()
        self._flights.clear()

    def _post_to(self, peer: int, flight: _Flight, header: tuple[int, ...]) -> None:
        head = torch.empty(HEADER_INTS + 2, dtype=torch.int64)
        flight.heads[peer] = (self._start("recv", head, peer, flight.call, 0), head)
        body = flight.buffers[peer]
        head = torch.tensor([self._floor.mine, body.numel(), *header], dtype=torch.int64)
        flight.head_sends.append(self._start("send", head, peer, flight.call, 0))
        flight.sends.append((peer, flight.head_sends[-1]))
        if body.numel():
            flight.sends.append((peer, self._start("send", body, peer, flight.call, 1)))

    def _receive_header(self, flight: _Flight, peer: int, deadline: Deadline, check: Check | None) -> None:
        work, head = flight.heads.pop(peer)
        self._wait(work, flight.call, peer, deadline)
        floor, size, *header = head.tolist()
        self._floor.heard(peer, floor)
        if check is not None:
            check(peer, tuple(header))
        body = torch.empty(size, dtype=torch.uint8)
        receive = self._start("recv", body, peer, flight.call, 1) if size else None
        flight.bodies[peer] = (receive, Message(tuple(header), body))

    def _start(self, verb: str, tensor: Tensor, peer: int, call: CallId, part: int) -> dist.Work:
        tag = self._tag | (call.number & 0x7FFF) << 1 | part
        try:
            work: dist.Work = getattr(self._group, verb)([tensor], peer, tag)
        except RuntimeError as error:
            if "No backend type associated with device type cpu" in str(error):
                raise BackendUnavailable(
                    f"the process group cannot move CPU tensors ({error}); pass a group made with backend 'gloo' or "
                    "'cpu:gloo,cuda:nccl'"
                ) from None
            raise peer_timeout(call, self.rank, [peer], _reason(error), 0.0, self._heard.tell(peer)) from error
        return work

    def _wait(self, work: dist.Work, call: CallId, peer: int, deadline: Deadline) -> None:
        try:
            # gloo reads 0 as "no limit"
            work.wait(timedelta(seconds=max(deadline.left(), 0.001)))
        except RuntimeError as error:
            why = "no answer within timeout_s" if deadline.left() == 0 else _reason(error)
            raise peer_timeout(call, self.rank, [peer], why, deadline.waited(), self._heard.tell(peer)) from error

    def _drop_lingering(self) -> None:
        """Let go of what all its readers have read. A send that nobody received must stay: gloo may still read it."""
        while self._lingering and self._floor.passed(self._lingering[0].call.number, self._lingering[0].readers):
            self._lingering.popleft()


def _reason(error: RuntimeError) -> str:
    return f"its connection failed, the process may have ended ({str(error).splitlines()[0][:160]})"
