"""Failure reports: which ranks a rank names that has waited for others, and what a bad store costs."""

import re
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.errors import MismatchError, PeerTimeout, ResourceError
from tokenferry.topology import Topology, consecutive
from tokenferry.transports import rendezvous
from tokenferry.transports.base import CallId, peer_timeout
from tokenferry.transports.failures import FailureReport, FailureReports, patience_s
from tokenferry.transports.process_group import GROUP_IDS

NODES = consecutive(6, 2)
PATIENCE_S = 0.2


def reports(rank: int, store) -> FailureReports:
    return FailureReports(SimpleNamespace(get_group_store=lambda: store), 7, Topology(rank, NODES))


def late(rank: int, *peers: int, call: int = 3) -> PeerTimeout:
    return PeerTimeout("late.", phase="dispatch", call=call, rank=rank, peers=peers, waited_s=1.0)


def silent(rank: int) -> str:
    return ""


def explain(posted: dict[int, Exception], error: PeerTimeout) -> PeerTimeout | MismatchError:
    """Return what a rank makes of its error, when other ranks have posted theirs."""
    store = dist.HashStore()
    for rank, other in posted.items():
        reports(rank, store).post(FailureReport.of(other))
    return reports(error.rank, store).explain(error, time.monotonic() + PATIENCE_S, silent)


@pytest.mark.parametrize(
    ("posted", "peers", "nodes"),
    [
        ({}, (1,), (0,)),
        ({1: late(1, 3)}, (3,), (1,)),
        ({1: late(1, 3), 3: late(3, 5, 2), 2: late(2, 4)}, (4, 5), (2,)),
        ({1: late(1, 2), 2: late(2, 1)}, (1,), (0,)),
        ({1: late(1, 0)}, (1,), (0,)),
        ({1: late(1, 2), 2: late(2, 0, 4)}, (4,), (2,)),
        ({1: late(1, 2), 2: late(2, 0, call=4)}, (2,), (1,)),
        ({1: late(1, 2, call=4), 2: late(2, 0, call=4)}, (1,), (0,)),
        ({1: late(1, 3), 3: late(3, 5, call=9)}, (5,), (2,)),
    ],
    ids=[
        *("silent", "one behind", "two behind", "a circle", "each other", "circle with a way out"),
        *("lost on the way from 2 to 1", "lost on the way from 1 to 0", "no circle, whatever the calls"),
    ],
)
def test_the_ranks_at_the_ends_of_all_waits_are_named(posted, peers, nodes):
    error = explain(posted, late(0, 1))
    assert isinstance(error, PeerTimeout)
    assert (error.peers, error.nodes) == (peers, nodes), error
    assert (error.phase, error.call, error.rank, error.waited_s) == ("dispatch", 3, 0, 1.0)
    assert f"rank {peers[0]} on node {nodes[0]}" in str(error)


@pytest.mark.parametrize("posted", [{1: late(1, 0)}, {1: late(1, 2), 2: late(2, 0)}, {1: late(1, 5)}])
def test_a_mismatch_that_another_rank_has_seen(posted):
    """Two ranks may wait for each other because of it, and neither has met the rank that has seen it."""
    error = explain({**posted, 5: MismatchError("rank 5 and rank 4 made different calls")}, late(0, 1))
    assert isinstance(error, MismatchError)
    assert "dispatch #3: rank 0 waited for rank 1; the cause: rank 5 and rank 4 made different calls" in str(error)


def test_the_error_of_a_rank_that_has_left():
    refused = ResourceError("dispatch: rank 3: memory refused", resource="memory", errno=12)
    error = explain({1: late(1, 3, 5), 3: refused}, late(0, 1))
    assert error.peers == (3,)
    assert "rank 3 on node 1, for which rank 1 waited: ResourceError: dispatch: rank 3: memory refused" in str(error)


@pytest.mark.parametrize("sent", [0, 10, 40, -1])
def test_a_report_that_did_not_come_whole_is_none(sent):
    """The rank that sent it may have had no memory for the rest; what is in the store counts then."""
    whole = FailureReport.of(late(1, 3))
    assert FailureReport.parse(whole.text()) == whole
    part = whole.text()[:sent]
    assert FailureReport.parse(part) is None
    store = dist.HashStore()
    for left_to_store, peers in ((False, (1,)), (True, (3,))):
        if left_to_store:
            reports(1, store).post(whole)
        error = reports(0, store).explain(late(0, 1), 0.0, lambda rank: part if rank == 1 else "")
        assert error.peers == peers


def test_a_group_is_closed_whatever_becomes_of_its_report():
    failed = mock.Mock(**{"post.side_effect": KeyboardInterrupt})
    transport = mock.Mock(rank=0, num_ranks=2)
    exchange = Exchange(transport, 5.0, mask_on_timeout=False, reports=failed)
    with pytest.raises(KeyboardInterrupt), exchange.guard("dispatch"):
        raise late(0, 1)
    assert exchange.broken == "is broken by an earlier PeerTimeout in dispatch #0"
    transport.close.assert_called_once_with(linger=False)


@pytest.mark.parametrize("why", ["it closed the group", "it left the group: ValueError: no more."])
@pytest.mark.parametrize("last", ["", "Nothing was received from rank 1 before."])
@pytest.mark.parametrize("posted", [{}, {1: ResourceError("no memory", resource="memory", errno=12)}])
def test_messages_are_sentences(why, last, posted):
    met = peer_timeout(CallId(3, "dispatch"), 0, [1], why, 1.0, last)
    for message in (str(met), str(explain(posted, met))):
        assert "  " not in message
        assert ".." not in message
        sentences = re.split(r"(?<=\.) (?=[A-Z])", message)
        assert sentences[0] == f"dispatch #3: rank 0 waited 1.0 s for rank 1: {why.removesuffix('.')}."
        assert sentences[1:2] == ([last] if last else sentences[1:2])
        assert sentences[-1].startswith("The group is broken; `tokenferry explain-error PeerTimeout` ")
        assert message.endswith(" what to do")
    cause = ": ResourceError: no memory." if posted else "."
    assert sentences[-2] == f"The cause is rank 1 on node 0{cause}", "before the advice"


class Blocked:
    """A store whose host is gone: each question takes for ever."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer = threading.Event()

    def add(self, key: str, amount: int) -> int:
        self.check([key])
        return amount

    def set(self, key: str, text: str) -> None:
        self.check([key])

    def check(self, keys: list[str]) -> None:
        self.asked += 1
        self.answer.wait()


def test_reports_of_this_group_have_come():
    store = dist.HashStore()
    other = FailureReports(SimpleNamespace(get_group_store=lambda: store), 8, Topology(4, NODES))
    other.post(FailureReport((1,)))
    assert reports(0, store).have_come() is False
    reports(5, store).post(FailureReport((1,)))
    assert reports(0, store).have_come() is True
    assert reports(0, Blocked()).have_come() is None


def test_a_store_that_does_not_answer_is_asked_once():
    store = Blocked()
    mine = reports(0, store)
    start = time.monotonic()
    mine.post(FailureReport.of(late(0, 1)))
    error = mine.explain(late(0, 1), start + PATIENCE_S, silent)
    took_s = time.monotonic() - start
    store.answer.set()
    assert (error.peers, store.asked) == ((1,), 1)
    assert took_s < 15.0, "each question took its time"


def test_what_a_rank_of_the_node_says_while_the_store_is_asked():
    store, said = Blocked(), ["", late(1, 3, 5)]

    def reason(rank: int) -> str:
        one = said.pop(0) if len(said) > 1 else said[0]
        return FailureReport.of(one).text() if one and rank == 1 else ""

    error = reports(0, store).explain(late(0, 1), time.monotonic() + PATIENCE_S, reason)
    store.answer.set()
    assert error.peers == (3, 5)


def test_a_group_is_made_without_its_answer():
    """A number that is drawn takes the place of the one that the store would have given out."""
    store = Blocked()
    start = time.monotonic()
    number = rendezvous.new_group_id(SimpleNamespace(get_group_store=lambda: store))
    took_s = time.monotonic() - start
    store.answer.set()
    assert 0 <= number < GROUP_IDS
    assert (store.asked, took_s < 15.0) == (1, True)


class Broken:
    """A store whose connection has failed."""

    def set(self, key: str, text: str) -> None:
        self.check([key])

    def check(self, keys: list[str]) -> None:
        raise dist.DistNetworkError("Broken pipe")


def none(self) -> None:
    raise RuntimeError("can't start new thread")


def test_without_a_store_a_rank_names_those_for_which_it_waited():
    def no_store():
        raise RuntimeError("no store")

    groups = [SimpleNamespace(get_group_store=no_store), SimpleNamespace(get_group_store=Broken)]
    for group in groups:
        mine = FailureReports(group, 7, Topology(0, NODES))
        mine.post(FailureReport.of(late(0, 3)))
        assert mine.explain(late(0, 3), 0.0, silent).peers == (3,)
    with mock.patch("threading.Thread.start", none):
        mine = reports(0, dist.HashStore())
        mine.post(FailureReport.of(late(0, 3)))
        assert mine.explain(late(0, 3), 0.0, silent).peers == (3,)


def test_without_a_store_a_rank_knows_what_those_of_its_node_have_said():
    def reason(rank: int) -> str:
        return FailureReport.of(late(1, 3, 5)).text() if rank == 1 else ""

    error = reports(0, Broken()).explain(late(0, 1), 0.0, reason)
    assert (error.peers, error.nodes) == ((3, 5), (1, 2))


@pytest.mark.parametrize(
    ("timeout_s", "waited_s", "patience"),
    [(4.0, 4.0, 1.0), (100.0, 90.0, 10.0), (100.0, 0.1, 1.0), (2.0, 0.1, 0.5)],
)
def test_ranks_that_began_late_are_given_time(timeout_s, waited_s, patience):
    """A deadline expires on each rank when its own call has lasted so long; what ends is noticed by all at once."""
    assert patience_s(timeout_s, waited_s) == patience
