"""A transport between threads of one process, and groups on it: many topologies in a second.

It promises no more than `Transport` does: the bytes of a message are spoilt as soon as its call is finished.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenferry import ExpertGroup, MoeShape
from tokenferry.backends.cpu.backend import CpuBackend
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.topology import Topology
from tokenferry.transports.base import CallId, Check, Deadline, Message, peer_timeout

TIMEOUT_S = 30.0
SPOILT = 0xA5


class Mail:
    """The messages under way between the threads, by call number, source and destination."""

    def __init__(self) -> None:
        self.messages: dict[tuple[int, int, int], Message] = {}
        self.changed = threading.Condition()
        self.failed = False

    def abort(self) -> None:
        """End all waits, after a rank has failed."""
        with self.changed:
            self.failed = True
            self.changed.notify_all()


@dataclass(eq=False)
class _InFlight:
    """A call that a rank has opened and not finished; ``bodies``: what it may read until then."""

    buffers: list[Tensor]
    header: tuple[int, ...] = ()
    bodies: list[Tensor] = field(default_factory=list)


class MemoryTransport:
    """See `tokenferry.transports.base.Transport`. Ranks that fail end all others."""

    name = "memory"

    def __init__(self, rank: int, num_ranks: int, mail: Mail) -> None:
        self.rank, self.num_ranks, self.order = rank, num_ranks, range(num_ranks)
        self._mail = mail
        self._in_flight: dict[int, _InFlight] = {}

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        buffers = [torch.full((size,), SPOILT, dtype=torch.uint8) for size in sizes]
        self._in_flight[call.number] = _InFlight(buffers)
        return buffers

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        current = self._in_flight[call.number]
        current.header = headers[self.rank]
        with self._mail.changed:
            for dst in set(range(self.num_ranks)) - skip - {self.rank}:
                self._mail.messages[call.number, self.rank, dst] = Message(headers[dst], current.buffers[dst])
            self._mail.changed.notify_all()

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        current = self._in_flight[call.number]
        own = Message(current.header, current.buffers[self.rank])
        message = own if src == self.rank else self._take(call, src, deadline)
        if check is not None:
            check(src, message.header)
        current.bodies.append(message.body)
        return message

    def _take(self, call: CallId, src: int, deadline: Deadline) -> Message:
        mail, key = self._mail, (call.number, src, self.rank)
        with mail.changed:
            mail.changed.wait_for(lambda: key in mail.messages or mail.failed, deadline.left())
            if key not in mail.messages:
                raise peer_timeout(call, self.rank, [src], "no answer", deadline.waited(), "")
            return mail.messages.pop(key)

    def forget(self, call: CallId) -> None:
        pass

    def finish(self, call: CallId, deadline: Deadline | None, late: frozenset[int] = frozenset()) -> None:
        for body in self._in_flight.pop(call.number).bodies:
            body.fill_(SPOILT)

    def drop_peer(self, src: int) -> None:
        raise NotImplementedError

    def announce_call(self, number: int, skip: frozenset[int]) -> None:
        raise NotImplementedError

    def highest_announced_call(self) -> int:
        raise NotImplementedError

    def skip_to(self, number: int) -> None:
        raise NotImplementedError

    def leave(self, why: str, *, wait: bool) -> None:
        self._mail.abort()

    def reason(self, src: int) -> str:
        return ""

    def abandon(self) -> None:
        self._mail.abort()

    def close(self, *, linger: bool) -> None:
        self._in_flight.clear()


class MemoryPair:
    """Opens a group of threads; stands for the contract suite's `Pair`."""

    backend = "cpu"
    transport = "memory"
    device = torch.device("cpu")

    def __init__(self, rank: int, nodes: tuple[tuple[int, ...], ...], mail: Mail) -> None:
        self._topology = Topology(rank, nodes)
        self._mail = mail

    def open(self, pg: None, shape: MoeShape) -> ExpertGroup:
        topology = self._topology
        transport = MemoryTransport(topology.rank, topology.num_nodes * topology.ranks_per_node, self._mail)
        exchange = Exchange(transport, TIMEOUT_S, mask_on_timeout=False)
        group = object.__new__(ExpertGroup)
        group._adopt(CpuBackend(exchange, topology, "memory", "threads"), shape, TIMEOUT_S)
        return group


def run_threads(nodes: tuple[tuple[int, ...], ...], job: Callable[..., Any], *args: object) -> list[Any]:
    """Call ``job(rank, None, pair, *args)`` in a thread for each rank; return its results, or raise the first error.

    Every message has to be received: one that is left shows that ranks disagree about who sends to whom.
    """
    mail, num_ranks = Mail(), sum(map(len, nodes))

    def work(rank: int) -> Any:
        try:
            return job(rank, None, MemoryPair(rank, nodes, mail), *args)
        except BaseException:
            mail.abort()
            raise

    with ThreadPoolExecutor(num_ranks) as pool:
        jobs = [pool.submit(work, rank) for rank in range(num_ranks)]
    errors = [job.exception() for job in jobs if job.exception()]
    for error in sorted(errors, key=lambda one: isinstance(one, TimeoutError)):
        raise error
    assert not mail.messages, f"nobody received {sorted(mail.messages)}"
    return [job.result() for job in jobs]
