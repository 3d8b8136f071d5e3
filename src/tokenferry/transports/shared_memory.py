"""SharedMemoryTransport: messages between ranks of one host, through shared memory and Unix sockets.

The bodies of messages are in segments that the sender owns and the receivers map: the sender writes a row once, and the
receiver reads it once. A small notice over a Unix socket gives the position of a body. It wakes the receiver, so that
nothing spins, and it arrives after the bytes that it describes. A closed socket shows at once that its rank is gone.

A segment holds the messages of one call. It is reused when the watermarks of all its readers have reached that call
(see `tokenferry.transports.base`), so two segments alternate in steady state; with receive hooks there is one for
each call in flight. No call ever waits for a segment.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenferry.forked import forget_in_child
from tokenferry.transports import segment as seg
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
from tokenferry.transports.lifetime import Connection, open_peer

_NOTICE = struct.Struct(f"<6q{HEADER_INTS}q")
_POST, _POST_WITH_FD, _RETIRE, _ANNOUNCE, _LEAVE, _WAITING = 1, 2, 3, 4, 5, 6
_NO_HEADER = (0,) * HEADER_INTS
_ALIGN = 64


@dataclass(slots=True)
class _Notice:
    """A fixed-size record sent over a socket.

    Attributes:
        kind: `_POST`: a message is ready; `_POST_WITH_FD`: the same, and the descriptor of its segment comes along;
            `_RETIRE`: unmap a segment; `_ANNOUNCE`: the number of the sender's last call; `_LEAVE`: the sender leaves,
            and everything behind this notice is its reason, a text; `_WAITING`: the sender has waited for half of its
            timeout.
        call: The number of a call.
        watermark: The sender's watermark.
        segment: The number of the segment of a body, 0 without a body.
        offset: The first byte of the body in the segment.
        size: Bytes of the body.
        header: The backend's header.
    """

    kind: int
    call: int = 0
    watermark: int = 0
    segment: int = 0
    offset: int = 0
    size: int = 0
    header: tuple[int, ...] = _NO_HEADER

    def pack(self) -> bytes:
        return _NOTICE.pack(self.kind, self.call, self.watermark, self.segment, self.offset, self.size, *self.header)

    @classmethod
    def unpack(cls, data: bytearray) -> _Notice:
        kind, call, watermark, segment, offset, size, *header = _NOTICE.unpack_from(data)
        return cls(kind, call, watermark, segment, offset, size, tuple(header))


@dataclass(slots=True, eq=False)
class _Peer:
    """The connection to one peer; its descriptors are closed with it.

    Attributes:
        rank: The rank of the peer.
        socket: The socket connected to the peer.
        process: A descriptor that shows the end of the peer's process, or -1; see `open_peer`.
        data: Received bytes of an incomplete notice.
        fds: Received file descriptors whose notices have not been handled.
        inbox: Messages that the backend has not yet received, by call.
        mappings: Segments of the peer that are mapped here, by number.
        writable: False once sends fail; messages that the peer sent before may still be in the socket.
        readable: False once the socket is closed and everything that the peer sent has been read.
        reason_size: Bytes of the reason, once the peer has sent `_LEAVE`, or -1; ``data`` is then that reason.
        waiting_at: When the last `_WAITING` came.
    """

    rank: int
    socket: Connection
    process: int
    data: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    inbox: dict[int, Message] = field(default_factory=dict)
    mappings: dict[int, Tensor] = field(default_factory=dict)
    writable: bool = True
    readable: bool = True
    reason_size: int = -1
    waiting_at: float = -math.inf

    def sends_more(self) -> bool:
        """Return whether there may be a message of this peer that has not been read."""
        return self.readable and not 0 <= self.reason_size <= len(self.data)

    def reason(self) -> str:
        """Return the reason with which this peer has left, or an empty string."""
        return "" if self.reason_size < 0 else self.data.decode(errors="replace")

    def why_gone(self) -> str:
        """Return why this peer sends no more messages."""
        why = self.reason().partition("\0")[0]
        return f"it left the group: {why}" if why else "its process ended or closed the group"

    def close(self, close: Callable[[int], None] = os.close) -> None:
        """Close all descriptors, and drop all messages; idempotent."""
        self.socket.close()
        fds, self.fds, self.process = [*self.fds, self.process], [], -1
        for fd in fds:
            if fd >= 0:
                close(fd)  # an argument, since `os` may be gone at interpreter exit
        self.mappings.clear()
        self.inbox.clear()

    __del__ = close


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
        said_waiting: Whether it has told its peers that it waits.
    """

    buffers: list[Tensor]
    offsets: list[int]
    segment: seg.Segment | None
    own_header: tuple[int, ...] = ()
    sent_to: frozenset[int] = frozenset()
    expected: set[int] = field(default_factory=set)
    said_waiting: bool = False


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
        self._peers: dict[int, _Peer] = {}
        self._poll = select.poll()
        self._by_fd: dict[int, _Peer] = {}
        for other, sock in sockets.items():
            connection = Connection(fileno=sock.detach())
            self._add(_Peer(other, connection, open_peer(connection)))
        self._watermarks = Watermarks(self.num_ranks)
        self._last_messages = LastMessages(self.num_ranks)
        self._segments: list[seg.Segment] = []
        self._num_segments = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._last_call = 0
        self._announced = 0
        forget_in_child(self, SharedMemoryTransport._free)

    def _add(self, peer: _Peer) -> None:
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
        if segment is not None:
            segment.call, segment.readers = call.number, current.sent_to
        for rank in sorted(current.expected):
            size = current.buffers[rank].numel()
            number = segment.number if segment is not None and size else 0
            kind, fds = _POST, []
            if segment is not None and size and rank not in segment.known:
                kind, fds = _POST_WITH_FD, [segment.fd]
                segment.known.add(rank)
            notice = _Notice(
                kind, call.number, self._watermarks.local, number, current.offsets[rank], size, headers[rank]
            )
            self._send(rank, notice, fds, call, deadline)
        for rank, peer in self._peers.items():
            if rank in skip:
                peer.inbox.pop(call.number, None)

    def receive(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for the notice of ``src`` and return a view of its segment. See `Transport.receive`."""
        current = self._in_flight[call.number]
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
            self._send(rank, _Notice(_WAITING), [], call, deadline)
        return 0.0

    def _is_gone(self, rank: int, call: CallId) -> bool:
        """Return whether the message of a peer will never come."""
        peer = self._peers[rank]
        return not peer.sends_more() and call.number not in peer.inbox

    def finish(self, call: CallId, deadline: Deadline | None) -> None:
        """Advance the watermark. See `Transport.finish`.

        There is nothing to wait for: peers that have mapped a segment keep its memory, even if this rank closes it.
        """
        del self._in_flight[call.number]
        self._watermarks.finish(call.number)

    def forget(self, call: CallId) -> None:
        """Drop its messages, those that are still to come, too. See `Transport.forget`.

        Otherwise no watermark would ever reach a later call, and every call would take a new segment.
        """
        if call.number not in self._in_flight:  # `skip_to` has dropped it
            return
        self.finish(call, None)
        for peer in self._peers.values():
            peer.inbox.pop(call.number, None)

    def drop_peer(self, src: int) -> None:
        """Drop the messages of ``src``, and retire the segments that it may still read. See `Transport.drop_peer`."""
        for number, current in self._in_flight.items():
            current.expected.discard(src)
            current.sent_to -= {src}
            self._peers[src].inbox.pop(number, None)
        busy = [s for s in self._segments if src in s.readers and not self._watermarks.reached(s.call, s.readers)]
        self._retire(busy)

    def announce_call(self, number: int, skip: frozenset[int]) -> None:
        """Send a notice to each peer. See `Transport.announce_call`."""
        for rank in sorted(set(self._peers) - skip):
            self._send(rank, _Notice(_ANNOUNCE, number), [], CallId(number, "mask"), Deadline(1.0))

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
            peer.inbox = {call: message for call, message in peer.inbox.items() if call > number}

    def leave(self, why: str, *, wait: bool) -> None:
        """Send a last notice, with the reason behind it, for which peers need not wait. See `Transport.leave`.

        What follows a null character in ``why`` is not shown to users.
        """
        text = why.encode()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # a peer that reads nothing finds the closed socket
                peer.socket.send(_Notice(_LEAVE, size=len(text)).pack() + text)

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

    def _free_segment(self, num_bytes: int) -> seg.Segment:
        """Return the smallest free segment that fits; if none does, replace the free segments by a new one."""
        busy = {id(current.segment) for current in self._in_flight.values()}
        free = [s for s in self._segments if id(s) not in busy and self._watermarks.reached(s.call, s.readers)]
        fitting = [s for s in free if s.memory.numel() >= num_bytes]
        if fitting:
            return min(fitting, key=lambda s: s.memory.numel())
        self._retire(free)
        self._num_segments += 1
        self._segments.append(seg.create(self._num_segments, num_bytes))
        return self._segments[-1]

    def _retire(self, segments: list[seg.Segment]) -> None:
        """Drop segments, here and at the peers that have mapped them; the last view of one frees its memory."""
        for segment in segments:
            self._segments.remove(segment)
            for rank in sorted(segment.known):
                notice = _Notice(_RETIRE, segment=segment.number)
                self._send(rank, notice, [], CallId(0, "retire"), Deadline(1.0))

    def _send(self, rank: int, notice: _Notice, fds: list[int], call: CallId, deadline: Deadline) -> None:
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

    def _hang_up(self, peer: _Peer) -> None:
        """Record that the peer sends nothing more."""
        if peer.readable:
            peer.readable = False
            self._poll.unregister(peer.socket)

    def _read(self, peer: _Peer) -> bool:
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
        while len(peer.data) >= _NOTICE.size and peer.reason_size < 0:
            notice = _Notice.unpack(peer.data)
            del peer.data[: _NOTICE.size]
            self._handle(peer, notice)
        return True

    def _handle(self, peer: _Peer, notice: _Notice) -> None:
        if notice.kind == _RETIRE:
            peer.mappings.pop(notice.segment, None)
            return
        if notice.kind == _ANNOUNCE:
            self._announced = max(self._announced, notice.call)
            return
        if notice.kind == _LEAVE:
            peer.reason_size = notice.size
            return
        if notice.kind == _WAITING:
            peer.waiting_at = time.monotonic()
            return
        if notice.kind == _POST_WITH_FD:
            fd = peer.fds.pop(0)
            try:
                peer.mappings[notice.segment] = seg.attach(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        self._watermarks.update(peer.rank, notice.watermark)
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
