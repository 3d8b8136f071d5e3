"""LocalWire: ranks whose call numbers differ agree on one, and go on."""

import socket

import pytest
import test_local
from test_local import HEADER, exchange, post

from tokenferry.wires.base import Call, Deadline
from tokenferry.wires.local import LocalWire


@pytest.fixture
def wires():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    made = LocalWire(0, {1: ours}), LocalWire(1, {0: theirs})
    yield made
    for wire in made:
        wire.close(linger=False)


def test_who_was_away_hears_the_number_and_goes_on_from_there(wires):
    for number in (1, 2, 3):
        exchange(wires, number, 1000)
    here, there = wires
    for number in range(4, 50):  # without the other
        call = post(here, number, 1000, skip=frozenset({1}))
        assert here.take(call, 0, Deadline(1.0)).header == HEADER
        here.finish(call, None)
    post(there, 4, 1000)  # what it sent before it was stopped, and never took
    here.tell_number(49, frozenset())
    there.tell_number(4, frozenset())
    assert (there.heard_number(), here.heard_number()) == (49, 4)
    for wire in wires:
        wire.go_on_from(49)
    for number in range(50, 80):
        exchange(wires, number, 1000)
    assert all(len(wire._segments) <= 3 for wire in wires), "no segment is ever free again"
    assert not any(peer.inbox for wire in wires for peer in wire._peers.values())


def test_nobody_is_told_who_is_to_be_skipped(wires):
    wires[0].tell_number(7, frozenset({1}))
    assert wires[1].heard_number() == 0


def test_what_is_here_of_later_calls_stays(wires):
    post(wires[0], 6, 100)
    wires[0].tell_number(5, frozenset())
    assert wires[1].heard_number() == 5
    wires[1].go_on_from(5)
    post(wires[1], 6, 100)
    assert test_local.take(wires[1], 6, 0) == 100
    assert wires[0].take(Call(6, "test"), 1, Deadline(1.0)).header == HEADER
