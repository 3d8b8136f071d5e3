"""Notices, the small records that ranks of one host send each other over Unix sockets, and the peers that send them."""

from __future__ import annotations

import enum
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from tokenferry.transports.base import HEADER_INTS, Message
from tokenferry.transports.lifetime import Connection

_RECORD = struct.Struct(f"<6q{HEADER_INTS}q")
SIZE = _RECORD.size
"""Bytes of a notice."""
_NO_HEADER = (0,) * HEADER_INTS


class NoticeKind(enum.IntEnum):
    """What a notice says.

    Attributes:
        post: A message is ready.
        post_with_fd: The same, and the descriptor of its segment comes along.
        retire: Unmap a segment.
        announce: The number of the sender's last call.
        leave: The sender leaves, and everything behind this notice is its reason, a text.
        waiting: The sender has waited for half of its timeout.
    """

    post = 1
    post_with_fd = 2
    retire = 3
    announce = 4
    leave = 5
    waiting = 6


@dataclass(slots=True)
class Notice:
    """A fixed-size record sent over a socket.

    Attributes:
        kind: What it says; a `NoticeKind`.
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
        """Return the bytes to send."""
        return _RECORD.pack(self.kind, self.call, self.watermark, self.segment, self.offset, self.size, *self.header)

    @classmethod
    def unpack(cls, data: bytearray) -> Notice:
        """Return the notice at the beginning of ``data``."""
        kind, call, watermark, segment, offset, size, *header = _RECORD.unpack_from(data)
        return cls(kind, call, watermark, segment, offset, size, tuple(header))


@dataclass(slots=True, eq=False)
class Peer:
    """The connection to one peer; its descriptors are closed with it.

    Attributes:
        rank: The rank of the peer.
        socket: The socket connected to the peer.
        process: A descriptor that shows the end of the peer's process, or -1; see `tokenferry.transports.lifetime`.
        data: Received bytes of an incomplete notice.
        fds: Received file descriptors whose notices have not been handled.
        inbox: Messages that the backend has not yet received, by call.
        awaited: The calls whose messages have not come, whether anybody still wants them or not.
        mappings: Segments of the peer that are mapped here, by number.
        writable: False once sends fail; messages that the peer sent before may still be in the socket.
        readable: False once the socket is closed and everything that the peer sent has been read.
        reason_size: Bytes of the reason once the peer has sent `NoticeKind.leave`, which ``data`` then holds; else -1.
        waiting_at: When the last `NoticeKind.waiting` came.
    """

    rank: int
    socket: Connection
    process: int
    data: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    inbox: dict[int, Message] = field(default_factory=dict)
    awaited: set[int] = field(default_factory=set)
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
