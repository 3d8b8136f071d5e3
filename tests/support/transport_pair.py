"""Two connected shared-memory transports in one process, and messages whose bytes show their call."""

import contextlib
import socket
from collections.abc import Iterator

from tokenferry.transports.base import HEADER_INTS, CallId, Deadline
from tokenferry.transports.shared_memory import SharedMemoryTransport

HEADER = tuple(range(HEADER_INTS))

PATIENCE_S = 60.0
"""How long to wait for what does come, however slow a busy machine is: longer than a forked child may take."""

Transports = tuple[SharedMemoryTransport, SharedMemoryTransport]


@contextlib.contextmanager
def connected() -> Iterator[Transports]:
    """Yield the transports of ranks 0 and 1, and close them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    transports = SharedMemoryTransport(0, {1: ours}), SharedMemoryTransport(1, {0: theirs})
    yield transports
    for transport in transports:
        transport.close(linger=False)


def post(transport, number, size, skip=frozenset(), timeout_s=PATIENCE_S):
    """Send ``size`` bytes, all equal to the call's number, to both ranks."""
    call = CallId(number, "test")
    for buffer in transport.open(call, [size, size]):
        buffer.fill_(number % 256)
    transport.post(call, [HEADER, HEADER], Deadline(timeout_s), skip)
    return call


def receive(transport, number, src):
    """Receive a message of `post`, check it, and return its size."""
    message = transport.receive(CallId(number, "test"), src, Deadline(PATIENCE_S))
    assert message.header == HEADER
    assert bool((message.body == number % 256).all()), "another call's bytes"
    return message.body.numel()


def exchange(pair: Transports, number, size):
    """Make one whole call on both ranks."""
    for transport in pair:
        post(transport, number, size)
    for transport in pair:
        assert [receive(transport, number, src) for src in (0, 1)] == [size, size]
        transport.finish(CallId(number, "test"), None)
