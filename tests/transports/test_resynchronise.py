"""SharedMemoryTransport: ranks whose call numbers differ agree on one and continue."""

import pytest

from support.transport_pair import HEADER, PATIENCE_S, connected, exchange, post, receive
from tokenferry.transports.base import CallId, Deadline


@pytest.fixture
def transports():
    with connected() as pair:
        yield pair


def test_a_returning_rank_continues_from_the_highest_number(transports):
    for number in (1, 2, 3):
        exchange(transports, number, 1000)
    here, there = transports
    for number in range(4, 50):  # without rank 1
        call = post(here, number, 1000, skip=frozenset({1}))
        assert here.receive(call, 0, Deadline(PATIENCE_S)).header == HEADER
        here.finish(call, None)
    post(there, 4, 1000)  # sent before it was stopped, and never received
    here.announce_call(49, frozenset())
    there.announce_call(4, frozenset())
    assert (there.highest_announced_call(), here.highest_announced_call()) == (49, 4)
    for transport in transports:
        transport.skip_to(49)
    for number in range(50, 80):
        exchange(transports, number, 1000)
    assert all(len(transport._segments) <= 3 for transport in transports), "no segment is ever free again"
    assert not any(peer.inbox for transport in transports for peer in transport._peers.values())


def test_skipped_ranks_get_no_announcement(transports):
    transports[0].announce_call(7, frozenset({1}))
    assert transports[1].highest_announced_call() == 0


def test_messages_of_later_calls_are_kept(transports):
    post(transports[0], 6, 100)
    transports[0].announce_call(5, frozenset())
    assert transports[1].highest_announced_call() == 5
    transports[1].skip_to(5)
    post(transports[1], 6, 100)
    assert receive(transports[1], 6, 0) == 100
    assert transports[0].receive(CallId(6, "test"), 1, Deadline(PATIENCE_S)).header == HEADER
