"""SharedMemoryTransport: messages between ranks of one host, through shared memory and Unix sockets.

Bodies lie in segments that their sender owns and that receivers map: a row is written once, by its sender, and read
once, by its receiver. A small notice over a Unix socket says where: it wakes the receiver without spinning, arrives
after the bytes that it speaks of, and a socket that closes says at once that its rank is gone.

A segment holds one call's messages and is reused when the floors of all its readers have passed that call (base.py),
so two segments alternate in steady state; with hooks there are as many as calls under way. Nothing ever waits for a
segment.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenferry.transports import segment as seg
from tokenferry.transports.base import HEADER_INTS, CallId, Check, Deadline, Floor, LastHeard, Message, peer_timeout

_NOTICE = struct.Struct(f"<6q{HEADER_INTS}q")
"""kind, call, floor, segment, offset, bytes; then the backend's header."""
_POST, _POST_WITH_FD, _RETIRE, _NUMBER = 1, 2, 3, 4
_ALIGN = 64


@dataclass(slots=True, eq=False)
class _Peer:
    """What is known of one peer: its socket, what it has sent that was not yet taken, and its segments mapped here.

    ``deaf``: it reads no more, but what it sent before may still be here. ``gone``: everything has been read.
    """

    rank: int
    socket: socket.socket
    data: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    inbox: dict[int, Message] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    deaf: bool = False
    gone: bool = False


@dataclass(slots=True, eq=False)
class _Flight:
    """One call under way here."""

    buffers: list[Tensor]
    offsets: list[int]
    segment: seg.Segment | None
    own_header: tuple[int, ...] = ()
    expected: set[int] = field(default_factory=set)


class SharedMemoryTransport:
    """The transport for ranks of one host; made by `tokenferry.transports.rendezvous`, which connects the sockets."""

    name = "shared_memory"

    def __init__(self, rank: int, sockets: dict[int, socket.socket]) -> None:
        self.rank = rank
        self.num_ranks = len(sockets) + 1
        self._peers = {peer: _Peer(peer, sock) for peer, sock in sockets.items()}
        self._poll = select.poll()
        self._by_fd = {}
        for peer in self._peers.values():
            peer.socket.setblocking(False)
            self._by_fd[peer.socket.fileno()] = peer
            self._poll.register(peer.socket, select.POLLIN)
        self._floor = Floor(self.num_ranks)
        self._heard = LastHeard(self.num_ranks)
        self._segments: list[seg.Segment] = []
        self._num_segments = 0
        self._flights: dict[int, _Flight] = {}
        self._newest = 0
        self._told = 0

    def open(self, call: CallId, sizes: Sequence[int]) -> list[Tensor]:
        """Return views of a segment; this rank's own message lies there too, since used memory is cheaper than new.

        See `Transport.open`.
        """
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // _ALIGN) * _ALIGN
        segment = self._free_segment(end) if end else None
        memory = torch.empty(0, dtype=torch.uint8) if segment is None else segment.memory
        buffers = [memory[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
        self._flights[call.number] = _Flight(buffers, offsets, segment)
        return buffers

    def post(
        self, call: CallId, headers: Sequence[tuple[int, ...]], deadline: Deadline, skip: frozenset[int] = frozenset()
    ) -> None:
        """Send a notice to each peer. A peer that is gone is passed over: `take` reports it. See `Transport.post`."""
        flight = self._flights[call.number]
        flight.own_header = headers[self.rank]
        flight.expected = set(self._peers) - skip
        self._newest = call.number
        if flight.segment is not None:
            flight.segment.call, flight.segment.readers = call.number, frozenset(flight.expected)
        for rank in sorted(flight.expected):
            size = flight.buffers[rank].numel()
            number = flight.segment.number if flight.segment is not None and size else 0
            kind, fds = _POST, []
            if flight.segment is not None and size and rank not in flight.segment.known:
                kind, fds = _POST_WITH_FD, [flight.segment.fd]
                flight.segment.known.add(rank)
            notice = _NOTICE.pack(
                kind, call.number, self._floor.mine, number, flight.offsets[rank], size, *headers[rank]
            )
            self._send(rank, notice, fds, call, deadline)
        for rank, peer in self._peers.items():
            if rank in skip:
                peer.inbox.pop(call.number, None)

    def take(self, call: CallId, src: int, deadline: Deadline, check: Check | None = None) -> Message:
        """Wait for the notice of ``src`` and return a view of its segment. See `Transport.take`."""
        flight = self._flights[call.number]
        if src == self.rank:
            return Message(flight.own_header, flight.buffers[src])
        peer = self._peers[src]
        while call.number not in peer.inbox:
            if peer.gone:
                why = "its process ended or closed the group"
                raise peer_timeout(call, self.rank, [src], why, deadline.waited(), self._heard.tell(src))
            left = deadline.left()
            if left == 0:
                missing = sorted(r for r in flight.expected if call.number not in self._peers[r].inbox)
                why = "no answer within timeout_s"
                raise peer_timeout(call, self.rank, missing, why, deadline.waited(), self._heard.tell(missing[0]))
            self._pump(left)
        message = peer.inbox.pop(call.number)
        if check is not None:
            check(src, message.header)
        flight.expected.discard(src)
        self._heard.note(src, call)
        return message

    def finish(self, call: CallId, deadline: Deadline | None) -> None:
        """Nothing to wait for: segments outlive their sender's interest in them. See `Transport.finish`."""
        del self._flights[call.number]
        self._floor.finish(call.number)

    def forget(self, src: int) -> None:
        """Drop what ``src`` sent, and let go of the segments that it may still read. See `Transport.forget`."""
        for number, flight in self._flights.items():
            flight.expected.discard(src)
            self._peers[src].inbox.pop(number, None)
        busy = [s for s in self._segments if src in s.readers and not self._floor.passed(s.call, s.readers)]
        self._retire(busy)

    def tell_number(self, number: int, skip: frozenset[int]) -> None:
        """Send a notice. See `Transport.tell_number`."""
        notice = _NOTICE.pack(_NUMBER, number, 0, 0, 0, 0, *[0] * HEADER_INTS)
        for rank in sorted(set(self._peers) - skip):
            self._send(rank, notice, [], CallId(number, "mask"), Deadline(1.0))

    def heard_number(self) -> int:
        """Read what is here. See `Transport.heard_number`."""
        while self._poll.poll(0):
            self._pump(0)
        return self._told

    def go_on_from(self, number: int) -> None:
        """See `Transport.go_on_from`."""
        self._newest = max(self._newest, number)
        self._floor.jump(number)
        self._flights = {call: flight for call, flight in self._flights.items() if call > number}
        for peer in self._peers.values():
            peer.inbox = {call: message for call, message in peer.inbox.items() if call > number}

    def close(self, *, linger: bool) -> None:
        """Close sockets, which tells the peers, and let go of all memory; notices and segments under way stay valid."""
        for peer in self._peers.values():
            peer.socket.close()
            for fd in peer.fds:
                os.close(fd)
            peer.fds.clear()
            peer.maps.clear()
        self._segments.clear()
        self._flights.clear()

    def _free_segment(self, num_bytes: int) -> seg.Segment:
        """The smallest free segment that fits, else a new one in the place of the free ones that are too small."""
        busy = {id(flight.segment) for flight in self._flights.values()}
        free = [s for s in self._segments if id(s) not in busy and self._floor.passed(s.call, s.readers)]
        fitting = [s for s in free if s.memory.numel() >= num_bytes]
        if fitting:
            return min(fitting, key=lambda s: s.memory.numel())
        self._retire(free)
        self._num_segments += 1
        self._segments.append(seg.create(self._num_segments, num_bytes))
        return self._segments[-1]

    def _retire(self, segments: list[seg.Segment]) -> None:
        """Forget segments, here and at the peers that have mapped them; the memory goes when the last view does."""
        for segment in segments:
            self._segments.remove(segment)
            for rank in sorted(segment.known):
                notice = _NOTICE.pack(_RETIRE, 0, 0, segment.number, 0, 0, *[0] * HEADER_INTS)
                self._send(rank, notice, [], CallId(0, "retire"), Deadline(1.0))

    def _send(self, rank: int, notice: bytes, fds: list[int], call: CallId, deadline: Deadline) -> None:
        peer = self._peers[rank]
        while notice and not (peer.deaf or peer.gone):
            try:
                sent = socket.send_fds(peer.socket, [notice], fds)
                notice, fds = notice[sent:], []
            except BlockingIOError:  # hundreds of notices unread: the peer is far behind; read on while it catches up
                if deadline.left() == 0:
                    why = "it reads no messages"
                    raise peer_timeout(
                        call, self.rank, [rank], why, deadline.waited(), self._heard.tell(rank)
                    ) from None
                self._poll.modify(peer.socket, select.POLLIN | select.POLLOUT)
                self._pump(deadline.left())
                if not peer.gone:
                    self._poll.modify(peer.socket, select.POLLIN)
            except (BrokenPipeError, ConnectionResetError):
                peer.deaf = True

    def _pump(self, timeout_s: float) -> None:
        """Wait for any peer's notices and read all that are here."""
        for fd, event in self._poll.poll(timeout_s * 1000.0):
            if event & ~select.POLLOUT:
                self._read(self._by_fd[fd])

    def _read(self, peer: _Peer) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(peer.socket, 1 << 16, 64)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            peer.gone = True
            self._poll.unregister(peer.socket)
            return
        peer.data += data
        peer.fds += fds
        while len(peer.data) >= _NOTICE.size:
            notice = _NOTICE.unpack_from(peer.data)
            del peer.data[: _NOTICE.size]
            self._accept(peer, notice)

    def _accept(self, peer: _Peer, notice: tuple[int, ...]) -> None:
        kind, number, floor, segment, offset, size, *header = notice
        if kind == _RETIRE:
            peer.maps.pop(segment, None)
            return
        if kind == _NUMBER:
            self._told = max(self._told, number)
            return
        if kind == _POST_WITH_FD:
            fd = peer.fds.pop(0)
            peer.maps[segment] = seg.attach(fd, os.fstat(fd).st_size)
            os.close(fd)
        self._floor.heard(peer.rank, floor)
        flight = self._flights.get(number)
        late = number <= self._newest and (flight is None or peer.rank not in flight.expected)
        if not late:  # a late message is of a call that did without this peer
            # The view outlives the map's place in the table: its sender may retire the segment before it is taken.
            body = peer.maps[segment][offset : offset + size] if size else torch.empty(0, dtype=torch.uint8)
            peer.inbox[number] = Message(tuple(header), body)
