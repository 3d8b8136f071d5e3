"""Dispatch, redispatch and combine: every layout, dtype and shape, bit for bit."""

import random
import time

import pytest
import torch

from support.decoding import Step, check_combined
from support.pairs import PLACES, Pair
from support.throughput import (
    Deal,
    all_options,
    check_combine,
    check_quantized,
    check_redispatch,
    check_round_trip,
    needed,
    oracle_for,
    quantized,
    routing_of,
)
from tokenferry import CapacityError, DispatchOptions, Layout, MoeShape
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

at_places = pytest.mark.parametrize(("pair", "ranks"), PLACES, ids=str)


def cases(ranks: int) -> list[Case]:
    """Every kind of routing, each with other sizes and dtypes; T differs between ranks and is 0 on some."""
    uneven = (6, 0, 9, 3, 1, 4, 0, 7)[:ranks]
    return [
        Case(uneven, 2 * ranks, 2),
        Case(uneven[::-1], 3 * ranks, 4, hidden=36, dtype=torch.float32, idx_dtype=torch.int32, routing="repeated"),
        Case(uneven, 2 * ranks, 8, hidden=2, dtype=torch.float64, routing="half_dropped", weights=False),
        Case((4,) * ranks, ranks, 1, hidden=8, dtype=torch.float16, routing="one_rank_idle"),
        Case((3,) * ranks, 2 * ranks, 3, routing="all_to_expert_0", seed=1),
        Case(uneven, 4 * ranks, 2, idx_dtype=torch.int32, routing="nothing"),
        Case((0,) * ranks, 2 * ranks, 2, dtype=torch.float32),
        Case((2, 5, 1, 0, 3, 0, 2, 1)[:ranks], 8 * ranks, 64, hidden=72, idx_dtype=torch.int32, routing="repeated"),
        Case(uneven, 2 * ranks, 3, dtype=torch.float32, routing="own_rank"),
        Case((5,) * ranks, 4 * ranks, 7, dtype=torch.float16, routing="one_token_all"),
    ]


def round_trips(rank, pg, pair: Pair, ranks: int) -> None:
    with pair.open(pg, cases(ranks)[0].shape) as group:
        for i, case in enumerate(cases(ranks)):
            # Every case meets every layout; roomy, tight and padded variants take turns.
            for options in all_options(case)[i % 3 :: 3]:
                check_round_trip(group.for_shape(case.shape), case, options)


@at_places
def test_round_trips(run, pair, ranks):
    run(pair, ranks, round_trips, ranks)


def large_then_small(rank, pg, pair: Pair) -> None:
    """Messages grow and shrink from call to call, far beyond any first buffer."""
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


def quantized_rows(rank, pg, pair: Pair, ranks: int) -> None:
    case = Case((6, 0, 9, 3, 1, 4, 0, 7)[:ranks], 2 * ranks, 3, routing="half_dropped")
    kinds = [
        # (bytes of data, its dtype, scales a row, their dtype)
        (16, torch.float8_e4m3fn, 1, torch.float32),
        (112, torch.uint8, 7, torch.int32),
        (48, torch.int8, 3, torch.uint8),
        (64, torch.float8_e5m2, 5, torch.bfloat16),
        (32, torch.int32, 0, torch.float32),
    ]
    with pair.open(pg, case.shape) as group:
        for options in (
            DispatchOptions(),
            DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True),
            DispatchOptions(Layout.MASKED),
        ):
            deal = Deal(case, options, oracle_for(case, options), rank)
            for row_bytes, dtype, num_scales, scale_dtype in kinds:
                width = row_bytes // dtype.itemsize
                rows = [
                    quantized(
                        case, there, width=width, num_scales=num_scales, scale_dtype=scale_dtype, data_dtype=dtype
                    )
                    for there in range(ranks)
                ]
                sent = group.dispatch(rows[rank], routing_of(deal.oracle.sent[rank]), options=options)
                check_quantized(deal, sent, rows)
                check_quantized(deal, group.redispatch(rows[rank], sent.plan), rows)
            check_bf16_answers(group, deal, routing_of(deal.oracle.sent[rank]), rows[rank])


def check_bf16_answers(group, deal: Deal, routing, rows) -> None:
    """FP8 rows go out, bfloat16 answers come home along the same plan."""
    sent = group.dispatch(rows, routing, options=deal.options)
    like = group.redispatch(deal.oracle.sent[deal.rank].x, sent.plan)
    check_combine(group, deal, like, torch.bfloat16, 1, True, True)


@at_places
def test_quantized_rows_and_odd_scales(run, pair, ranks):
    run(pair, ranks, quantized_rows, ranks)


def overflow(rank, pg, pair: Pair, ranks: int) -> None:
    # All tokens choose rank 0: with more than one rank, only that one overflows, and yet all must raise.
    case = Case((4,) * ranks, 2 * ranks, 3, routing="all_to_expert_0")
    roomy = 4 * ranks
    with pair.open(pg, case.shape) as group:
        mine = case.inputs()[rank]
        for layout, counts in (
            (Layout.ROWS, "device"),
            (Layout.EXPERTS, "device"),
            (Layout.MASKED, "device"),
            (Layout.MASKED, "host"),
        ):
            assert needed(case, layout) == roomy
            with pytest.raises(CapacityError, match=rf"(?s)(?=.*\b{roomy}\b)(?=.*\b{roomy - 1}\b)"):
                group.dispatch(
                    mine.x, routing_of(mine), options=DispatchOptions(layout, counts=counts, capacity=roomy - 1)
                )
            check_round_trip(group, case, DispatchOptions(layout, counts=counts, capacity=roomy))


@at_places
def test_overflow_raises_on_every_rank_and_leaves_the_group_usable(run, pair, ranks):
    run(pair, ranks, overflow, ranks)


def same_again(rank, pg, pair: Pair, ranks: int) -> list[bytes]:
    """One job, with another rank late each time; returns every bit that it saw."""
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


def many_plans(rank, pg, pair: Pair) -> None:
    """Plans outlive other calls: ten dispatches first, then their combines, last plan first."""
    steps = [Case((4, 7, 2), 6, 2, dtype=torch.float32, seed=seed) for seed in range(10)]
    with pair.open(pg, steps[0].shape) as group:
        made = []
        for case in steps:
            deal = Deal(case, DispatchOptions(Layout.EXPERTS), oracle_for(case, DispatchOptions(Layout.EXPERTS)), rank)
            mine = deal.oracle.sent[rank]
            made.append((deal, group.dispatch(mine.x, routing_of(mine), options=deal.options)))
        for deal, sent in reversed(made):
            same_bits(f"{deal} x", sent.x[deal.places], deal.oracle.x(rank))
            check_combine(group, deal, sent, None, 1, False, True)
            check_combine(group, deal, sent, None, 1, False, True)


def test_plans_and_results_outlive_later_calls(run, pair):
    run(pair, 3, many_plans)


def two_groups(rank, pg, pair: Pair) -> None:
    """Two groups on one process group, their calls interleaved, do not take each other's messages."""
    one, other = Case((5, 3), 4, 2), Case((2, 6), 8, 4, dtype=torch.float32, routing="repeated", seed=3)
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


def test_groups_on_one_process_group_do_not_mix(run, pair):
    run(pair, 2, two_groups)


def plans_in_other_views(rank, pg, pair: Pair) -> None:
    """A plan knows its own sizes: any view of its group may use it, whatever that view's E, K and M."""
    case = Case((4, 7, 2), 6, 2, dtype=torch.float32)
    with pair.open(pg, case.shape) as group:
        other = group.for_shape(MoeShape(3, 5, case.hidden, max_tokens=1))
        for options in all_options(case):
            deal = Deal(case, options, oracle_for(case, options), rank)
            mine = deal.oracle.sent[rank]
            sent = group.dispatch(mine.x, routing_of(mine), options=options)
            check_combine(other, deal, sent, None, 1, False, True)
            check_redispatch(other, deal, sent)
        step = Step(case, rank)
        sent = group.decode_dispatch(step.mine().x, step.routing())
        for fast in (False, True):
            check_combined(other, step, sent, torch.float32, fast=fast)


def test_plans_work_in_other_views_of_their_group(run, pair):
    run(pair, 3, plans_in_other_views)


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
