"""ProcessGroupTransport: messages by send and receive of CPU tensors over a torch.distributed process group.

Works wherever gloo does, across hosts too. A message is two sends: a header of fixed size (watermark, body size, the
backend's integers), then the body, whose receive is posted when its size is known.

Tags are 0x40000000 | group id (14 bits) | number of the message between two ranks (15 bits) | part, so that groups on
one process group, and calls in flight together, do not receive each other's messages. The number is not that of the
call, because calls may skip ranks: then a rank that leaves need not know which call a peer makes next. Each peer and
direction is awaited separately, so that an error can name the peer.

Every message is received, also if nobody wants it any more (hooks that are dropped, masked ranks): else it would stay
with its sender, and be taken for a later one when its tag comes again. The headers of a peer are received in the order
in which it sends them, which costs no wait, and each is followed by the request for its body. Every header says up to
which number its sender has received the messages of the other side; until then, what was sent is held.

When one wait times out, gloo closes every connection of the process group. The first failure of a call is therefore its
cause, and nothing can continue after it: a `PeerTimeout` of this transport ends the process group too.

A connection whose next message belongs to a receive that nobody holds any more stands still, for all users of the
process group. So what was started and is not known to be done is held until the process group goes.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
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
    MOST_AWAITED,
    CallId,
    Check,
    Deadline,
    LastMessages,
    Message,
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
"""In place of the number of received messages: the sender makes no more calls, and the body is its reason."""


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A message to a peer, held until the peer has said that it has received it.

    Attributes:
        number: Counts the messages between the two ranks.
        works: The sends of its header and, if there is one, of its body; none: they are done.
        owed: How many of these sends `ProcessGroupTransport.close` gives time: that of the header while the call is in
            flight, both when it is finished.
    """

    number: int
    works: list[dist.Work]
    owed: int = 1


@dataclass(slots=True, eq=False)
class _Incoming:
    """A message of a peer that has not come, or not completely.

    Attributes:
        number: Counts the messages between the two ranks.
        header: Where its header is received, behind the number up to which the peer has received, and the body's size.
        work: Receives the header, then the body; None: nothing is under way.
        message: None until the header has come.
        checked: Whether the header has been compared with the call, if it can be.
    """

    number: int
    header: Tensor
    work: dist.Work | None
    message: Message | None = None
    checked: bool = False

    @property
    def complete(self) -> bool:
        """Whether header and body have come."""
        return self.message is not None and self.work is None


@dataclass(slots=True, eq=False)
class _InFlight:
    """A call that this rank has opened and not finished.

    Attributes:
        call: The call.
        buffers: What this rank sends, by rank, until it is posted.
        own: The message to this rank itself.
        outgoing: By peer, what was sent.
        incoming: By peer, what `ProcessGroupTransport.receive` has yet to return.
        failed: By peer, the error to raise.
    """

    call: CallId
    buffers: list[Tensor]
    own: Message | None = None
    outgoing: dict[int, _Outgoing] = field(default_factory=dict)
    incoming: dict[int, _Incoming] = field(default_factory=dict)
    failed: dict[int, PeerTimeout] = field(default_factory=dict)

    def raise_failed(self) -> None:
        """Raise the first error, if there is one."""
        for error in self.failed.values():
            raise copy.copy(error) from error.__cause__  # what is raised keeps the frames of the call


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
        self.rank = group.rank()
        self.num_ranks = group.size()
        self.order: Sequence[int] = range(self.num_ranks)
        self._group = group
        self._tag = _TAG | (group_id % GROUP_IDS) << 16
        self._last_messages = LastMessages(self.num_ranks)
        self._in_flight: dict[int, _InFlight] = {}
        # By peer, and by number: there may be messages of calls that this rank has forgotten, too.
        self._outgoing: list[deque[_Outgoing]] = [deque() for _ in range(self.num_ranks)]
        self._incoming: list[deque[_Incoming]] = [deque() for _ in range(self.num_ranks)]
        self._reasons: dict[int, str] = {}  # of peers that have left
        self._watch = Watch(processes, partial(_fail, group, self._tag))
        self._next_numbers = [1] * self.num_ranks

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return new tensors. See `Transport.open`."""
        current = _InFlight(call, [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes])
        self._in_flight[call.number] = current
        return current.buffers

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Start all sends and the receives of all headers. See `Transport.post`."""
        current = self._in_flight[call.number]
        buffers, current.buffers = current.buffers, []  # what was sent need not live as long as a hook
        current.own = Message(headers[self.rank], buffers[self.rank])
        for peer in sorted(set(range(self.num_ranks)) - {self.rank} - skip):
            try:
                self._make_room(peer, call, deadline)
                self._post_to(peer, current, headers[peer], buffers[peer])
            except PeerTimeout as error:  # still send to the other peers; `receive` raises the error
                current.failed[peer] = _without_frames(error)

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for one message. See `Transport.receive`.

        The first receive of a call waits for all headers and starts the receives of all bodies, so that the bodies of
        several peers arrive together.
        """
        current = self._in_flight[call.number]
        current.raise_failed()
        for peer, incoming in current.incoming.items():
            if check is not None and incoming.message is not None and not incoming.checked:  # it came in a later call
                incoming.checked = True
                check(peer, incoming.message.header)
        awaited = [peer for peer, incoming in current.incoming.items() if incoming.message is None]
        for step, peer in enumerate(awaited):
            # The call cannot end before the headers of the others have come, too.
            left = self._receive_header(peer, current.incoming[peer], call, deadline, awaited[step:], check)
            if left is not None:  # raised only when the headers of all others have come, or these would wait for this
                current.failed[peer] = left
        current.raise_failed()
        if src == self.rank:
            assert current.own is not None
            return current.own
        incoming = current.incoming[src]
        message = self._receive_body(src, incoming, call, deadline)
        del current.incoming[src]
        self._last_messages.record(src, call)
        return message

    def finish(self, call: CallId, deadline: Deadline | None, late: frozenset[int] = frozenset()) -> None:
        """Wait for the sends. See `Transport.finish`.

        Those for which it does not wait are held until their readers have said that they have them.
        """
        current = self._in_flight[call.number]
        for peer, outgoing in current.outgoing.items():
            outgoing.owed = 2
            if deadline is not None and peer not in late:
                for work in outgoing.works:
                    self._wait(work, call, peer, deadline)
                outgoing.works = []
                self._let_go(peer)
        del self._in_flight[call.number]

    def forget(self, call: CallId) -> None:
        """Receive its messages with those of later calls, and drop them. See `Transport.forget`."""
        self._in_flight.pop(call.number, None)

    def drop_peer(self, src: int) -> None:
        """Stop waiting for messages from and to ``src``. See `Transport.drop_peer`.

        If there are later ones, those that are under way now are received first, and dropped.
        """
        for current in self._in_flight.values():
            current.incoming.pop(src, None)
            current.failed.pop(src, None)
            current.outgoing.pop(src, None)
        for outgoing in self._outgoing[src]:
            outgoing.owed = 0

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
        """Give up what is under way; the process group belongs to the caller and stays open. See `Transport.close`.

        Peers need the headers of a call that failed here, to report why. They may never receive its bodies.
        """
        sent = [outgoing for queue in self._outgoing for outgoing in queue]
        works = [work for outgoing in sent for work in outgoing.works[: outgoing.owed]]
        if linger and works and _are_done(works, _LINGER_S):
            for outgoing in sent:
                del outgoing.works[: outgoing.owed]
        self._hold_unfinished()
        self._watch.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:  # bound: `sys` may be gone
        if not finalizing():
            self._hold_unfinished()

    def _hold_unfinished(self) -> None:
        works = [work for sent in self._outgoing for outgoing in sent for work in outgoing.works]
        works += [incoming.work for queue in self._incoming for incoming in queue if incoming.work is not None]
        if works:
            _unfinished.setdefault(self._group, []).extend(works)
        for sent, queue in zip(self._outgoing, self._incoming, strict=True):
            sent.clear()
            queue.clear()
        self._in_flight.clear()

    def _make_room(self, peer: int, call: CallId, deadline: Deadline) -> None:
        """End the receives of bodies of earlier calls that were begun before this one, and await no more than allowed.

        Nothing but the network delays such a body: its sender has sent it. And a peer that is so many messages behind
        does not need those of this call to go on.
        """
        queue = self._incoming[peer]
        while queue and queue[0].message is not None:
            self._receive_body(peer, queue[0], call, deadline)
        if len(queue) >= MOST_AWAITED:
            left = self._receive_header(peer, queue[0], call, deadline, [peer])
            if left is not None:
                # Not the variable: what is raised holds this frame.
                raise copy.copy(left) from left.__cause__

    def _post_to(self, peer: int, current: _InFlight, header: tuple[int, ...], body: Tensor) -> None:
        number, call, queue = self._next_numbers[peer], current.call, self._incoming[peer]
        tag, received = self._tag_of(number), queue[0].number - 1 if queue else number - 1
        place = torch.empty(HEADER_INTS + 2, dtype=torch.int64, device="cpu")
        current.incoming[peer] = _Incoming(number, place, self._start("recv", place, peer, call, tag))
        queue.append(current.incoming[peer])
        outgoing = torch.tensor([received, body.numel(), *header], dtype=torch.int64, device="cpu")
        current.outgoing[peer] = _Outgoing(number, [self._start("send", outgoing, peer, call, tag)])
        self._outgoing[peer].append(current.outgoing[peer])
        self._next_numbers[peer] = number + 1
        if body.numel():
            current.outgoing[peer].works.append(self._start("send", body, peer, call, tag | 1))

    def _receive_header(
        self,
        peer: int,
        last: _Incoming,
        call: CallId,
        deadline: Deadline,
        awaited: Sequence[int] = (),
        check: Check | None = None,
    ) -> PeerTimeout | None:
        """Wait in ``call`` for the header of a message, and before it for all that its peer has sent earlier.

        Returns:
            PeerTimeout | None: the error to raise, if the peer has left the group instead of sending them.
        """
        if peer in self._reasons:
            return self._has_left(call, peer, deadline)
        for incoming in list(self._incoming[peer]):
            if incoming.number > last.number:
                break
            if incoming.work is not None and incoming.message is None:
                self._wait(incoming.work, call, peer, deadline, awaited)
                incoming.work = None
            if incoming.message is None:
                received, size, *header = incoming.header.tolist()
                tag = self._tag_of(incoming.number) | 1
                if received == _LEFT:
                    return self._left(call, peer, size, tag, deadline)
                self._let_go(peer, received)
                if check is not None and incoming is last:
                    incoming.checked = True
                    check(peer, tuple(header))
                body = torch.empty(size, dtype=torch.uint8, device="cpu")
                incoming.work = self._start("recv", body, peer, call, tag) if size else None
                incoming.message = Message(tuple(header), body)
        return None

    def _receive_body(self, peer: int, incoming: _Incoming, call: CallId, deadline: Deadline) -> Message:
        """Wait in ``call`` for the body of a message whose header has come."""
        assert incoming.message is not None
        if incoming.work is not None:
            self._wait(incoming.work, call, peer, deadline)
            incoming.work = None
        queue = self._incoming[peer]
        while queue and queue[0].complete:
            queue.popleft()
        return incoming.message

    def _let_go(self, peer: int, received: int = 0) -> None:
        """Free what was sent to a peer, up to the number that it has received. gloo may still read the others."""
        queue = self._outgoing[peer]
        while queue and (queue[0].number <= received or not queue[0].works):
            queue.popleft()

    def _drain(self, deadline: Deadline) -> None:
        """Receive what peers have sent in the calls in flight, for which they wait: else they could not be notified."""
        for current in self._in_flight.values():
            for peer, incoming in current.incoming.items():
                self._receive_header(peer, incoming, current.call, deadline)
            for peer, incoming in current.incoming.items():
                if incoming.message is not None:
                    self._receive_body(peer, incoming, current.call, deadline)

    def _left(self, call: CallId, peer: int, size: int, tag: int, deadline: Deadline) -> PeerTimeout:
        """Receive the reason why a peer left the group, and return the error to raise."""
        text = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._wait(self._start("recv", text, peer, call, tag), call, peer, deadline)
        self._reasons[peer] = bytes(text.tolist()).decode(errors="replace")
        return self._has_left(call, peer, deadline)

    def _has_left(self, call: CallId, peer: int, deadline: Deadline) -> PeerTimeout:
        """Return the error to raise for a message of a peer that has left the group."""
        why = f"it left the group: {self._reasons[peer]}"
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

    def _wait(self, work: dist.Work, call: CallId, peer: int, deadline: Deadline, awaited: Sequence[int] = ()) -> None:
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


def _without_frames(error: PeerTimeout) -> PeerTimeout:
    """Return an error that is to be raised later, without the frames that hold what keeps it until then."""
    if error.__cause__ is not None:
        error.__cause__.with_traceback(None)
    return error.with_traceback(None)


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
