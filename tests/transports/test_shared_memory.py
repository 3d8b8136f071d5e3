"""SharedMemoryTransport, both ends in one process: what the contract suite cannot observe."""

import contextlib
import errno
import gc
import os
import socket

import pytest
import torch

from support.refusals import descriptors_left
from support.transport_pair import HEADER, PATIENCE_S, connected, exchange, post, receive
from tokenferry.errors import PeerTimeout, ResourceError
from tokenferry.transports.base import CallId, Deadline, Watermarks
from tokenferry.transports.shared_memory import SharedMemoryTransport


@pytest.fixture
def pair():
    """Return two connected transports, of ranks 0 and 1."""
    with connected() as transports:
        yield transports


def test_two_segments_are_enough_for_calls_of_any_number(pair):
    for number in range(1, 20):
        exchange(pair, number, 1000)
    assert all(len(transport._segments) <= 2 for transport in pair)


def test_calls_in_flight_together_keep_their_bytes_and_are_received_in_any_order(pair):
    for number in (1, 2, 3, 4):
        for transport in pair:
            post(transport, number, 5000)
    for number in (3, 1, 4, 2):
        for transport in pair:
            assert [receive(transport, number, src) for src in (1, 0)] == [5000, 5000]
            transport.finish(CallId(number, "test"), None)
    for number in (5, 6, 7):
        exchange(pair, number, 5000)
    assert len(pair[0]._segments) == 5, "free segments are not reused"


def test_calls_that_nobody_receives_hold_up_no_later_one(pair):
    """Whether their messages have come or are still to come."""
    zero, one = pair
    for number in range(1, 40, 2):
        post(one, number, 1000)
        if number % 4 == 1:
            zero._progress_all()
        post(zero, number, 1000)
        zero.forget(CallId(number, "test"))
        assert [receive(one, number, src) for src in (1, 0)] == [1000, 1000]
        one.finish(CallId(number, "test"), None)
        exchange(pair, number + 1, 1000)
    for transport in pair:
        assert len(transport._segments) <= 3
        assert not any(peer.inbox for peer in transport._peers.values())
    zero.forget(CallId(39, "test"))  # has no effect


def test_a_larger_call_replaces_segments_here_and_at_the_peer(pair):
    exchange(pair, 1, 1000)
    exchange(pair, 2, 1000)
    exchange(pair, 3, 10_000_000)
    exchange(pair, 4, 10_000_000)
    for transport in pair:
        assert all(s.memory.numel() >= 10_000_000 for s in transport._segments)
    exchange(pair, 5, 10)
    (mapped,) = [peer.mappings for peer in pair[0]._peers.values()]
    assert set(mapped) <= {s.number for s in pair[1]._segments}, "a retired segment is still mapped"


def test_what_came_in_time_is_found_by_a_rank_that_looks_too_late(pair):
    """A rank may be stopped while it waits, and go on when its deadline has passed: its peers did answer."""
    zero, one = pair
    post(zero, 1, 100)
    post(one, 1, 100)
    message = zero.receive(CallId(1, "test"), 1, Deadline(0.0))
    assert message.body.numel() == 100
    with pytest.raises(PeerTimeout, match="no answer within timeout_s"):
        zero.receive(post(zero, 2, 100), 1, Deadline(0.0))


def test_an_empty_message_needs_no_segment(pair):
    exchange(pair, 1, 0)
    assert pair[0]._segments == []


def test_a_message_of_a_call_made_without_its_sender_is_dropped(pair):
    zero, one = pair
    post(zero, 1, 100, skip=frozenset({1}))
    zero.finish(CallId(1, "test"), None)
    post(one, 1, 100)
    post(one, 2, 100)
    post(zero, 2, 100)
    assert receive(zero, 2, 1) == 100
    assert zero._peers[1].inbox == {}


def test_a_message_that_arrived_before_its_call_was_skipped_is_dropped(pair):
    zero, one = pair
    exchange(pair, 1, 100)
    post(one, 2, 100)
    post(one, 3, 100)
    post(zero, 2, 100, skip=frozenset({1}))
    zero.finish(CallId(2, "test"), None)
    post(zero, 3, 100)
    assert receive(zero, 3, 1) == 100
    assert zero._peers[1].inbox == {}


def test_a_message_that_was_read_before_its_call_was_skipped_is_dropped(pair):
    zero, one = pair
    post(one, 1, 100)
    post(one, 2, 100)
    post(zero, 1, 100)
    assert receive(zero, 1, 1) == 100
    zero.finish(CallId(1, "test"), None)
    while 2 not in zero._peers[1].inbox:
        zero._progress(1.0)
    post(zero, 2, 100, skip=frozenset({1}))
    assert zero._peers[1].inbox == {}


def test_drop_peer_keeps_what_the_peer_may_still_read(pair):
    zero, _ = pair
    post(zero, 1, 100)
    segment = zero._segments[0]
    zero.drop_peer(1)
    zero.finish(CallId(1, "test"), None)
    post(zero, 2, 100, skip=frozenset({1}))
    assert segment not in zero._segments
    assert bool((segment.memory[:100] == 1).all())


def test_a_closed_peer_is_named_at_once(pair):
    zero, one = pair
    exchange(pair, 1, 100)
    one.close(linger=False)
    post(zero, 2, 100)
    with pytest.raises(
        PeerTimeout, match=r"test #2: rank 0 waited \d\.\d s for rank 1: its process ended.*test #1"
    ) as info:
        receive(zero, 2, 1)
    assert (info.value.peers, info.value.phase, info.value.call, info.value.rank) == ((1,), "test", 2, 0)


def test_messages_sent_before_a_peer_closed_are_still_received(pair):
    zero, one = pair
    post(one, 1, 100)
    one.close(linger=True)
    post(zero, 1, 100)
    assert receive(zero, 1, 1) == 100


def test_a_group_of_one_shares_nothing(monkeypatch):
    monkeypatch.setattr("os.memfd_create", None)  # as where it is forbidden
    alone = SharedMemoryTransport(0, {})
    call = CallId(1, "test")
    (buffer,) = alone.open(call, [100])
    buffer.fill_(7)
    alone.post(call, [HEADER], Deadline(PATIENCE_S))
    assert bool((alone.receive(call, 0, Deadline(PATIENCE_S)).body == 7).all())


def test_a_peer_that_leaves_says_why(pair):
    zero, one = pair
    post(one, 1, 100)
    one.leave("ä" * 1000, wait=True)
    one.close(linger=False)
    post(zero, 1, 100)
    assert receive(zero, 1, 1) == 100
    post(zero, 2, 100)
    with pytest.raises(PeerTimeout, match=r"test #2: .* rank 1: it left the group: ä{1000}\. The last"):
        receive(zero, 2, 1)


def test_a_peer_that_leaves_does_not_wait_for_one_that_reads_nothing(pair):
    zero, _ = pair
    with contextlib.suppress(BlockingIOError):
        while True:
            zero._peers[1].socket.send(bytes(1 << 16))
    zero.leave("no reason", wait=True)


def test_descriptors_that_find_no_space_are_an_error(pair):
    zero, one = pair
    post(zero, 1, 100)
    post(one, 1, 100)
    with descriptors_left(0), pytest.raises(ResourceError, match="RLIMIT_NOFILE") as caught:
        receive(zero, 1, 1)
    assert caught.value.errno == errno.EMFILE


def test_a_closed_transport_holds_no_memory(pair):
    """Neither segments nor mappings, of messages that nobody has received either."""
    gc.collect()
    before = mapped_segments()
    for transport in pair:
        post(transport, 1, 10_000_000)
    for transport in pair:
        transport.highest_announced_call()
    assert mapped_segments() == before + 4
    for transport in pair:
        transport.close(linger=False)
    assert mapped_segments() == before


def mapped_segments() -> int:
    with open("/proc/self/maps") as file:
        return sum("memfd:tokenferry" in line for line in file)


def test_a_silent_peer_is_named_at_the_deadline(pair):
    zero, _ = pair
    call = post(zero, 1, 100)
    with pytest.raises(
        PeerTimeout, match=r"rank 1: no answer within timeout_s. Nothing was received from rank 1 before"
    ):
        zero.receive(call, 1, Deadline(0.05))


def test_a_peer_that_reads_nothing_fails_the_send_in_time(pair):
    pair[0].patient = True  # else it would be given up when it has not answered some messages

    def post_without_end():
        for number in range(1, 100_000):
            post(pair[0], number, 0, timeout_s=0.05)

    with pytest.raises(PeerTimeout, match="it reads no messages"):
        post_without_end()


def test_a_blocked_send_continues_when_the_peer_reads():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    pid = os.fork()
    if pid == 0:  # the peer, in a process of its own
        one, good = SharedMemoryTransport(1, {0: theirs}), True
        for number in range(1, 301):
            call = CallId(number, "test")
            one.open(call, [0, 0])
            one.post(call, [HEADER, HEADER], Deadline(PATIENCE_S))
            good &= one.receive(call, 0, Deadline(PATIENCE_S)).header == HEADER
            one.finish(call, None)
        os._exit(0 if good else 1)
    zero = SharedMemoryTransport(0, {1: ours})
    theirs.close()
    for number in range(1, 301):
        call = CallId(number, "test")
        zero.open(call, [0, 0])
        zero.post(call, [HEADER, HEADER], Deadline(PATIENCE_S))
    assert os.waitpid(pid, 0)[1] == 0
    zero.close(linger=False)


def test_too_little_memory_raises_instead_of_killing(pair):
    with pytest.raises(ResourceError, match=r"cannot allocate .* bytes of shared memory: .* refused"):
        pair[0].open(CallId(1, "test"), [0, 1 << 55])


def test_watermarks_wait_for_the_slowest_reader_and_for_calls_that_finish_out_of_order():
    watermarks = Watermarks(3)
    watermarks.finish(2)
    assert watermarks.local == 0
    watermarks.finish(1)
    assert watermarks.local == 2
    watermarks.update(1, 5)
    watermarks.update(2, 4)
    assert watermarks.reached(4, frozenset({1, 2}))
    assert not watermarks.reached(5, frozenset({1, 2}))
    assert watermarks.reached(5, frozenset({1}))
    watermarks.update(1, 3)  # an older watermark changes nothing
    assert watermarks.reached(5, frozenset({1}))


def test_bodies_are_shared_not_copied(pair):
    zero, one = pair
    post(one, 1, 64)
    post(zero, 1, 64)
    body = zero.receive(CallId(1, "test"), 1, Deadline(PATIENCE_S)).body
    one._segments[0].memory.fill_(9)
    assert bool((body == 9).all())
    assert body.dtype == torch.uint8
