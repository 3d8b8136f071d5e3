"""Calls that are received late or never, over each transport, both ends in one process.

What they leave behind must not grow, hold up later calls, or be taken for a message of theirs.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from support.transport_pair import HEADER, PATIENCE_S, connected, exchange, post, receive
from tokenferry.errors import PeerTimeout
from tokenferry.transports.base import MOST_AWAITED, CallId, Deadline
from tokenferry.transports.process_group import ProcessGroupTransport
from tokenferry.transports.shared_memory import SharedMemoryTransport

TAGS = 1 << 15
"""After so many messages between two ranks their tags come again."""
FEW = 20
"""More segments, messages and calls than a transport keeps for calls that nobody waits for."""


@contextlib.contextmanager
def over_gloo() -> Iterator[list[ProcessGroupTransport]]:
    """Yield the transports of ranks 0 and 1 over a process group, and close them."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=60)), range(2)))
    transports = [ProcessGroupTransport(group) for group in groups]
    yield transports
    for transport in transports:
        transport.close(linger=False)


@pytest.fixture
def gloo() -> Iterator[list[ProcessGroupTransport]]:
    with over_gloo() as transports:
        yield transports


@pytest.fixture(params=[connected, over_gloo], ids=["shared_memory", "process_group"])
def pair(request: pytest.FixtureRequest) -> Iterator[list[SharedMemoryTransport] | list[ProcessGroupTransport]]:
    with request.param() as transports:
        yield transports


def held(transport: SharedMemoryTransport | ProcessGroupTransport) -> int:
    """Return how many segments or messages a transport holds, whether they are to be read here or by the peer."""
    if isinstance(transport, SharedMemoryTransport):
        return len(transport._segments) + sum(len(peer.inbox) for peer in transport._peers.values())
    return sum(map(len, (*transport._incoming, *transport._outgoing)))


def call(number: int) -> CallId:
    return CallId(number, "test")


def post_on_both(pair, number: int, size: int = 1000) -> None:
    for transport in pair:
        post(transport, number, size)


def receive_late(pair, number: int, size: int = 1000) -> None:
    """Receive a call as its hook does."""
    for transport in pair:
        assert [receive(transport, number, src) for src in (1, 0)] == [size, size]
        transport.finish(call(number), None)


def make_tags_come_again(gloo, messages: int) -> None:
    """Count as if ranks had exchanged so many messages more than a number of tags takes, less those to come."""
    for transport in gloo:
        transport._next_numbers = [number + TAGS - messages for number in transport._next_numbers]


# ---------------------------------------------------------------------- never received


def test_ranks_that_forget_all_calls_hold_few_of_them(pair):
    for number in range(1, 200):
        post_on_both(pair, number)
        for transport in pair:
            transport.forget(call(number))
            assert held(transport) <= 3 * MOST_AWAITED + 10
    for number in range(200, 203):
        exchange(pair, number, 1000)
    assert max(map(held, pair)) < FEW


def test_forgotten_calls_are_gone_with_the_next_one_that_is_received(pair):
    for number in range(1, 20, 2):
        post_on_both(pair, number)
        for transport in pair:
            transport.forget(call(number))
        exchange(pair, number + 1, 1000)
        assert max(map(held, pair)) < 10


def test_calls_that_one_rank_forgets_are_received_by_the_other(pair):
    zero, one = pair
    for number in range(1, 50):
        post_on_both(pair, number)
        zero.forget(call(number))
        assert [receive(one, number, src) for src in (1, 0)] == [1000, 1000]
        one.finish(call(number), None)
    exchange(pair, 50, 1000)
    exchange(pair, 51, 1000)
    assert max(map(held, pair)) < FEW


def test_a_rank_that_forgets_all_calls_does_not_run_ahead(pair):
    """It may await some messages of its peer, and no more, though it will not look at them."""
    zero, one = pair
    posted, least = [0], [0]

    def run_ahead() -> None:
        for number in range(1, 200):
            post(zero, number, 1000)
            assert number - least[0] <= MOST_AWAITED + 1
            posted[0] = number
            zero.forget(call(number))

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(run_ahead)
        for number in range(1, 200):
            least[0] = number
            post(one, number, 1000)
            one.forget(call(number))
        ahead.result(PATIENCE_S)
    assert posted[0] == 199


def test_a_silent_peer_ends_a_rank_that_forgets_all_calls(gloo):
    zero, _ = gloo
    for number in range(1, MOST_AWAITED + 1):
        post(zero, number, 10)
        zero.forget(call(number))
    number = MOST_AWAITED + 1
    post(zero, number, 10, timeout_s=0.05)
    with pytest.raises(PeerTimeout, match="rank 1: no answer within timeout_s"):
        zero.receive(call(number), 1, Deadline(PATIENCE_S))


@pytest.mark.parametrize("size", [1000, 10], ids=["same_size", "other_size"])
def test_a_tag_that_comes_again_brings_the_new_message(gloo, size):
    post_on_both(gloo, 1, 1000)
    for transport in gloo:
        transport.forget(call(1))
    make_tags_come_again(gloo, 10)
    for number in range(2, 25):
        exchange(gloo, number, size)


def test_a_tag_that_comes_again_brings_no_message_of_a_rank_that_was_masked(gloo):
    post_on_both(gloo, 1)
    for rank, transport in enumerate(gloo):
        transport.drop_peer(1 - rank)
        transport.finish(call(1), None)
    make_tags_come_again(gloo, 10)
    for number in range(2, 25):
        exchange(gloo, number, 1000)
    assert max(map(held, gloo)) <= 1, "more than what was sent last"


def test_what_a_rank_that_leaves_says_is_found_behind_forgotten_calls(gloo):
    zero, one = gloo
    post_on_both(gloo, 1)
    for transport in gloo:
        transport.forget(call(1))
    post(zero, 2, 1000)
    zero.forget(call(2))
    post(zero, 3, 1000)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(one.leave, "no more", wait=True)
        with pytest.raises(PeerTimeout, match="rank 1: it left the group: no more"):
            receive(zero, 3, 1)
        leaving.result(PATIENCE_S)


def test_a_rank_that_has_left_is_named_in_every_later_call(gloo):
    """Whichever call finds it first: one that cannot await more, one after it, or an older one that waited."""
    zero, one = gloo
    for number in range(1, MOST_AWAITED + 1):
        post(zero, number, 10)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(one.leave, "no more", wait=True)
        for number in (MOST_AWAITED + 1, MOST_AWAITED + 2):
            post(zero, number, 10)
            with pytest.raises(PeerTimeout, match="rank 1: it left the group: no more"):
                receive(zero, number, 1)
        with pytest.raises(PeerTimeout, match="rank 1: it left the group: no more"):
            receive(zero, 1, 1)
        leaving.result(PATIENCE_S)


def test_a_rank_that_has_gone_makes_no_call_take_a_segment():
    with connected() as (zero, one):
        exchange((zero, one), 1, 1000)
        one.close(linger=False)
        for number in range(2, 200):
            post(zero, number, 1000)
            zero.forget(call(number))
        assert len(zero._segments) < FEW
        assert len(zero._peers[1].awaited) <= MOST_AWAITED


@pytest.mark.parametrize("patient", [False, True])
def test_a_rank_that_is_far_behind_is_waited_for_once(patient):
    """If silent ranks are masked, half of the time is left to the call that finds out which are."""
    with connected() as (zero, _):
        zero.patient = patient
        for number in range(1, MOST_AWAITED + 1):
            post(zero, number, 10)
            zero.forget(call(number))
        number, deadline = MOST_AWAITED + 1, Deadline(0.4)
        zero.open(call(number), [10, 10])
        if not patient:
            with pytest.raises(
                PeerTimeout, match=r"test #33: rank 0 waited \S+ s for rank 1: no answer within timeout_s"
            ):
                zero.post(call(number), [HEADER, HEADER], deadline)
            return
        zero.post(call(number), [HEADER, HEADER], deadline)
        assert deadline.waited() >= 0.2


def test_a_header_that_came_in_a_later_call_is_compared(gloo):
    """Before its body is awaited, which may never come: its sender may have found out first."""
    zero, one = gloo
    post_on_both(gloo, 1)
    post_on_both(gloo, 2)
    receive(zero, 2, 1)
    compared = []

    def check(src: int, header: tuple[int, ...]) -> None:
        compared.append((src, header))

    for src in (1, 0):
        zero.receive(call(1), src, Deadline(PATIENCE_S), check)
    assert compared == [(1, HEADER)], "not once"
    receive(one, 1, 0)
    receive(one, 2, 0)


# ---------------------------------------------------------------------- received late


def test_one_call_in_flight_makes_no_later_one_take_memory(pair):
    post_on_both(pair, 1)
    for number in range(2, 200):
        exchange(pair, number, 1000)
        assert max(map(held, pair)) <= FEW
    receive_late(pair, 1)
    for number in range(200, 203):
        exchange(pair, number, 1000)


def test_calls_beside_one_in_flight_are_given_back_if_hooks_receive_them(pair):
    post_on_both(pair, 1)
    for number in range(2, 200):
        post_on_both(pair, number)
        receive_late(pair, number)
        assert max(map(held, pair)) <= 2 * FEW
    receive_late(pair, 1)


def test_any_number_of_calls_in_flight_keep_their_bytes(pair):
    for number in range(1, 101):
        post_on_both(pair, number)
    if isinstance(pair[0], SharedMemoryTransport):
        assert max(len(transport._segments) for transport in pair) <= FEW, "one for each call in flight"
    order = [*range(100, 0, -3), *range(99, 0, -3), *range(98, 0, -3)]
    assert sorted(order) == list(range(1, 101))
    for number in order:
        receive_late(pair, number)
    for number in range(101, 104):
        exchange(pair, number, 1000)
    assert max(map(held, pair)) <= 2 * FEW


def test_a_tag_that_comes_again_does_not_meet_a_call_in_flight(gloo):
    post_on_both(gloo, 1)
    make_tags_come_again(gloo, 10)
    for number in range(2, 25):
        exchange(gloo, number, 1000)
    receive_late(gloo, 1)


def test_a_call_that_is_being_read_is_not_taken_for_one_that_waits():
    """Rows of another node are passed on while the call that brought them is read: each is a call of its own."""
    with connected() as pair:
        post_on_both(pair, 1)
        bodies = [
            transport.receive(call(1), 1 - rank, Deadline(PATIENCE_S)).body for rank, transport in enumerate(pair)
        ]
        for number in range(2, 60):
            exchange(pair, number, 1000)
        assert all(bool((body == 1).all()) for body in bodies), "its memory was used again"


def test_segments_that_are_not_needed_any_more_are_given_back():
    with connected() as pair:
        for number in range(1, 15):
            post_on_both(pair, number)
        for number in range(1, 15):
            receive_late(pair, number)
        assert min(len(transport._segments) for transport in pair) > 10
        for number in range(15, 300):
            exchange(pair, number, 1000)
        assert max(len(transport._segments) for transport in pair) <= 2
        for transport in pair:
            (peer,) = transport._peers.values()
            assert len(peer.mappings) <= 2
