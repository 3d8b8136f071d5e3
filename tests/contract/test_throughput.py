"""Dispatch, redispatch and combine: every layout, dtype and shape, bit for bit."""

import random
import time

import pytest
import torch

from support.guess_jobs import change
from support.pairs import NODES, PAIRS, PLACES, Pair
from support.throughput import (
    Deal,
    all_options,
    check_combine,
    check_round_trip,
    oracle_for,
    routing_of,
)
from support.throughput_jobs import (
    many_plans,
    overflow,
    plans_in_other_views,
    quantized_rows,
    round_trips,
    rows_that_begin_anywhere,
)
from tokenferry import DispatchOptions, Layout
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

at_places = pytest.mark.parametrize(("pair", "ranks"), PLACES, ids=str)


@at_places
def test_round_trips(run, pair, ranks):
    run(pair, ranks, round_trips, ranks)


def large_then_small(rank, pg, pair: Pair) -> None:
    """Send messages that grow and shrink from call to call, far beyond any first buffer."""
    tokens = ((3, 1), (400, 250), (1, 0), (700, 900), (2, 2), (40, 400))
    steps = [Case(t, 4, 2, hidden=640, dtype=torch.float32, seed=i) for i, t in enumerate(tokens)]
    with pair.open(pg, steps[0].shape) as group:
        for case in steps:
            deal = Deal(case, DispatchOptions(), oracle_for(case, DispatchOptions()), rank)
            mine = deal.oracle.sent[rank]
            sent = group.for_shape(case.shape).dispatch(mine.x, routing_of(mine))
            same_bits(f"{deal} x", sent.x, deal.oracle.x(rank))
            check_combine(group.for_shape(case.shape), deal, sent, None, 0, False, False)


def test_messages_grow_and_shrink(run, pair):
    run(pair, 2, large_then_small)


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_without_a_most_of_tokens_grow_and_shrink(run, pair, ranks):
    """On CUDA they are guessed, by all ranks alike."""
    first, *others = run(pair, ranks, change, ranks)
    assert all(other == first for other in others)


@at_places
def test_quantized_rows_and_odd_scales(run, pair, ranks):
    run(pair, ranks, quantized_rows, ranks)


@at_places
def test_overflow_raises_on_every_rank_and_leaves_the_group_usable(run, pair, ranks):
    run(pair, ranks, overflow, ranks)


def same_again(rank, pg, pair: Pair, ranks: int) -> list[bytes]:
    """Make the same calls with another rank late each time, and return all bytes of their results."""
    pick = random.Random(0)
    case = Case((6, 2, 9, 3)[:ranks], 2 * ranks, 3, dtype=torch.float32, routing="repeated")
    seen = []
    with pair.open(pg, case.shape) as group:
        for late in (None, *range(ranks)):
            bits = b""
            for options in all_options(case):
                deal = Deal(case, options, oracle_for(case, options), rank)
                mine = deal.oracle.sent[rank]
                if rank == late:
                    time.sleep(pick.random() * 0.01)
                sent = group.dispatch(mine.x, routing_of(mine), options=options)
                if rank == late:
                    time.sleep(pick.random() * 0.01)
                out = check_combine(group, deal, sent, torch.bfloat16, 2, False, True)
                for part in (sent.x.reshape(-1, case.hidden)[deal.places], out.x.float(), out.topk_weights):
                    bits += bytes(part.contiguous().view(torch.uint8).flatten().tolist())
            seen.append(bits)
    return seen


def test_a_late_rank_changes_no_bit(run, pair):
    for seen in run(pair, 3, same_again, 3):
        assert len(set(seen)) == 1


def test_plans_and_results_outlive_later_calls(run, pair):
    run(pair, 3, many_plans)


def two_groups(rank, pg, pair: Pair, ranks: int) -> None:
    """Interleave the calls of two groups on one process group."""
    one = Case((5, 3, 0, 2)[:ranks], 2 * ranks, 2)
    other = Case((2, 6, 1, 4)[:ranks], 4 * ranks, 4, dtype=torch.float32, routing="repeated", seed=3)
    with pair.open(pg, one.shape) as a, pair.open(pg, other.shape) as b:
        for options in (DispatchOptions(), DispatchOptions(Layout.EXPERTS)):
            deals = [Deal(case, options, oracle_for(case, options), rank) for case in (one, other)]
            mine = [deal.oracle.sent[rank] for deal in deals]
            sent_a = a.dispatch(mine[0].x, routing_of(mine[0]), options=options)
            sent_b = b.dispatch(mine[1].x, routing_of(mine[1]), options=options)
            check_combine(b, deals[1], sent_b, None, 0, False, False)
            check_combine(a, deals[0], sent_a, None, 0, False, False)
    with pair.open(pg, one.shape) as again:
        check_round_trip(again, one, DispatchOptions())


@pytest.mark.parametrize(("pair", "ranks"), [*((pair, 2) for pair in PAIRS), NODES[0]], ids=str)
def test_groups_on_one_process_group_do_not_mix(run, pair, ranks):
    run(pair, ranks, two_groups, ranks)


def test_plans_work_in_other_views_of_their_group(run, pair):
    run(pair, 3, plans_in_other_views)


def test_rows_may_begin_anywhere(run, pair):
    run(pair, 2, rows_that_begin_anywhere)


def what_a_group_is(rank, pg, pair: Pair, ranks: int) -> None:
    case = Case((2,) * ranks, 3 * ranks, 2)
    with pair.open(pg, case.shape) as group:
        assert (group.rank, group.num_ranks, group.num_local_experts) == (rank, ranks, 3)
        assert group.device == pair.device
        assert group.shape == case.shape
        assert group.masked_ranks == frozenset()
        assert f"rank {rank} of {ranks}" in repr(group)
        other = group.for_shape(Case((2,) * ranks, 5 * ranks, 1, hidden=64).shape)
        assert (other.num_local_experts, other.shape.hidden, other.rank) == (5, 64, rank)
        mine = case.inputs()[rank]
        sent = group.dispatch(mine.x, routing_of(mine))
        copy = mine.x.clone()
        same_bits("rows of the caller", mine.x, copy)
    assert sent.x.sum() is not None, "results outlive their group"
    assert "closed" in repr(group)


@at_places
def test_what_a_group_says_about_itself(run, pair, ranks):
    run(pair, ranks, what_a_group_is, ranks)
