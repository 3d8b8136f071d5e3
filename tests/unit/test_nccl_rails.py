"""The host's half of rails over NCCL: deadlines, and what is kept; the exchanges themselves are stand-ins."""

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tokenferry.backends.cuda.across.backend import AcrossBackend
from tokenferry.backends.cuda.across.nccl import NcclError
from tokenferry.backends.cuda.across.nccl_channel import Marks, NcclChannel, connect
from tokenferry.backends.cuda.across.nccl_rails import NcclRails
from tokenferry.backends.cuda.context import Call
from tokenferry.backends.cuda.setup import find_topology
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import BackendUnavailable, ConfigError, MismatchError, PeerTimeout
from tokenferry.topology import Topology, consecutive
from tokenferry.transports.failures import FailureReport

CALL = Call(7, 0, False, 1, Signature("combine"), 0)
TOPOLOGY = Topology(2, consecutive(6, 2))
"""Rank 2 is on node 1, and its rail is 0, 2, 4."""
SOON_S = 10.0
SOON = "tokenferry.backends.cuda.across.nccl_rails"


class Exchange:
    """An exchange that ends when it is told to.

    Attributes:
        done: Whether it has ended.
        joined: How often streams were told to wait for it.
        looks: How often was asked whether it has ended.
    """

    def __init__(self, *, done: bool = False) -> None:
        self.done = threading.Event()
        if done:
            self.done.set()
        self.joined = self.looks = 0

    def has_ended(self) -> bool:
        self.looks += 1
        return self.done.is_set()

    def join(self) -> None:
        self.joined += 1


class StandIn:
    """A channel whose exchanges are stand-ins.

    Attributes:
        exchanges: Those begun.
        failure: What is said to have gone wrong.
        reached: Whether the stream has reached what is begun.
        captured: Whether a graph captures it.
        at_once: Whether exchanges end at once.
        aborted: Whether all was aborted.
        closed: How often it was closed.
    """

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.failure = ""
        self.reached = threading.Event()
        self.reached.set()
        self.captured = self.at_once = False
        self.aborted = threading.Event()
        self.closed = 0

    def start(self, parts, stream, *, captured) -> Marks:
        if self.failure == "at once":
            raise NcclError("ncclSend: remote error")
        self.exchanges.append(exchange := Exchange(done=self.at_once))
        return Marks(self.reached.is_set, exchange.has_ended, exchange.join, self.captured)

    aside = nullcontext

    def error(self) -> str:
        return self.failure

    def abort(self) -> None:
        self.aborted.set()
        for exchange in self.exchanges:  # as aborted kernels end
            exchange.done.set()

    def close(self) -> None:
        self.closed += 1


def make(timeout_s: float, **options) -> tuple[NcclRails, StandIn]:
    channel = StandIn()
    return NcclRails(channel, TOPOLOGY, timeout_s, **options), channel


def begin(rails: NcclRails, *nodes: int, compare: Callable[[], object] | None = None):
    kept = [torch.zeros(2, 3) for _ in nodes]
    parts = [(two[i].data_ptr(), 12, node, i == 1) for i in range(2) for node, two in zip(nodes, kept, strict=True)]
    return rails.exchange(CALL, parts, kept, compare)


def wait_until(what: Callable[[], bool]) -> None:
    """Wait for something that the thread of the rails does."""
    deadline = time.monotonic() + SOON_S
    while not what():
        assert time.monotonic() < deadline, "the thread does not do it"
        time.sleep(0.005)


def test_an_exchange_is_waited_for():
    rails, channel = make(SOON_S)
    transfer = begin(rails, 0, 2)
    threading.Timer(0.05, channel.exchanges[0].done.set).start()
    transfer.wait()
    assert channel.exchanges[0].joined == 1, "the stream does not wait"
    transfer.join()
    assert channel.exchanges[0].joined == 2
    rails.close()
    assert not channel.aborted.is_set()
    assert channel.closed == 1


def test_a_late_exchange_is_given_up_by_the_host_that_waits():
    reports = mock.Mock()
    rails, channel = make(0.1, reports=reports)
    channel.at_once = True
    begin(rails, 0).wait()
    channel.at_once = False
    transfer = begin(rails, 2)
    with pytest.raises(PeerTimeout, match=r"^combine \(between nodes\) #7: rank 2 waited .* for rank 4: ") as caught:
        transfer.wait()
    assert (caught.value.peers, caught.value.nodes) == ((4,), (2,))
    assert channel.aborted.wait(SOON_S)
    reports.post.assert_called_once_with(FailureReport((4,), call=7))
    with pytest.raises(PeerTimeout):
        rails.raise_lost()


def test_a_late_exchange_is_given_up_while_nobody_waits():
    rails, channel = make(0.1)
    transfer = begin(rails, 0, 2)
    transfer.join()
    rails.raise_lost()
    assert channel.aborted.wait(SOON_S)
    with pytest.raises(PeerTimeout) as caught:
        rails.raise_lost()
    assert caught.value.peers == (0, 4)
    with pytest.raises(PeerTimeout):
        transfer.wait()


def test_exchanges_of_different_calls_end_soon():
    """NCCL does not compare sizes, so they may never end."""
    mismatched = threading.Event()
    rails, channel = make(SOON_S * 10)
    rails.end_soon_if(mismatched.is_set)
    with mock.patch("tokenferry.backends.cuda.across.nccl_rails._HOPELESS_S", 0.2):
        begin(rails, 0)
        assert not channel.aborted.wait(0.4)
        mismatched.set()
        assert channel.aborted.wait(SOON_S)


def compared(*answers: MismatchError | None) -> mock.Mock:
    """Return what compares calls, and has these answers, the last one for good."""
    rest = iter(answers)
    return mock.Mock(side_effect=lambda: next(rest, answers[-1]))


def differ(what: str) -> MismatchError:
    return MismatchError(f"different calls: {what}")


@pytest.mark.parametrize("captured", [False, True])
def test_calls_are_compared_while_their_exchange_lasts(captured):
    """It may never end; but not if it is short, or the device is not there."""
    reports = mock.Mock()
    reports.have_come.return_value = False
    entered: list[str] = []
    rails, channel = make(
        SOON_S * 10, reports=reports, enter_thread=lambda: entered.append(threading.current_thread().name)
    )
    compare = compared(differ("kind"))
    with mock.patch.multiple(SOON, _HOPELESS_S=0.3, _COMPARE_S=0.1, _REPLAYS_S=0.01):
        channel.at_once = True
        begin(rails, 0, compare=compare)
        channel.at_once, channel.captured = False, captured
        channel.reached.clear()
        begin(rails, 0, compare=compare)
        assert not channel.aborted.wait(0.3)
        assert not compare.called
        channel.reached.set()
        assert channel.aborted.wait(SOON_S)
    assert str(rails.mismatch) == "different calls: kind"
    assert entered == ["tokenferry-rails", "tokenferry-compare"], "a CUDA graph may be captured meanwhile"
    with pytest.raises(PeerTimeout, match="for rank 0: an exchange between nodes did not end"):
        rails.raise_lost()
    (report,) = reports.post.call_args.args
    assert report == FailureReport.of(rails.mismatch)
    rails.close()


@pytest.mark.parametrize(
    "answers", [(None,), (differ("what has not come all"), None), (differ("one"), differ("other"))]
)
def test_calls_that_are_only_late(answers):
    """What they say has not come, or was on its way when it was read."""
    rails, channel = make(SOON_S * 10)
    compare = compared(*answers, None)
    with mock.patch.multiple(SOON, _HOPELESS_S=0.1, _COMPARE_S=0.05, _POLL_S=0.005):
        begin(rails, 0, compare=compare)
        wait_until(lambda: compare.call_count > 4)  # they are compared again
        assert not channel.aborted.is_set()
        assert rails.mismatch is None
        channel.exchanges[0].done.set()
    rails.close()


def test_what_was_read_when_an_exchange_had_ended_says_nothing():
    """Its memory may belong to another call."""
    rails, channel = make(SOON_S * 10)

    def compare() -> MismatchError:
        channel.exchanges[0].done.set()
        return differ("kind")

    with mock.patch.multiple(SOON, _HOPELESS_S=0.1, _COMPARE_S=0.05):
        begin(rails, 0, compare=compare)
        wait_until(channel.exchanges[0].done.is_set)
        assert not channel.aborted.wait(0.3)
    assert rails.mismatch is None
    rails.close()


def test_closing_waits_for_what_is_read():
    """The memory that is read goes with the group; and a comparison that hangs keeps no exchange from its deadline."""
    rails, channel = make(0.2)
    begun, go_on = threading.Event(), threading.Event()

    def compare() -> None:
        begun.set()
        assert go_on.wait(SOON_S)
        assert not channel.closed

    with mock.patch(f"{SOON}._COMPARE_S", 0.05):
        begin(rails, 0, compare=compare)
        assert begun.wait(SOON_S)
        assert channel.aborted.wait(SOON_S)
    closing = threading.Thread(target=rails.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    go_on.set()
    closing.join(SOON_S)
    assert channel.closed == 1


@pytest.mark.parametrize("answer", [True, False, None])
def test_an_exchange_ends_soon_after_another_rank_has_reported(answer):
    """It may be cut off by the end of a process, which only the ranks of its node notice."""
    reports = mock.Mock()
    reports.have_come.return_value = False
    rails, channel = make(SOON_S * 10, reports=reports)
    with mock.patch(f"{SOON}._HOPELESS_S", 0.1), mock.patch(f"{SOON}._ASK_S", 0.1):
        begin(rails, 0)
        wait_until(lambda: reports.have_come.call_count >= 3)
        assert not channel.aborted.is_set(), "a long exchange is no fault"
        answers: list[bool | None] = []

        def reply() -> bool | None:
            answers.append(answer)
            return answer

        reports.have_come.side_effect = reply
        wait_until(lambda: len(answers) >= (3 if answer is False else 1))
        assert channel.aborted.wait(SOON_S if answer else 0.6) is bool(answer)
        assert (len(answers) == 1) is (answer is not False), "asked again without need"
    if answer:
        with pytest.raises(PeerTimeout, match=r"rank 2 waited .* for rank 0: ") as caught:
            rails.raise_lost()
        assert caught.value.nodes == (0,)
    rails.close()


@pytest.mark.parametrize("failure", ["remote error", "at once"])
def test_a_failed_exchange_is_given_up_at_once(failure):
    reports = mock.Mock()
    rails, channel = make(SOON_S * 10, reports=reports)
    if failure == "at once":
        channel.failure = failure
        with pytest.raises(
            PeerTimeout, match=r"for rank 4: the connection between nodes failed.*: ncclSend: remote error"
        ):
            begin(rails, 2)
    else:
        transfer = begin(rails, 2)
        threading.Timer(0.1, setattr, (channel, "failure", failure)).start()
        with pytest.raises(PeerTimeout, match=r"for rank 4: the connection between nodes failed.*: remote error"):
            transfer.wait()
    assert channel.aborted.wait(SOON_S)  # the thread reports and aborts after it has said who is lost
    reports.post.assert_called_once_with(FailureReport((4,), call=7))
    with pytest.raises(PeerTimeout):
        rails.raise_lost()


def test_the_host_gives_up_by_itself_if_the_thread_has_ended():
    with mock.patch(f"{SOON}.threading.Thread"):
        rails, channel = make(0.05)
    transfer = begin(rails, 0)
    with pytest.raises(PeerTimeout, match="did not end"):
        transfer.wait()
    assert channel.aborted.is_set()


class BrokenExchange(Exchange):
    """An exchange about which CUDA says nothing any more."""

    def has_ended(self) -> bool:
        raise BackendUnavailable("asking about an event failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)")


def test_after_an_error_of_cuda_the_thread_ends_all():
    """Calls meet it as well, but perhaps none is made, and the rail peers of this rank wait."""
    reports = mock.Mock()
    with mock.patch(f"{__name__}.Exchange", BrokenExchange):
        rails, channel = make(SOON_S * 10, reports=reports)
        begin(rails, 0)
        assert channel.aborted.wait(SOON_S)
    reports.post.assert_called_once()
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in reports.post.call_args.args[0].left, "this rank is at fault"
    with pytest.raises(PeerTimeout, match="did not end: asking about an event failed"):
        rails.raise_lost()
    assert channel.closed == 0, "who begins an exchange now finds streams that were destroyed"
    rails.finish()
    rails.close()
    assert channel.closed == 1


def test_rails_are_closed_after_an_error_of_cuda():
    with mock.patch(f"{__name__}.Exchange", BrokenExchange), mock.patch(f"{SOON}.threading.Thread"):
        rails, channel = make(SOON_S)
        begin(rails, 0)
    rails.finish()
    rails.close()
    assert (rails.closed, channel.aborted.is_set()) == (True, True)


@pytest.mark.parametrize("broken", ["finish", "close"])
def test_a_group_is_closed_whatever_becomes_of_its_rails(broken):
    rails = mock.Mock(**{f"{broken}.side_effect": KeyboardInterrupt})
    backend = object.__new__(AcrossBackend)
    backend.context, backend.decoder, backend._rails = mock.Mock(broken=None), mock.Mock(), rails
    with pytest.raises(KeyboardInterrupt):
        backend.close()
    rails.close.assert_called_once_with()
    backend.context.close.assert_called_once_with("was closed")


def test_finishing_waits_for_what_peers_need():
    rails, channel = make(SOON_S)
    begin(rails, 0)
    threading.Timer(0.1, channel.exchanges[0].done.set).start()
    rails.finish()
    assert channel.exchanges[0].done.is_set()
    rails.close()
    assert not channel.aborted.is_set()


def test_finishing_gives_up_at_the_deadline():
    rails, channel = make(0.1)
    begin(rails, 0)
    rails.finish()
    assert channel.aborted.wait(SOON_S)
    with pytest.raises(PeerTimeout):
        rails.raise_lost()


def test_a_short_exchange_asks_nobody():
    reports = mock.Mock()
    rails, channel = make(SOON_S, reports=reports)
    for node in (0, 2):
        transfer = begin(rails, node)
        channel.exchanges[-1].done.set()
        transfer.wait()
    rails.close()
    reports.have_come.assert_not_called()


def test_the_deadline_counts_from_when_the_stream_is_there():
    """Work before an exchange may take any time."""
    rails, channel = make(0.1)
    channel.reached.clear()
    begin(rails, 0)
    assert not channel.aborted.wait(0.4)
    channel.reached.set()
    assert channel.aborted.wait(SOON_S)


def test_a_graph_that_is_not_replayed_is_no_exchange():
    rails, channel = make(0.05)
    channel.captured = True
    channel.reached.clear()
    begin(rails, 0)
    assert not channel.aborted.wait(0.3)
    rails.close()
    assert not channel.aborted.is_set()


@pytest.mark.parametrize("behind", [False, True])
def test_a_replay_that_is_stuck_is_given_up(behind):
    """Also if an eager exchange waits behind it."""
    rails, channel = make(0.3)
    channel.captured = True
    channel.reached.clear()
    transfer = begin(rails, 2)
    transfer.join()
    channel.captured = False
    with mock.patch(f"{SOON}._REPLAYS_S", 0.05):
        assert not channel.aborted.wait(0.6), "no replay has begun"
        channel.reached.set()  # a replay
        if behind:
            channel.reached = threading.Event()
            begin(rails, 0)
        assert channel.aborted.wait(SOON_S)
    with pytest.raises(PeerTimeout, match="for rank 4: an exchange between nodes did not end"):
        rails.raise_lost()


def test_replays_that_end_are_left_alone():
    clock = SimpleNamespace(now=1.0, monotonic=lambda: clock.now, sleep=time.sleep)
    rails, channel = make(0.3)
    channel.captured = True
    with mock.patch(f"{SOON}.time", clock), mock.patch(f"{SOON}._REPLAYS_S", 0.05):
        begin(rails, 2)
        (exchange,) = channel.exchanges

        def look_later() -> None:
            looks = exchange.looks
            clock.now += 0.1
            rails._more.set()
            wait_until(lambda: exchange.looks > looks)

        for _ in range(4):  # longer than the deadline, all together
            look_later()
            look_later()
            exchange.done.set()
            look_later()
            exchange.done.clear()
        exchange.done.set()
        assert not channel.aborted.is_set()
    rails.close()


def test_a_look_asks_few_of_many_exchanges_in_graphs():
    """Graphs that are gone leave theirs behind. One that has begun is asked in every look, or replays are mixed up."""
    with mock.patch(f"{SOON}.threading.Thread"):  # the looks are those below
        rails, channel = make(SOON_S)
    channel.captured = channel.at_once = True
    for _ in range(10):
        begin(rails, 2)
    last, at = channel.exchanges[9], itertools.count(1)
    asked, found = [], []

    def look() -> None:
        before = [exchange.looks for exchange in channel.exchanges]
        found.append(rails._first(float(next(at))))
        asked.append([i for i, exchange in enumerate(channel.exchanges) if exchange.looks > before[i]])

    with mock.patch(f"{SOON}._MOST_ASKED", 4):
        for _ in range(4):
            look()
        assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3]]
        last.done.clear()  # a replay is there
        for _ in range(4):
            look()
        assert asked[4:] == [[4, 5, 6, 7], [8, 9], [0, 1, 2, 3, 9], [9]]
        assert found == [None] * 6 + [rails._in_graphs[9]] * 2
        assert found[-1].since == 6.0, "when it was seen first"
        last.done.set()
        look()
        assert asked[-1] == [4, 5, 6, 7, 9]
        assert found[-1] is None
    rails.close()


def test_closing_gives_up_what_is_under_way():
    rails, channel = make(SOON_S)
    begin(rails, 0)
    rails.close()
    rails.close()
    assert channel.aborted.is_set()


def test_the_thread_ends_with_the_rails():
    before = set(threading.enumerate())
    rails, channel = make(SOON_S)
    (thread,) = set(threading.enumerate()) - before
    del rails
    gc.collect()
    thread.join(SOON_S)
    assert not thread.is_alive()
    assert channel.closed == 1, "connections stay open"


def test_exchanges_under_way_keep_the_rails_and_their_memory():
    """A group that is dropped in the middle of one has its deadline all the same."""
    rails, channel = make(0.3)
    transfer = begin(rails, 0)
    kept, alive = weakref.ref(transfer.kept[0]), weakref.ref(rails)
    del rails, transfer
    gc.collect()
    assert kept() is not None, "NCCL writes to memory that is torch's again"
    assert channel.aborted.wait(SOON_S), "nobody ends it"
    wait_until(lambda: channel.closed == 1)
    gc.collect()
    assert (kept(), alive()) == (None, None)


def test_memory_is_kept_until_all_exchanges_have_been_ended():
    """The thread looks at them while a rank that waits for one gives up."""
    rails, channel = make(SOON_S)
    transfer = begin(rails, 0)
    kept, what, alive = weakref.ref(transfer.kept[0]), transfer.what, []
    del transfer

    def abort() -> None:
        rails.check()
        alive.append(kept() is not None)
        StandIn.abort(channel)

    rails._channel = mock.Mock(wraps=channel, abort=abort)
    rails.give_up(what, 1.0, "late")
    assert alive == [True], "NCCL still writes to it"
    assert kept() is None
    begin(rails, 0)  # as one that began meanwhile
    rails.check()
    assert not rails._under_way
    rails.close()


def test_rails_may_be_closed_by_their_own_thread():
    """Where the collector may run, and with it the finalizer of what has a group."""
    rails, channel = make(SOON_S)
    thread, failed = rails._thread, mock.Mock()

    def close() -> str:
        try:
            rails.close()
        except RuntimeError as error:
            failed(error)
        return ""

    channel.error = close
    begin(rails, 0)
    thread.join(SOON_S)
    assert not thread.is_alive()
    failed.assert_not_called()
    assert channel.closed == 1


@pytest.mark.parametrize("raised_by", [lambda rails: begin(rails, 0), NcclRails.raise_lost], ids=["first", "again"])
def test_what_a_lost_connection_raises_keeps_no_frames(raised_by):
    """They hold the tensors of a call, which a program may need for the next group, while it still has this one."""
    rails, channel = make(SOON_S)
    channel.failure = "at once"
    with suppress(PeerTimeout):
        begin(rails, 0)

    def call() -> weakref.ref[torch.Tensor]:
        memory = torch.zeros(3)
        with pytest.raises(PeerTimeout):
            raised_by(rails)
        return weakref.ref(memory)

    gone = call()
    gc.collect()
    assert gone() is None
    rails.close()


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


class Greeter:
    """A channel whose ranks may never come."""

    def __init__(self, come: threading.Event) -> None:
        self.come, self.aborted, self.closed = come, threading.Event(), threading.Event()
        self.greeted = self.greeting = False

    def greet(self) -> None:
        self.greeted = self.greeting = True
        assert self.come.wait(20)
        self.greeting = False
        if self.aborted.is_set():
            raise NcclError("aborted")

    def abort(self) -> None:
        self.aborted.set()
        self.come.set()

    def close(self) -> None:
        assert self.aborted.is_set(), "it would wait for ranks that do not come"
        assert not self.greeting, "its streams are in use"
        self.closed.set()


def test_connecting_has_a_deadline():
    come = threading.Event()
    channel = Greeter(come)
    with pytest.raises(NcclError, match="did not end within"):
        connect(lambda: channel, 0.05)
    assert channel.aborted.is_set(), "the thread waits for ever"
    assert channel.closed.wait(20), "its streams are left behind"


def test_what_connects_too_late_is_given_up():
    come = threading.Event()
    channel = Greeter(threading.Event())

    def make() -> Greeter:
        assert come.wait(20)
        return channel

    with pytest.raises(NcclError, match="did not end within"):
        connect(make, 0.05)
    assert not channel.aborted.is_set()
    come.set()
    assert channel.closed.wait(20), "the other ranks would wait for this one in the first call"
    assert not channel.greeted, "it would wait for ranks that have gone"


def test_a_failure_to_connect_is_raised():
    channel = Greeter(threading.Event())
    channel.aborted.set()
    channel.come.set()
    with pytest.raises(NcclError, match="aborted"):
        connect(lambda: channel, 20.0)
    assert channel.closed.is_set(), "its streams are left behind"
    channel = Greeter(threading.Event())
    channel.come.set()
    assert connect(lambda: channel, 20.0) is channel
    assert not channel.aborted.is_set()


def channel_of(streams: mock.Mock) -> tuple[NcclChannel, mock.Mock]:
    communicator = mock.Mock()
    with mock.patch.object(torch.cuda, "ExternalStream"):
        return NcclChannel(communicator, torch.device("cuda", 0), streams), communicator


def test_a_channel_destroys_its_streams_once():
    streams = mock.Mock(**{"new.side_effect": [7, 8], "destroy.side_effect": BackendUnavailable("CUDA: 700")})
    channel, _ = channel_of(streams)
    channel.close()
    channel.close()
    assert streams.destroy.mock_calls == [mock.call(7), mock.call(8)], "also if the context is broken"


def test_a_channel_without_streams_is_given_up():
    communicator = mock.Mock()
    streams = mock.Mock(**{"new.side_effect": [7, BackendUnavailable("CUDA: out of memory")]})
    with pytest.raises(BackendUnavailable, match="out of memory"):
        NcclChannel(communicator, torch.device("cuda", 0), streams)
    communicator.abort.assert_called_once_with()
    streams.destroy.assert_called_once_with(7)
