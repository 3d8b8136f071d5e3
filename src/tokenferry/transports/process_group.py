"""ProcessGroupTransport: messages by send and receive of CPU tensors over a torch.distributed process group.

Works wherever gloo does, across hosts too. A message is two sends: a header of fixed size (watermark, body size, the
backend's integers), then the body, whose receive is posted when its size is known.

Tags are 0x40000000 | group id (14 bits) | number of the message between two ranks (15 bits) | part, so that groups on
one process group, and calls in flight together, do not receive each other's messages. The number is not that of the
call, because calls may skip ranks: then a rank that leaves need not know which call a peer makes next. Each peer and
direction is awaited separately, so that an error can name the peer.

When one wait times out, gloo closes every connection of the process group. The first failure of a call is therefore its
cause, and nothing can continue after it: a `PeerTimeout` of this transport ends the process group too.

A connection whose next message belongs to a receive that nobody holds any more stands still, for all users of the
process group. So what was started and is not known to be done is held until the process group goes.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.errors import BackendUnavailable, PeerTimeout
from tokenferry.transports.base import (
    HEADER_INTS,
    CallId,
    Check,
    Deadline,
    LastMessages,
    Message,
    Watermarks,
    peer_timeout,
)
from tokenferry.transports.lifetime import Watch
from tokenferry.transports.refused import resource_error

_TAG = 0x40000000
GROUP_IDS = 1 << 14
"""The number of ids of groups; handshakes have id 0."""
_LINGER_S = 5.0
_NEVER = timedelta(days=3650)
_LATE_S = 0.1
"""Seconds that a wait takes at least: this rank may have been stopped, and gloo has yet to read what has come."""
_LEFT = -1
"""In place of a watermark: the sender makes no more calls, and the body is its reason."""


@dataclass(frozen=True, slots=True, eq=False)
class _Send:
    """A started send to one peer."""

    peer: int
    work: dist.Work


@dataclass(frozen=True, slots=True, eq=False)
class _HeaderReceive:
    """A started receive of a header; ``number`` counts the messages of its peer."""

    work: dist.Work
    header: Tensor
    number: int


@dataclass(frozen=True, slots=True, eq=False)
class _BodyReceive:
    """A message whose header has arrived; ``work`` receives its body, or is None if there is nothing to wait for."""

    work: dist.Work | None
    message: Message


@dataclass(slots=True, eq=False)
class _InFlight:
    """A call that this rank has opened: its sends, and by peer the receives and the errors to raise.

    ``undeliverable``: there was no memory for a body, for whose receipt its sender waits.
    """

    call: CallId
    buffers: list[Tensor]
    readers: frozenset[int] = frozenset()
    sends: list[_Send] = field(default_factory=list)
    header_sends: list[dist.Work] = field(default_factory=list)
    headers: dict[int, _HeaderReceive] = field(default_factory=dict)
    bodies: dict[int, _BodyReceive] = field(default_factory=dict)
    failed: dict[int, PeerTimeout] = field(default_factory=dict)
    undeliverable: bool = False

    def drop(self, peer: int) -> list[dist.Work]:
        """Expect nothing more from a peer; return what may still be going on with it."""
        header, body = self.headers.pop(peer, None), self.bodies.pop(peer, None)
        self.failed.pop(peer, None)
        works = [header.work] if header is not None else []
        works += [body.work] if body is not None and body.work is not None else []
        works += [send.work for send in self.sends if send.peer == peer]
        self.sends = [send for send in self.sends if send.peer != peer]
        return works


_unfinished: WeakKeyDictionary[dist.ProcessGroup, list[dist.Work]] = WeakKeyDictionary()
"""Sends and receives of groups that ended before these did, with their memory; kept as long as the process group."""


class ProcessGroupTransport:
    """The transport over any process group that can send CPU tensors.

    Args:
        group: The process group.
        group_id: A number that differs between the groups on one process group.
        processes: For peers on this host, descriptors of their processes; see `tokenferry.transports.lifetime`. The
            transport closes them.
    """

    name = "process_group"

    def __init__(
        self, group: dist.ProcessGroup, group_id: int = 0, processes: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        self._lingering: deque[_InFlight] = deque()
        self.rank = group.rank()
        self.num_ranks = group.size()
        self.order: Sequence[int] = range(self.num_ranks)
        self._group = group
        self._tag = _TAG | (group_id % GROUP_IDS) << 16
        self._watermarks = Watermarks(self.num_ranks)
        self._last_messages = LastMessages(self.num_ranks)
        self._in_flight: dict[int, _InFlight] = {}
        self._dropped: list[dist.Work] = []
        self._watch = Watch(processes, partial(_fail, group, self._tag))
        self._next_numbers = [1] * self.num_ranks

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return new tensors. See `Transport.open`."""
        self._free_lingering()
        current = _InFlight(call, [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes])
        self._in_flight[call.number] = current
        return current.buffers

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Start all sends and the receives of all headers. See `Transport.post`."""
        current = self._in_flight[call.number]
        current.readers = frozenset(range(self.num_ranks)) - {self.rank} - skip
        current.bodies[self.rank] = _BodyReceive(None, Message(headers[self.rank], current.buffers[self.rank]))
        for peer in sorted(current.readers):
            try:
                self._post_to(peer, current, headers[peer])
            except PeerTimeout as error:  # still send to the other peers; `receive` raises the error
                current.failed[peer] = error

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for one message. See `Transport.receive`.

        The first receive of a call waits for all headers and starts the receives of all bodies, so that the bodies of
        several peers arrive together.
        """
        current = self._in_flight[call.number]
        for error in current.failed.values():
            raise error
        for peer in list(current.headers):
            self._receive_header(current, peer, deadline, check)
        for error in current.failed.values():
            raise error
        body = current.bodies[src]
        if body.work is not None:
            self._wait(body.work, call, src, deadline)
        del current.bodies[src]
        self._last_messages.record(src, call)
        return body.message

    def finish(self, call: CallId, deadline: Deadline | None) -> None:
        """Wait for the sends. See `Transport.finish`.

        Without a deadline, keep the buffers until the watermarks of their readers have reached the call.
        """
        current = self._in_flight[call.number]
        self._watermarks.finish(call.number)
        if deadline is None:
            self._lingering.append(current)
        else:
            for send in current.sends:
                self._wait(send.work, call, send.peer, deadline)
        del self._in_flight[call.number]

    def forget(self, call: CallId) -> None:
        """Do nothing: the receives have begun, and the process group has no way to end them. See `Transport.forget`."""

    def drop_peer(self, src: int) -> None:
        """Stop waiting for messages from and to ``src``. See `Transport.drop_peer`."""
        for current in self._in_flight.values():
            self._dropped += current.drop(src)

    def announce_call(self, number: int, skip: frozenset[int]) -> None:
        """Do nothing: no rank returns after a timeout, which ends the process group. See `Transport.announce_call`."""

    def highest_announced_call(self) -> int:
        """Return 0, since no rank announces a call. See `Transport.highest_announced_call`."""
        return 0

    def skip_to(self, number: int) -> None:
        """Do nothing: all ranks have made the same number of calls. See `Transport.skip_to`."""

    def leave(self, why: str, *, wait: bool) -> None:
        """Send the reason as the message of the next call. See `Transport.leave`."""
        if not wait:
            return
        text = torch.frombuffer(bytearray(why.encode()), dtype=torch.uint8)
        header = torch.tensor([_LEFT, text.numel(), *[0] * HEADER_INTS], dtype=torch.int64, device="cpu")
        deadline, sends, patience_s, call = Deadline(_LINGER_S), [], _LINGER_S, CallId(0, "leave")
        try:
            self._drain(deadline)
        except (PeerTimeout, RuntimeError, MemoryError):
            patience_s = 0.0  # then the waits below time out: gloo closes all connections, which peers see at once
        for peer in sorted(set(range(self.num_ranks)) - {self.rank}):
            with contextlib.suppress(PeerTimeout, RuntimeError):
                tag = self._tag_of(self._next_numbers[peer])
                sends += [self._start("send", header, peer, call, tag), self._start("send", text, peer, call, tag | 1)]
        for work in sends:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=max(min(deadline.left(), patience_s), 0.001)))

    def reason(self, src: int) -> str:
        """Return nothing: a message is received only in a call. See `Transport.reason`."""
        return ""

    def abandon(self) -> None:
        """Make gloo close all connections, which ends the process group. See `Transport.abandon`."""
        for step in range(1, self.num_ranks):
            with contextlib.suppress(OSError, MemoryError):
                if _fail(self._group, self._tag, (self.rank + step) % self.num_ranks):
                    break

    def close(self, *, linger: bool) -> None:
        """Give up what is under way; the process group belongs to the caller and stays open. See `Transport.close`."""
        works = [send.work for current in self._lingering for send in current.sends]
        # Peers need the headers of a call that failed here, to report why. They may never receive its bodies.
        works += [work for current in self._in_flight.values() for work in current.header_sends]
        if linger and works and _are_done(works, _LINGER_S):
            self._lingering.clear()
        self._hold_unfinished()
        self._watch.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: `sys` may be gone
        if not finalizing():
            self._hold_unfinished()

    def _hold_unfinished(self) -> None:
        for current in (*self._lingering, *self._in_flight.values()):
            for peer in range(self.num_ranks):
                self._dropped += current.drop(peer)
        if self._dropped:
            _unfinished.setdefault(self._group, []).extend(self._dropped)
        self._lingering.clear()
        self._in_flight.clear()
        self._dropped = []

    def _post_to(self, peer: int, current: _InFlight, header: tuple[int, ...]) -> None:
        number, call = self._next_numbers[peer], current.call
        tag = self._tag_of(number)
        incoming = torch.empty(HEADER_INTS + 2, dtype=torch.int64, device="cpu")
        current.headers[peer] = _HeaderReceive(self._start("recv", incoming, peer, call, tag), incoming, number)
        body = current.buffers[peer]
        outgoing = torch.tensor([self._watermarks.local, body.numel(), *header], dtype=torch.int64, device="cpu")
        current.header_sends.append(self._start("send", outgoing, peer, call, tag))
        self._next_numbers[peer] = number + 1
        current.sends.append(_Send(peer, current.header_sends[-1]))
        if body.numel():
            current.sends.append(_Send(peer, self._start("send", body, peer, call, tag | 1)))

    def _receive_header(self, current: _InFlight, peer: int, deadline: Deadline, check: Check | None) -> None:
        # The call cannot end before the headers of the others have come, too.
        awaited = tuple(current.headers)
        started = current.headers[peer]
        self._wait(started.work, current.call, peer, deadline, awaited)
        del current.headers[peer]
        watermark, size, *header = started.header.tolist()
        if watermark == _LEFT:
            # Raised only when the headers of all others have come, or these ranks would wait for this one.
            current.failed[peer] = self._left(current.call, peer, size, self._tag_of(started.number) | 1, deadline)
            return
        self._watermarks.update(peer, watermark)
        if check is not None:
            check(peer, tuple(header))
        current.undeliverable = True  # until there is memory for the body
        body = torch.empty(size, dtype=torch.uint8, device="cpu")
        current.undeliverable = False
        tag = self._tag_of(started.number) | 1
        work = self._start("recv", body, peer, current.call, tag) if size else None
        current.bodies[peer] = _BodyReceive(work, Message(tuple(header), body))

    def _drain(self, deadline: Deadline) -> None:
        """Receive what peers have sent in the calls in flight, for which they wait: else they could not be told."""
        for current in self._in_flight.values():
            if current.undeliverable:
                raise MemoryError
            for peer in list(current.headers):
                self._receive_header(current, peer, deadline, None)
            for peer, body in current.bodies.items():
                if body.work is not None:
                    self._wait(body.work, current.call, peer, deadline)

    def _left(self, call: CallId, peer: int, size: int, tag: int, deadline: Deadline) -> PeerTimeout:
        """Receive the reason why a peer left the group, and return the error to raise."""
        text = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._wait(self._start("recv", text, peer, call, tag), call, peer, deadline)
        why = f"it left the group: {bytes(text.tolist()).decode(errors='replace')}"
        return peer_timeout(call, self.rank, [peer], why, deadline.waited(), self._last_messages.describe(peer))

    def _tag_of(self, number: int) -> int:
        """Return the tag of the header of a message; that of its body is odd."""
        return self._tag | (number & 0x7FFF) << 1

    def _start(self, verb: str, tensor: Tensor, peer: int, call: CallId, tag: int) -> dist.Work:
        try:
            work: dist.Work = getattr(self._group, verb)([tensor], peer, tag)
        except RuntimeError as error:
            if resource_error("", error) is not None:  # no peer's fault
                raise
            if "No backend type associated with device type cpu" in str(error):
                raise BackendUnavailable(
                    f"the process group cannot move CPU tensors ({error}); pass a group made with backend 'gloo' or "
                    "'cpu:gloo,cuda:nccl'"
                ) from None
            last = self._last_messages.describe(peer)
            raise peer_timeout(call, self.rank, [peer], _reason(error), 0.0, last) from error
        return work

    def _wait(
        self, work: dist.Work, call: CallId, peer: int, deadline: Deadline, awaited: tuple[int, ...] = ()
    ) -> None:
        """Wait for work with a peer; less long if the process of that peer, or of another in ``awaited``, has ended."""
        try:
            with self._watch.waiting(peer, awaited):
                # gloo waits for whole milliseconds, not a fraction less than the deadline, and takes 0 for "no limit".
                left = max(deadline.left(), _LATE_S)
                work.wait(timedelta(milliseconds=int(left * 1000.0) + 1))
        except RuntimeError as error:
            if resource_error("", error) is not None:  # no peer's fault
                raise
            silent = deadline.left() == 0 and "Connection closed" not in str(error)
            why = "no answer within timeout_s" if silent else _reason(error)
            ended = [other for other in (peer, *awaited) if self._watch.ended(other)]
            if ended:
                peer, why = ended[0], "its process ended"
            last = self._last_messages.describe(peer)
            raise peer_timeout(call, self.rank, [peer], why, deadline.waited(), last) from error

    def _free_lingering(self) -> None:
        """Free the buffers that all readers have read. Others must stay, since gloo may still read them."""
        while self._lingering:
            oldest = self._lingering[0]
            if not self._watermarks.reached(oldest.call.number, oldest.readers):
                break
            self._lingering.popleft()


def _are_done(works: Sequence[dist.Work], seconds: float) -> bool:
    """Return whether all are done, or have failed, within some seconds; the process group survives if they are not."""
    left = deque(works)

    def wait() -> None:
        while left:
            with contextlib.suppress(RuntimeError):
                left[0].wait(_NEVER)
            left.popleft()

    # In a thread: if gloo's own wait timed out, it would close all connections.
    thread = threading.Thread(target=wait, name="tokenferry-linger", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there may be no thread left for it
        return False
    thread.join(seconds)
    if thread.is_alive():
        atexit.register(_end_waits, thread, left)
    return not thread.is_alive()


def _end_waits(thread: threading.Thread, left: deque[dist.Work]) -> None:
    """End a thread of `_are_done` before the interpreter ends: a thread that comes back from gloo later aborts it."""
    if thread.is_alive():
        with contextlib.suppress(RuntimeError, IndexError):
            left[-1].wait(timedelta(milliseconds=1))  # which closes all connections
        thread.join(_LINGER_S)


def _fail(group: dist.ProcessGroup, tag: int, peer: int) -> bool:
    """Make the running waits of a process group fail: if one times out, gloo closes all connections.

    Returns:
        bool: Whether it did; False if the connection to this peer is closed already, which does nothing to the others.
    """
    nothing = torch.empty(1, dtype=torch.uint8, device="cpu")
    try:
        group.recv([nothing], peer, tag).wait(timedelta(milliseconds=1))
    except RuntimeError as error:
        return "Timed out" in str(error)
    return False


def _reason(error: RuntimeError) -> str:
    return f"its connection failed, the process may have ended ({str(error).splitlines()[0][:160]})"
