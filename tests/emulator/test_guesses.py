"""Dispatches without M: rows move before the host knows how many, into blocks of a size that all ranks have guessed."""

import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch

from support import emulated_group
from support.emulator import Emulator
from support.guess_jobs import (
    AT_ONCE,
    CHANGES,
    COUNTED,
    LOST,
    ONCE_MORE,
    Leaving,
    change,
    check_sent,
    lose_before_the_second_try,
    nothing,
    send,
    view_of,
    watched,
)
from support.lost_ranks import complete
from tokenferry import CapacityError, ClosedError, ExpertGroup, MoeShape, PeerTimeout, RoutingError
from tokenferry.backends.cuda.context import Context
from tokenferry.backends.cuda.dispatch import Dispatcher
from tokenferry.compat.deep_ep import throughput
from tokenferry.compat.deep_ep.views import Views
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits
from tokenferry.types import DispatchOptions, Layout, Routing

pytestmark = [
    pytest.mark.skipif(bool(Emulator.missing()), reason=str(Emulator.missing())),
    pytest.mark.usefixtures("both_paths"),
]

FEW, MANY = Case((20, 0, 9), 6, 2), Case((40, 0, 60), 6, 2, routing="all_to_expert_0")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_counts_change(run, ranks):
    """Every result is right, all ranks guess alike, and rows that are too many are sent again once."""
    first, *others = run(ranks, change, ranks)
    assert all(other == first for other in others)
    if ranks == 3:
        assert [kind for kind, _ in first] == [kind for _, kind in CHANGES]


# ---------------------------------------------------------------------- what ranks need not share


def own_sms(rank, pg, pair):
    """Forms differ in num_sms, which is each rank's own affair; guesses do not."""
    with pair.open(pg, FEW.shape) as group:
        seen = watched(group)
        for num_sms in ((1, 2, None, 3), (2, 2, 2, 2), (None, 3, 1, None))[rank]:
            check_sent(group, FEW, send(group, FEW, num_sms=num_sms))
        assert seen == COUNTED + 3 * AT_ONCE


def test_other_numbers_of_sms(run):
    run(3, own_sms)


def bad_index(rank, pg, pair):
    """A bad index says nothing about rows: this rank's guess stays that of its peers."""
    with pair.open(pg, FEW.shape) as group:
        seen = watched(group)
        for _ in range(2):
            check_sent(group, FEW, send(group, FEW))
            if rank == 2:
                mine = FEW.inputs()[rank]
                mine.topk_idx[3, 1] = 6
                with pytest.raises(RoutingError, match=r"topk_idx\[3, 1\] is 6"):
                    view_of(group, FEW).dispatch(mine.x, Routing(mine.topk_idx, mine.topk_weights))
        check_sent(group, MANY, send(group, MANY))
        assert [kind for kind in seen if kind == "once_more"] == ["once_more"]


def test_a_bad_index(run):
    run(3, bad_index)


def kinds_of_their_own(rank, pg, pair):
    """A guess is for calls with the same signature: the rows of other choices may be many more."""
    one, three = Case((9, 5), 4, 1), Case((60, 70), 4, 3)
    with pair.open(pg, one.shape) as group:
        seen = watched(group)
        for case in (one, three, one, three):
            check_sent(group, case, send(group, case))
        assert seen == 2 * COUNTED + 2 * AT_ONCE


def test_other_choices_have_guesses_of_their_own(run):
    run(2, kinds_of_their_own)


# ---------------------------------------------------------------------- memory


def short_of_memory(rank, pg, pair):
    """A rank without room for what is guessed waits for the counts, with the same limit as its peers."""
    few, many = replace(FEW, hidden=512), replace(MANY, hidden=512, tokens=(60, 0, 40))
    with pair.open(pg, few.shape) as group:
        check_sent(group, few, send(group, few))
        heap, seen = group._backend.context.heap, watched(group)
        kept = [heap.block(heap.largest_free - 130_000, 0, 0)] if rank == 2 else []
        for case in (few, many, few):
            check_sent(group, case, send(group, case))
        if rank == 2:
            assert seen == [*COUNTED, *COUNTED, "once_more", *COUNTED, *COUNTED]
        else:
            assert seen == [*AT_ONCE, *ONCE_MORE, *AT_ONCE]
        kept.clear()
        seen.clear()
        check_sent(group, few, send(group, few))
        assert seen == AT_ONCE


def test_a_rank_without_room_for_the_guess(run):
    run(3, short_of_memory)


def trimmed(rank, pg, pair):
    """What a guess is too large by can be used when memory becomes short."""
    many, few = Case((400, 400), 4, 2, hidden=512, routing="all_to_expert_0"), Case((9, 5), 4, 2, hidden=512)
    with pair.open(pg, many.shape) as group:
        heap = group._backend.context.heap
        first = send(group, many)
        del first
        before, seen = heap.largest_free, watched(group)
        kept = [send(group, few) for _ in range(4)]
        assert seen == 4 * AT_ONCE
        assert before - heap.free_bytes < 4 * 400 * 1024, "four blocks for 800 rows of 1024 bytes are in use"
        for sent in kept:
            check_sent(group, few, sent)


def test_memory_is_given_back_when_it_is_short(run):
    run(2, trimmed)


def no_memory_for_the_second_try(rank, pg, pair):
    """Peers wait for the rows of a rank that has no memory for what comes: its group is broken, and they learn it."""
    with pair.open(pg, FEW.shape, timeout_s=30.0) as group:
        for _ in range(2):
            check_sent(group, FEW, send(group, FEW))
        if rank == 0:
            dispatcher = group._backend.dispatcher
            recv = dispatcher._recv

            def full(form, call, plan, counts):
                if counts is not None:
                    raise CapacityError("dispatch: the heap is full")
                return recv(form, call, plan, counts)

            with mock.patch.object(dispatcher, "_recv", full), pytest.raises(CapacityError, match="heap is full"):
                send(group, MANY)
            assert "CapacityError" in group._backend.broken
            return
        with pytest.raises(PeerTimeout, match="rank 0: it closed the group"):
            complete(group, lambda: send(group, MANY))  # a rank that knows its counts has yet to receive the rows


def test_no_memory_for_the_second_try(run):
    run(3, no_memory_for_the_second_try)


# ---------------------------------------------------------------------- faults


def lost(run, leaving):
    """Return what the ranks that stay report; the one that leaves does not end before they have."""
    reported = threading.Semaphore(0)

    def leave_and_wait(group):
        leaving.leave(group)
        for _ in range(2):
            reported.acquire(timeout=60.0)

    def job(rank, pg, pair):
        try:
            return lose_before_the_second_try(rank, pg, pair, replace(leaving, leave=leave_and_wait))
        finally:
            reported.release()

    reports = run(3, job)
    return [report for rank, report in enumerate(reports) if rank != LOST]


def note_end(group):
    group._backend.context.pinned.ended[0] |= 1 << LOST


@pytest.mark.parametrize(
    ("leaving", "why"),
    [
        (Leaving(ExpertGroup.close), "it closed the group"),
        (Leaving(nothing, note_end), "its process ended"),
        (Leaving(nothing, timeout_s=4.0), "its handshake did not come"),
    ],
    ids=["closed", "ended", "late"],
)
def test_a_rank_is_lost_before_the_second_try(run, leaving, why):
    """The others miss it as in any other call; the two whose deadline is far do not wait for it."""
    reports = lost(run, leaving)
    assert all(f"rank {LOST}" in report for report in reports)
    assert any(why in report for report in reports)


def interrupted(rank, pg, pair, monkeypatch, tokens, where):
    """A rank that does not know whether it has to send again, or does not send, must not go on: its peers may."""
    alone = Case((20,), 2, 2)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with pair.open(pg, alone.shape) as group:
        for _ in range(2):
            send(group, alone)
        with monkeypatch.context() as patch:
            patch.setattr(*where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                send(group, replace(alone, tokens=(tokens,)))
        with pytest.raises(ClosedError, match="broken by an earlier KeyboardInterrupt"):
            send(group, alone)


@pytest.mark.parametrize(("tokens", "where"), [(20, (Context, "wait_for_counts")), (90, (Dispatcher, "_launch_plan"))])
def test_an_interrupt_while_counts_are_awaited_or_before_the_second_try(run, monkeypatch, tokens, where):
    run(1, interrupted, monkeypatch, tokens, where)


# ---------------------------------------------------------------------- the DeepEP API


def through_the_shim(rank, pg, pair):
    """Calls of `Buffer.dispatch`, with experts and without, are such dispatches."""
    with pair.open(pg, MoeShape(6, 2, 16, 4)) as group:
        views, seen = Views(group), watched(group)
        for case, expected in ((FEW, COUNTED), (FEW, AT_ONCE), (MANY, ONCE_MORE), (FEW, AT_ONCE)):
            mine = case.inputs()[rank]
            layout = throughput.layout_of(views, mine.topk_idx, 6, "layout")
            seen.clear()
            routing = Routing(mine.topk_idx, mine.topk_weights)
            x, ids, weights, counts, handle = throughput.dispatch(views, mine.x, routing, layout, throughput.Options())
            assert seen == expected
            want = group.for_shape(MoeShape(6, 2, 16, 100)).dispatch(mine.x, routing)
            same_bits("x", x, want.x)
            same_bits("ids", ids, want.topk_idx)
            same_bits("weights", weights, want.topk_weights)
            assert counts == list(want.host_counts)
            seen.clear()
            alone = throughput.dispatch(views, mine.x, None, layout, throughput.Options())
            assert seen[: len(expected)] == expected
            same_bits("x without experts", alone[0], want.x)
            assert alone[3] == counts
            home, _ = throughput.combine(views, x, handle, None, None, None)
            same_bits("home", home, group.combine(want.x, want.plan).x)


def test_through_the_shim(run):
    run(3, through_the_shim)


# ---------------------------------------------------------------------- rows for which no heap has room


def for_no_heap(rank, pg, pair, make_view):
    """All choices go to one rank, which has more rows than its heap can hold: all ranks refuse the call alike."""
    tokens, hidden = 300, 16384
    with pair.open(pg, MoeShape(8, 4, hidden, 16)) as group:
        view, options = make_view(group)
        x = torch.ones(tokens, hidden)
        for _ in range(2):
            with pytest.raises(
                CapacityError, match=r"rank 1 received \d+ rows, and its heap has room for \d+"
            ) as caught:
                view.dispatch(x, Routing(torch.tensor([[4, 5, 6, 7]]).repeat(tokens, 1)), options=options)
            assert "times as large with TOKENFERRY_HEAP_MB" in str(caught.value)
            sent = view.dispatch(x[:2], Routing(torch.tensor([[0, 1, 2, 7]] * 2)), options=options)
            home = view.combine(sent.x, sent.plan).x
            group.synchronize()
            assert home[:, 0].tolist() == [2.0 if options.layout is Layout.ROWS else 4.0] * 2
        return str(caught.value)


VIEWS = {
    "experts": lambda group: (group.for_shape(MoeShape(8, 4, 16384, 300)), DispatchOptions(Layout.EXPERTS)),
    "no M": lambda group: (group.for_shape(MoeShape(8, 4, 16384, throughput.ANY_NUM_TOKENS)), DispatchOptions()),
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_for_which_no_heap_has_room(run, monkeypatch, name):
    """Rows of 64 KiB."""
    monkeypatch.setattr(emulated_group, "HEAP_BYTES", 32 << 20)
    first, second = run(2, for_no_heap, VIEWS[name])
    assert first == second
