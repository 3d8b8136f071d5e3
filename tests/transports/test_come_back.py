"""SharedMemoryTransport: ranks whose call numbers differ agree on one, and go on."""

import socket

import pytest

from support.shared_memory_jobs import HEADER, exchange, post, take
from tokenferry.transports.base import CallId, Deadline
from tokenferry.transports.shared_memory import SharedMemoryTransport


@pytest.fixture
def transports():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    made = SharedMemoryTransport(0, {1: ours}), SharedMemoryTransport(1, {0: theirs})
    yield made
    for transport in made:
        transport.close(linger=False)


def test_who_was_away_hears_the_number_and_goes_on_from_there(transports):
    for number in (1, 2, 3):
        exchange(transports, number, 1000)
    here, there = transports
    for number in range(4, 50):  # without the other
        call = post(here, number, 1000, skip=frozenset({1}))
        assert here.take(call, 0, Deadline(1.0)).header == HEADER
        here.finish(call, None)
    post(there, 4, 1000)  # what it sent before it was stopped, and never took
    here.tell_number(49, frozenset())
    there.tell_number(4, frozenset())
    assert (there.heard_number(), here.heard_number()) == (49, 4)
    for transport in transports:
        transport.go_on_from(49)
    for number in range(50, 80):
        exchange(transports, number, 1000)
    assert all(len(transport._segments) <= 3 for transport in transports), "no segment is ever free again"
    assert not any(peer.inbox for transport in transports for peer in transport._peers.values())


def test_nobody_is_told_who_is_to_be_skipped(transports):
    transports[0].tell_number(7, frozenset({1}))
    assert transports[1].heard_number() == 0


def test_what_is_here_of_later_calls_stays(transports):
    post(transports[0], 6, 100)
    transports[0].tell_number(5, frozenset())
    assert transports[1].heard_number() == 5
    transports[1].go_on_from(5)
    post(transports[1], 6, 100)
    assert take(transports[1], 6, 0) == 100
    assert transports[0].take(CallId(6, "test"), 1, Deadline(1.0)).header == HEADER
