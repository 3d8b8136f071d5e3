"""The host's half of rails over NCCL: deadlines, and what is kept; the exchanges themselves are stand-ins."""

import gc
import threading
from unittest import mock

import pytest
import torch

from tokenferry.backends.cuda.across.nccl_rails import NcclRails
from tokenferry.backends.cuda.setup import find_topology
from tokenferry.errors import ConfigError, PeerTimeout
from tokenferry.topology import Topology, consecutive
from tokenferry.transports.base import CallId
from tokenferry.transports.failures import FailureReport

CALL = CallId(7, "combine (between nodes)")
TOPOLOGY = Topology(2, consecutive(6, 2))
"""Rank 2 is on node 1, and its rail is 0, 2, 4."""
SOON_S = 10.0


class Work:
    """An exchange that ends when it is told to."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.joined = 0

    def is_completed(self) -> bool:
        return self.done.is_set()

    def wait(self) -> None:
        self.joined += 1


class Rails(NcclRails):
    """Rails whose exchanges are stand-ins."""

    def __init__(self, timeout_s: float, **options) -> None:
        self.works: list[Work] = []
        self.aborted = threading.Event()
        super().__init__(mock.Mock(), TOPOLOGY, timeout_s, **options)

    def _start(self, send, recv):
        self.works.append(Work())
        return [self.works[-1]]

    def _abort(self) -> None:
        self.aborted.set()


def begin(rails: Rails, *nodes: int):
    send = {node: [torch.zeros(3)] for node in nodes}
    return rails.exchange(CALL, send, {node: [torch.zeros(3)] for node in nodes})


def test_an_exchange_is_waited_for():
    rails = Rails(SOON_S)
    transfer = begin(rails, 0, 2)
    threading.Timer(0.05, rails.works[0].done.set).start()
    transfer.wait()
    assert rails.works[0].joined == 1, "the stream does not wait"
    transfer.join()
    assert rails.works[0].joined == 2
    rails.close()
    assert not rails.aborted.is_set()


def test_nothing_to_exchange():
    rails = Rails(SOON_S)
    transfer = rails.exchange(CALL, {}, {})
    transfer.wait()
    transfer.join()
    assert rails.works == []
    rails.close()


def test_a_late_exchange_is_given_up_by_the_host_that_waits():
    reports = mock.Mock()
    rails = Rails(0.1, reports=reports)
    done = begin(rails, 0)
    rails.works[0].done.set()
    done.wait()
    transfer = begin(rails, 2)
    with pytest.raises(PeerTimeout, match=r"^combine \(between nodes\) #7: rank 2 waited .* for rank 4: ") as caught:
        transfer.wait()
    assert (caught.value.peers, caught.value.nodes) == ((4,), (2,))
    assert rails.aborted.wait(SOON_S)
    reports.post.assert_called_once_with(FailureReport((4,)))
    with pytest.raises(PeerTimeout):
        rails.raise_lost()


def test_a_late_exchange_is_given_up_while_nobody_waits():
    rails = Rails(0.1)
    transfer = begin(rails, 0, 2)
    transfer.join()
    rails.raise_lost()
    assert rails.aborted.wait(SOON_S)
    with pytest.raises(PeerTimeout) as caught:
        rails.raise_lost()
    assert caught.value.peers == (0, 4)
    rails.works[0].done.set()  # as aborted kernels end
    with pytest.raises(PeerTimeout):
        transfer.wait()


def test_exchanges_of_different_calls_end_soon():
    """NCCL does not compare sizes, so they may never end."""
    mismatched = threading.Event()
    rails = Rails(SOON_S * 10)
    rails.end_soon_if(mismatched.is_set)
    with mock.patch("tokenferry.backends.cuda.across.nccl_rails._HOPELESS_S", 0.2):
        begin(rails, 0)
        assert not rails.aborted.wait(0.4)
        mismatched.set()
        assert rails.aborted.wait(SOON_S)


SOON = "tokenferry.backends.cuda.across.nccl_rails"


@pytest.mark.parametrize("answer", [True, False, None])
def test_an_exchange_ends_soon_after_another_rank_has_reported(answer):
    """It may be cut off by the end of a process, which only the ranks of its node notice."""
    reports = mock.Mock()
    reports.have_come.return_value = False
    rails = Rails(SOON_S * 10, reports=reports)
    with mock.patch(f"{SOON}._HOPELESS_S", 0.1), mock.patch(f"{SOON}._ASK_S", 0.1):
        begin(rails, 0)
        assert not rails.aborted.wait(0.4), "a long exchange is no fault"
        assert reports.have_come.call_count >= 2
        reports.have_come.reset_mock()
        reports.have_come.return_value = answer
        assert rails.aborted.wait(SOON_S if answer else 0.6) is bool(answer)
        assert (reports.have_come.call_count == 1) is (answer is not False), "asked again without need, or not at all"
    if answer:
        with pytest.raises(PeerTimeout, match=r"rank 2 waited .* for rank 0: ") as caught:
            rails.raise_lost()
        assert caught.value.nodes == (0,)
    rails.close()


def test_a_short_exchange_asks_nobody():
    reports = mock.Mock()
    rails = Rails(SOON_S, reports=reports)
    for node in (0, 2):
        transfer = begin(rails, node)
        rails.works[-1].done.set()
        transfer.wait()
    rails.close()
    reports.have_come.assert_not_called()


def test_the_deadline_counts_from_when_the_stream_is_there():
    """Work before an exchange may take any time."""
    rails = Rails(0.1)
    reached = threading.Event()
    with mock.patch("tokenferry.backends.cuda.across.nccl_rails._marked", return_value=reached.is_set):
        begin(rails, 0)
    assert not rails.aborted.wait(0.4)
    reached.set()
    assert rails.aborted.wait(SOON_S)


def test_what_a_graph_captures_is_not_looked_after():
    rails = Rails(0.05)
    with mock.patch("tokenferry.backends.cuda.across.nccl_rails._marked", return_value=None):
        begin(rails, 0)
    assert not rails.aborted.wait(0.3)
    rails.close()
    assert not rails.aborted.is_set()


def test_closing_gives_up_what_is_under_way():
    rails = Rails(SOON_S)
    begin(rails, 0)
    rails.close()
    rails.close()
    assert rails.aborted.is_set()


def test_the_thread_ends_with_the_rails():
    before = set(threading.enumerate())
    rails = Rails(SOON_S)
    (thread,) = set(threading.enumerate()) - before
    del rails
    gc.collect()
    thread.join(SOON_S)
    assert not thread.is_alive()


def test_nodes_of_hosts():
    def nodes(text: str, ranks_per_node: int | None = None):
        found = find_topology(0, [{"host": host} for host in text], ranks_per_node)
        assert found.found
        return found.nodes

    assert nodes("aabb") == ((0, 1), (2, 3))
    assert nodes("aaaa") == ((0, 1, 2, 3),)
    assert nodes("aaaa", 2) == ((0, 1), (2, 3))
    assert nodes("aaab") == ((0, 1, 2, 3),), "unequal hosts are no nodes"
    assert nodes("abab") == ((0, 1, 2, 3),), "the experts of a node have to follow one another"
    assert nodes("ab") == ((0,), (1,))
    assert nodes("aaab", 8) == ((0, 1, 2, 3),), "a group smaller than a node is one"
    with pytest.raises(ConfigError):
        nodes("aaab", 3)
