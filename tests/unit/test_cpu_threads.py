"""Calls at the same time on CPUs, of two threads or of one: the second one is refused, and neither is wrong."""

import signal
import threading
import time
from contextlib import suppress
from unittest import mock

import pytest
import torch

from tokenferry import ArgumentError, ClosedError, ExpertGroup, MoeShape, PeerTimeout, Routing
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.testing.world import World

X, WHERE = torch.ones(2, 8), Routing(torch.tensor([[0], [1]]), torch.ones(2, 1))


def refusal(function) -> str:
    """Return what a function raises in another thread."""
    said = []

    def run() -> None:
        with pytest.raises(ArgumentError) as caught:
            function()
        said.append(str(caught.value))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    return said[0]


@pytest.mark.parametrize("hooked", [False, True], ids=["call", "hook"])
def test_a_second_thread_is_refused(hooked):
    with ExpertGroup(None, MoeShape(2, 1, 8, 4), backend="cpu") as group:
        sent = group.dispatch(X, WHERE)
        first, other = (group.decode_dispatch(X, WHERE, return_hook=hooked) for _ in range(2))
        entered, said = Exchange.catch_up, []

        def catch_up(self, *args) -> None:
            entered(self, *args)
            if not said:
                said.append("")
                said.append(refusal(lambda: group.combine(sent.x, sent.plan)))
                said.append(refusal(other.hook) if hooked else "")

        with mock.patch.object(Exchange, "catch_up", catch_up):
            if hooked:
                first.hook()
            else:
                group.dispatch(X, WHERE)
        assert said[1].startswith("combine: another thread is in a call of this group; ")
        if hooked:
            assert said[2].startswith("decode_dispatch: another thread is in a call of this group; ")
        assert torch.equal(group.combine(sent.x, sent.plan).x, X)


@pytest.mark.parametrize("hooked", [False, True], ids=["call", "hook"])
def test_a_call_that_interrupts_another_one_is_refused(hooked):
    """As those of signal handlers and finalizers do, in the thread of the call: they broke the group."""
    with ExpertGroup(None, MoeShape(2, 1, 8, 4), backend="cpu") as group:
        sent = group.dispatch(X, WHERE)
        first, other = (group.decode_dispatch(X, WHERE, return_hook=True) for _ in range(2))
        refused, started = [], Exchange.start

        def handler(*_) -> None:
            for call in (lambda: group.combine(sent.x, sent.plan), lambda: group.decode_dispatch(X, WHERE), other.hook):
                with pytest.raises(
                    ArgumentError, match=r"a signal handler or a finalizer has interrupted a call"
                ) as what:
                    call()
                refused.append(str(what.value).partition(":")[0])

        def start(self, *args, **kwargs):
            if not hooked:
                signal.raise_signal(signal.SIGUSR1)
            return started(self, *args, **kwargs)

        def catch_up(self, *_) -> None:
            signal.raise_signal(signal.SIGUSR1)

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            name, mine = ("catch_up", catch_up) if hooked else ("start", start)
            with mock.patch.object(Exchange, name, mine):
                done = first.hook() if hooked else group.dispatch(X, WHERE)
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert refused == ["combine", "decode_dispatch", "decode_dispatch"]
        assert torch.equal(first.x[0, :1] if hooked else done.x, X[:1] if hooked else X)
        other.hook()
        assert torch.equal(group.combine(sent.x, sent.plan).x, X)


def closed_by_another_thread(rank: int, pg: object, transport: str) -> str:
    """Rank 0 closes its group while it waits for rank 1, which comes later."""
    group = ExpertGroup(pg, MoeShape(2, 1, 8, 4), backend="cpu", transport=transport, timeout_s=8)
    if rank:
        time.sleep(1.0)
        with suppress(ClosedError, PeerTimeout):  # what rank 0 has sent may be all that it needs
            group.dispatch(X, WHERE)
        return ""
    threading.Timer(0.3, group.close).start()
    with pytest.raises(ClosedError) as caught:
        group.dispatch(X, WHERE)
    return str(caught.value)


@pytest.mark.parametrize("transport", ["shared_memory", "process_group"])
def test_a_call_under_way_ends_when_its_group_is_closed(transport):
    """With an error of ours, and not with what it meets in a transport that is gone."""
    with World(2, timeout_s=60) as world:
        assert "the group was closed during the call" in world.run(closed_by_another_thread, transport)[0]
