"""Calls over two SharedMemoryTransports, both ends in one process."""

from tokenferry.transports.base import HEADER_INTS, CallId, Deadline

HEADER = tuple(range(HEADER_INTS))


def post(transport, number, payload, skip=frozenset()):
    """Send ``payload`` bytes, all equal to the call's number, to both ranks."""
    call = CallId(number, "test")
    for buffer in transport.open(call, [payload, payload]):
        buffer.fill_(number % 256)
    transport.post(call, [HEADER, HEADER], Deadline(1.0), skip)
    return call


def take(transport, number, src):
    message = transport.take(CallId(number, "test"), src, Deadline(1.0))
    assert message.header == HEADER
    assert bool((message.body == number % 256).all()), "another call's bytes"
    return message.body.numel()


def exchange(pair, number, payload):
    for transport in pair:
        post(transport, number, payload)
    for transport in pair:
        assert [take(transport, number, src) for src in (0, 1)] == [payload, payload]
        transport.finish(CallId(number, "test"), None)
