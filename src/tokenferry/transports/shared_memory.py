"""SharedMemoryTransport: messages between ranks of one host, through shared memory and Unix sockets.

The bodies of messages are in segments that the sender owns and the receivers map: the sender writes a row once, and the
receiver reads it once. A small notice over a Unix socket gives the position of a body. It wakes the receiver, so that
nothing spins, and it arrives after the bytes that it describes. A closed socket shows at once that its rank is gone.

A segment holds the messages of one call. It is reused when the watermarks of all its readers have reached that call
(see `tokenferry.transports.base`), so two segments alternate in steady state; with receive hooks there is one for
each call in flight. No call ever waits for a segment. Segments that no call has needed for long are given back.

A watermark cannot pass a call whose hook stays uncalled. So the messages of such a call are copied when it is a few
calls old: then the segments that they lie in are free, and so are those of all later calls.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenferry.forked import forget_in_child
from tokenferry.transports import segment as seg
from tokenferry.transports.base import (
    MOST_AWAITED,
    CallId,
    Check,
    Deadline,
    LastMessages,
    Message,
    Watermarks,
    peer_timeout,
)
from tokenferry.transports.lifetime import Connection, open_peer
from tokenferry.transports.notices import SIZE, Notice, NoticeKind, Peer

_ALIGN = 64
_COPY_AFTER = 16
"""Calls after which the messages of an older one that has not been received are copied; no ordinary hook waits so long,
not that of a call of several exchanges either."""
_IDLE_AFTER = 256
"""Calls after which a segment that was free all the time is given back."""


@dataclass(slots=True, eq=False)
class _InFlight:
    """A call that this rank has opened and not finished.

    Attributes:
        buffers: What this rank sends, by rank.
        offsets: Where the buffers begin in the segment.
        segment: Where they are; None: nowhere that peers can read.
        own_header: The header for this rank itself.
        sent_to: The peers that take part, without those that were dropped since.
        expected: The peers whose messages this rank waits for.
        said_waiting: Whether this rank has notified its peers that it waits.
        receiving: Whether any message has been returned to the caller, who may be reading it.
    """

    buffers: list[Tensor]
    offsets: list[int]
    segment: seg.Segment | None
    own_header: tuple[int, ...] = ()
    sent_to: frozenset[int] = frozenset()
    expected: set[int] = field(default_factory=set)
    said_waiting: bool = False
    receiving: bool = False


class SharedMemoryTransport:
    """The transport for ranks on one host; `tokenferry.transports.rendezvous` connects its sockets.

    Args:
        rank: This rank.
        sockets: By rank, a socket that is connected to it. Calls must skip all other ranks.
        num_ranks: R; None: all ranks have a socket.

    Attributes:
        patient: Whether ranks that have waited for half of their timeout say so, and the others then wait longer for
            them. A lost rank may have sent to some peers and not to others: those that wait for it must not be taken
            for lost themselves by those that wait for them.
    """

    name = "shared_memory"

    def __init__(self, rank: int, sockets: dict[int, socket.socket], num_ranks: int | None = None) -> None:
        self.rank = rank
        self.num_ranks = len(sockets) + 1 if num_ranks is None else num_ranks
        self.order: Sequence[int] = range(self.num_ranks)
        self.patient = False
        self._peers: dict[int, Peer] = {}
        self._poll = select.poll()
        self._by_fd: dict[int, Peer] = {}
        for other, sock in sockets.items():
            connection = Connection(fileno=sock.detach())
            self._add(Peer(other, connection, open_peer(connection)))
        self._watermarks = Watermarks(self.num_ranks)
        self._last_messages = LastMessages(self.num_ranks)
        self._segments: list[seg.Segment] = []
        self._num_segments = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._last_call = 0
        self._announced = 0
        forget_in_child(self, SharedMemoryTransport._free)

    def _add(self, peer: Peer) -> None:
        peer.socket.setblocking(False)
        self._peers[peer.rank] = peer
        for fd in (peer.socket.fileno(), peer.process):
            if fd >= 0:
                self._by_fd[fd] = peer
                self._poll.register(fd, select.POLLIN)

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return views of a segment. See `Transport.open`.

        This rank's own message is there too, because reused memory is cheaper than new memory.
        """
        self._copy_old(call)
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // _ALIGN) * _ALIGN
        # A group of one has nothing to share, and works where shared memory is forbidden.
        segment = self._free_segment(end) if end and self._peers else None
        memory = torch.empty(end, dtype=torch.uint8, device="cpu") if segment is None else segment.memory
        buffers = [memory[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        self._in_flight[call.number] = _InFlight(buffers, offsets, segment)
        return buffers

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Send a notice to each peer. See `Transport.post`.

        A peer that is gone is no error here: `receive` raises it.
        """
        current = self._in_flight[call.number]
        segment = current.segment
        current.own_header = headers[self.rank]
        current.sent_to = frozenset(self._peers) - skip
        current.expected = set(current.sent_to)
        self._last_call = call.number
        self._let_catch_up(call, current.sent_to, deadline)
        here = frozenset(rank for rank in current.sent_to if self._peers[rank].sends_more())
        if segment is not None:
            segment.call, segment.readers = call.number, here  # a peer that has left reads nothing, and says nothing
        for rank in sorted(current.expected):
            size = current.buffers[rank].numel()
            number = segment.number if segment is not None and size else 0
            kind, fds = NoticeKind.post, []
            if segment is not None and size and rank not in segment.known:
                kind, fds = NoticeKind.post_with_fd, [segment.fd]
                segment.known.add(rank)
            notice = Notice(
                kind, call.number, self._watermarks.local, number, current.offsets[rank], size, headers[rank]
            )
            self._send(rank, notice, fds, call, deadline)
        for rank, peer in self._peers.items():
            if rank in skip:
                peer.inbox.pop(call.number, None)
            elif rank in here and call.number not in peer.inbox:
                peer.awaited.add(call.number)

    def _let_catch_up(self, call: CallId, ranks: frozenset[int], deadline: Deadline) -> None:
        """Wait for peers that are many messages behind.

        If silent ranks are to be masked, that is for `receive` to decide, and half of the time is left to it.

        Raises:
            PeerTimeout: a peer stays silent, and silent ranks are not masked.
        """
        least = deadline.left() / 2 if self.patient else 0.0
        for rank in sorted(ranks):
            peer = self._peers[rank]
            while len(peer.awaited) >= MOST_AWAITED and peer.sends_more():
                if deadline.left() <= least:
                    if not self.patient:
                        why, last = "no answer within timeout_s", self._last_messages.describe(rank)
                        raise peer_timeout(call, self.rank, [rank], why, deadline.waited(), last)
                    peer.awaited.clear()  # not in every call once more
                self._progress(max(deadline.left() - least, 0.0))

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for the notice of ``src`` and return a view of its segment. See `Transport.receive`."""
        current = self._in_flight[call.number]
        current.receiving = True
        if src == self.rank:
            return Message(current.own_header, current.buffers[src])
        peer = self._peers[src]
        while call.number not in peer.inbox:
            gone = [rank for rank in sorted(current.expected) if self._is_gone(rank, call)]
            if gone:  # perhaps not `src`, which may be slow: what ends the call is said at once
                why, last = self._peers[gone[0]].why_gone(), self._last_messages.describe(gone[0])
                raise peer_timeout(call, self.rank, gone[:1], why, deadline.waited(), last)
            left = self._patience(src, deadline)
            # After the deadline too: this rank may have been stopped, and its peers not.
            self._progress(min(left, self._say_waiting(call, deadline)))
            if left == 0 and peer.readable and call.number not in peer.inbox:
                missing = [r for r in sorted(current.expected) if call.number not in self._peers[r].inbox]
                missing = [r for r in missing if not self._patience(r, deadline)]
                why, last = "no answer within timeout_s", self._last_messages.describe(missing[0])
                raise peer_timeout(call, self.rank, missing, why, deadline.waited(), last)
        message = peer.inbox.pop(call.number)
        if check is not None:
            check(src, message.header)
        current.expected.discard(src)
        self._last_messages.record(src, call)
        return message

    def _patience(self, rank: int, deadline: Deadline) -> float:
        """Return the seconds for which to go on waiting for a peer, at least 0: more if it waits itself."""
        return max(deadline.left(), self._peers[rank].waiting_at + deadline.timeout_s - time.monotonic())

    def _say_waiting(self, call: CallId, deadline: Deadline) -> float:
        """Tell peers, once in a call and after half of its timeout, that this rank waits; return the seconds till then.

        Only once: two ranks that wait for each other must not go on for ever.
        """
        current = self._in_flight[call.number]
        if not self.patient or current.said_waiting:
            return math.inf
        left = deadline.left() - deadline.timeout_s / 2
        if left > 0:
            return left
        current.said_waiting = True
        for rank in sorted(current.sent_to):
            self._send(rank, Notice(NoticeKind.waiting), [], call, deadline)
        return 0.0

    def _is_gone(self, rank: int, call: CallId) -> bool:
        """Return whether the message of a peer will never come."""
        peer = self._peers[rank]
        return not peer.sends_more() and call.number not in peer.inbox

    def finish(self, call: CallId, deadline: Deadline | None, late: frozenset[int] = frozenset()) -> None:
        """Advance the watermark. See `Transport.finish`.

        There is nothing to wait for: peers that have mapped a segment keep its memory, even if this rank closes it.
        """
        del self._in_flight[call.number]
        self._watermarks.finish(call.number)

    def forget(self, call: CallId) -> None:
        """Drop its messages, those that are still to come, too. See `Transport.forget`.

        Otherwise no watermark would ever reach a later call, and every call would take a new segment. A rank that only
        sends, and forgets all of its calls, reads here what its peers have finished.
        """
        if call.number not in self._in_flight:  # `skip_to` has dropped it
            return
        self.finish(call, None)
        self._progress_all()
        for peer in self._peers.values():
            peer.inbox.pop(call.number, None)

    def drop_peer(self, src: int) -> None:
        """Drop the messages of ``src``, and retire the segments that it may still read. See `Transport.drop_peer`."""
        self._peers[src].awaited.clear()
        for number, current in self._in_flight.items():
            current.expected.discard(src)
            current.sent_to -= {src}
            self._peers[src].inbox.pop(number, None)
        busy = [s for s in self._segments if src in s.readers and not self._watermarks.reached(s.call, s.readers)]
        self._retire(busy)

    def announce_call(self, number: int, skip: frozenset[int]) -> None:
        """Send a notice to each peer. See `Transport.announce_call`."""
        for rank in sorted(set(self._peers) - skip):
            self._send(rank, Notice(NoticeKind.announce, number), [], CallId(number, "mask"), Deadline(1.0))

    def highest_announced_call(self) -> int:
        """Read all notices that have arrived. See `Transport.highest_announced_call`."""
        self._progress_all()
        return self._announced

    def skip_to(self, number: int) -> None:
        """Drop calls in flight and messages up to ``number``. See `Transport.skip_to`."""
        self._last_call = max(self._last_call, number)
        self._watermarks.skip_to(number)
        self._in_flight = {call: current for call, current in self._in_flight.items() if call > number}
        for peer in self._peers.values():
            peer.awaited.clear()
            peer.inbox = {call: message for call, message in peer.inbox.items() if call > number}

    def leave(self, why: str, *, wait: bool) -> None:
        """Send a last notice, with the reason behind it, for which peers need not wait. See `Transport.leave`.

        What follows a null character in ``why`` is not shown to users.
        """
        text = why.encode()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # a peer that reads nothing finds the closed socket
                peer.socket.send(Notice(NoticeKind.leave, size=len(text)).pack() + text)

    def reason(self, src: int) -> str:
        """Read all notices that have arrived. See `Transport.reason`."""
        self._progress_all()
        return self._peers[src].reason() if src in self._peers else ""

    def abandon(self) -> None:
        """Do nothing: `close` shows at once. See `Transport.abandon`."""

    def close(self, *, linger: bool) -> None:
        """Close the sockets, which peers detect, and free all memory. See `Transport.close`.

        Notices and segments that are on their way stay valid, so there is nothing to linger for.
        """
        for peer in self._peers.values():
            # Also ends a connection of which a child that C code forked, and that no hook reached, has a copy.
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        self._free()

    def _free(self, _reason: str = "") -> None:
        """Close all descriptors and free all memory; in a forked child, its copies of them."""
        for peer in self._peers.values():
            peer.close()
        for segment in self._segments:  # a thread of the parent, whose frames a child keeps, may refer to it
            segment.close()
        self._segments.clear()
        self._in_flight.clear()

    def _copy_old(self, call: CallId) -> None:
        """Copy the messages of calls that were not received long before ``call``, and let the watermark pass them."""
        if self._watermarks.local + 1 > call.number - _COPY_AFTER:
            return
        self._progress_all()
        while (oldest := self._watermarks.local + 1) <= call.number - _COPY_AFTER:
            current = self._in_flight.get(oldest)
            if current is None or current.receiving:
                return
            inboxes = [self._peers[rank].inbox for rank in current.expected]
            if not all(oldest in inbox for inbox in inboxes):  # still to come
                return
            for inbox in inboxes:
                inbox[oldest] = Message(inbox[oldest].header, inbox[oldest].body.clone())
            own = current.buffers[self.rank].clone()
            current.buffers = [own if rank == self.rank else own[:0] for rank in range(self.num_ranks)]
            current.segment = None
            self._watermarks.finish(oldest)

    def _free_segment(self, num_bytes: int) -> seg.Segment:
        """Return the smallest free segment that fits; if none does, replace the free segments by a new one."""
        free = self._free_segments()
        if all(segment.memory.numel() < num_bytes for segment in free):
            self._progress_all()  # peers may have said since the last wait that they have finished more calls
            free = self._free_segments()
        fitting = [segment for segment in free if segment.memory.numel() >= num_bytes]
        if fitting:
            chosen = min(fitting, key=lambda segment: segment.memory.numel())
            self._retire([s for s in free if s is not chosen and s.call < self._last_call - _IDLE_AFTER])
            return chosen
        self._retire(free)
        self._num_segments += 1
        self._segments.append(seg.create(self._num_segments, num_bytes))
        return self._segments[-1]

    def _free_segments(self) -> list[seg.Segment]:
        """Return the segments whose messages all readers have finished, the ones that were made first first."""
        busy = {id(current.segment) for current in self._in_flight.values()}
        return [s for s in self._segments if id(s) not in busy and self._watermarks.reached(s.call, s.readers)]

    def _retire(self, segments: list[seg.Segment]) -> None:
        """Drop segments, here and at the peers that have mapped them; the last view of one frees its memory."""
        for segment in segments:
            self._segments.remove(segment)
            for rank in sorted(segment.known):
                notice = Notice(NoticeKind.retire, segment=segment.number)
                self._send(rank, notice, [], CallId(0, "retire"), Deadline(1.0))

    def _send(self, rank: int, notice: Notice, fds: list[int], call: CallId, deadline: Deadline) -> None:
        peer, data = self._peers[rank], notice.pack()
        while data and peer.writable and peer.readable:
            try:
                sent = socket.send_fds(peer.socket, [data], fds)
                data, fds = data[sent:], []
            except BlockingIOError:
                # The peer is hundreds of notices behind. Keep reading while waiting, so that it can send as well.
                if deadline.left() == 0:
                    why, last = "it reads no messages", self._last_messages.describe(rank)
                    raise peer_timeout(call, self.rank, [rank], why, deadline.waited(), last) from None
                self._poll.modify(peer.socket, select.POLLIN | select.POLLOUT)
                self._progress(deadline.left())
                if peer.readable:
                    self._poll.modify(peer.socket, select.POLLIN)
            except (BrokenPipeError, ConnectionResetError):
                peer.writable = False

    def _progress_all(self) -> None:
        """Handle all notices that have arrived."""
        while self._poll.poll(0):
            self._progress(0)

    def _progress(self, timeout_s: float) -> None:
        """Wait until any peer has sent something, and handle all notices that have arrived."""
        for fd, event in self._poll.poll(timeout_s * 1000.0):
            peer = self._by_fd[fd]
            if fd == peer.process:
                # What the process sent before it ended is in the socket, which a child may keep open.
                self._poll.unregister(fd)
                while self._read(peer):
                    pass
                self._hang_up(peer)
            elif event & ~select.POLLOUT:
                self._read(peer)

    def _hang_up(self, peer: Peer) -> None:
        """Record that the peer sends nothing more."""
        if peer.readable:
            peer.readable = False
            self._poll.unregister(peer.socket)

    def _read(self, peer: Peer) -> bool:
        """Handle the notices that a peer has sent; returns whether it may have sent more of them."""
        if not peer.readable:
            return False
        try:
            data, fds = seg.receive(peer.socket, 1 << 16)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self._hang_up(peer)
            return False
        peer.data += data
        peer.fds += fds
        while len(peer.data) >= SIZE and peer.reason_size < 0:
            notice = Notice.unpack(peer.data)
            del peer.data[:SIZE]
            self._handle(peer, notice)
        return True

    def _handle(self, peer: Peer, notice: Notice) -> None:
        if notice.kind == NoticeKind.retire:
            peer.mappings.pop(notice.segment, None)
            return
        if notice.kind == NoticeKind.announce:
            self._announced = max(self._announced, notice.call)
            return
        if notice.kind == NoticeKind.leave:
            peer.reason_size = notice.size
            return
        if notice.kind == NoticeKind.waiting:
            peer.waiting_at = time.monotonic()
            return
        if notice.kind == NoticeKind.post_with_fd:
            fd = peer.fds.pop(0)
            try:
                peer.mappings[notice.segment] = seg.attach(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        self._watermarks.update(peer.rank, notice.watermark)
        peer.awaited.discard(notice.call)
        current = self._in_flight.get(notice.call)
        # A message is late if its call was made without this peer.
        late = notice.call <= self._last_call and (current is None or peer.rank not in current.expected)
        if late:
            return
        body = torch.empty(0, dtype=torch.uint8, device="cpu")
        if notice.size:
            # This view keeps the memory if the sender retires the segment before the message is received.
            body = peer.mappings[notice.segment][notice.offset : notice.offset + notice.size]
        peer.inbox[notice.call] = Message(notice.header, body)
