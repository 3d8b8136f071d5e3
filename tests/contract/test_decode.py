"""decode_dispatch and decode_combine: casts, hooks, counters, numerics, masks."""

import random
import time
from dataclasses import replace

import pytest
import torch

from support.decoding import CASTS, Step, check_combined, check_encoding, check_received
from support.pairs import PAIRS, PLACES, Pair
from support.throughput import check_round_trip
from tokenferry import ArgumentError, DecodeStats, DispatchOptions, ExpertGroup, MismatchError, MoeShape, Routing, Scale
from tokenferry.backends.cpu.exchange import Exchange
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import close, same_bits

at_places = pytest.mark.parametrize(("pair", "ranks"), PLACES, ids=str)


def cases(ranks: int) -> list[Case]:
    uneven = (3, 0, 5, 2, 1, 4, 0, 2)[:ranks]
    return [
        Case(uneven, 2 * ranks, 2, hidden=128),
        Case(uneven[::-1], 3 * ranks, 4, hidden=640, idx_dtype=torch.int32, routing="repeated", dtype=torch.float32),
        Case((2,) * ranks, ranks, 1, hidden=1024, dtype=torch.float16, routing="one_rank_idle"),
        Case(uneven, 2 * ranks, 11, hidden=80, routing="half_dropped"),
        Case((0,) * ranks, 2 * ranks, 3, hidden=64),
        Case((4,) * ranks, 2 * ranks, 3, hidden=16, dtype=torch.float32, routing="all_to_expert_0"),
        Case(uneven, 4 * ranks, 2, hidden=48, routing="nothing"),
        Case((2, 1, 3, 0, 1, 0, 3, 2)[:ranks], 4 * ranks, 32, hidden=32, dtype=torch.float32, routing="repeated"),
    ]


def rounds(rank, pg, pair: Pair, ranks: int) -> None:
    answer_dtypes = (torch.bfloat16, torch.float16, torch.float32)
    with pair.open(pg, cases(ranks)[0].shape) as group:
        for case in cases(ranks):
            view, step = group.for_shape(case.shape), Step(case, rank)
            for i, fp8 in enumerate(CASTS):
                hook = i % 2 == 1
                sent = view.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=hook)
                if hook:
                    sent.hook()
                check_received(step, sent, fp8)
                sent.hook()  # again, or without return_hook: to no effect
                check_received(step, sent, fp8)
            for dtype in answer_dtypes:
                for fast in (False, True):
                    check_combined(view, step, sent, dtype, fast=fast, into=fast, hook=dtype == torch.float16)


@at_places
def test_rounds(run, pair, ranks):
    run(pair, ranks, rounds, ranks)


def encoding_cases(ranks: int) -> list[Case]:
    uneven = (3, 0, 5, 2, 1, 4, 0, 2)[:ranks]
    return [
        Case(uneven, 2 * ranks, 3, hidden=384),
        Case(uneven[::-1], 3 * ranks, 4, hidden=640, routing="repeated", dtype=torch.float32),
        Case((4,) * ranks, 2 * ranks, 5, hidden=128, routing="half_dropped"),
        Case((0,) * ranks, 2 * ranks, 3, hidden=256),
        Case(uneven, 4 * ranks, 2, hidden=128, routing="nothing"),
    ]


def encodings(rank, pg, pair: Pair, ranks: int) -> None:
    with pair.open(pg, encoding_cases(ranks)[0].shape) as group:
        for case in encoding_cases(ranks):
            view, step = group.for_shape(case.shape), Step(case, rank)
            sent = view.decode_dispatch(step.mine().x, step.routing())
            for encoding in ("fp8", "logfmt10"):
                check_encoding(view, step, sent, torch.float16, encoding, fast=False)  # sums per rank would be infinite
                for dtype in (torch.bfloat16, torch.float32):
                    check_encoding(view, step, sent, dtype, encoding, fast=False)
                    check_encoding(view, step, sent, dtype, encoding, fast=True)


@at_places
def test_encodings(run, pair, ranks):
    run(pair, ranks, encodings, ranks)


def masked_encodings(rank, pg, pair: Pair) -> None:
    """Ranks 0 and 1 go on without 2, and 2 without them."""
    case = Case((3, 2, 4), 6, 3, hidden=256, dtype=torch.float32)
    step = Step(case, rank, frozenset({2}) if rank < 2 else frozenset({0, 1}))
    with pair.open(pg, case.shape) as group:
        group.decode_dispatch(step.mine().x, step.routing())  # of these sizes the first: it takes all ranks
        for other in step.away:
            group.mask(other)
        sent = group.decode_dispatch(step.mine().x, step.routing())
        for encoding in ("fp8", "logfmt10"):
            check_encoding(group, step, sent, torch.float32, encoding, fast=False)
            check_encoding(group, step, sent, torch.float32, encoding, fast=True)


def test_encodings_without_masked_ranks(run, pair):
    run(pair, 3, masked_encodings)


def other_encodings(rank, pg, pair: Pair) -> str:
    case = Case((2, 3), 4, 2, hidden=128)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        with pytest.raises(MismatchError) as caught:
            group.decode_combine(sent.x, sent.plan, encoding=("fp8", "logfmt10")[rank])
    return str(caught.value)


def test_ranks_that_choose_other_encodings_hear_of_it(run):
    told = run(next(pair for pair in PAIRS if pair.transport == "shared_memory"), 2, other_encodings)
    assert "encoding is fp8 on rank 0 and logfmt10 on rank 1" in told[0]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_fewer_bytes_travel(monkeypatch, numerics):
    widths = []
    start = Exchange.start

    def watched(self, signature, sections, *args, **options):
        widths.append(sections.widths)
        return start(self, signature, sections, *args, **options)

    monkeypatch.setattr(Exchange, "start", watched)
    with ExpertGroup(None, MoeShape(2, 2, 512, 4), backend="cpu") as group:
        sent = group.decode_dispatch(
            torch.ones(2, 512).bfloat16(), Routing(torch.tensor([[0, 1], [1, -1]]), torch.ones(2, 2))
        )
        for encoding in ("same", "fp8", "logfmt10"):
            group.decode_combine(sent.x, sent.plan, numerics=numerics, encoding=encoding)
    assert widths[1:] == [(1024, 0), (512, 16), (640, 32)]


@pytest.mark.parametrize("encoding", ["FP8", "logfmt", None, 1])
def test_encodings_that_do_not_exist(encoding):
    with ExpertGroup(None, MoeShape(2, 2, 128, 4), backend="cpu") as group:
        sent = group.decode_dispatch(torch.ones(1, 128), Routing(torch.tensor([[0, 1]]), torch.ones(1, 2)))
        with pytest.raises(ArgumentError, match='encoding: expected one of "same", "fp8", "logfmt10", got'):
            group.decode_combine(sent.x, sent.plan, encoding=encoding)


@pytest.mark.parametrize("encoding", ["fp8", "logfmt10"])
def test_encodings_need_whole_groups(encoding):
    with ExpertGroup(None, MoeShape(2, 2, 192, 4), backend="cpu") as group:
        sent = group.decode_dispatch(torch.ones(1, 192), Routing(torch.tensor([[0, 1]]), torch.ones(1, 2)))
        with pytest.raises(
            ArgumentError, match=f"encoding: '{encoding}' works on groups of 128 columns, H=192 is no multiple"
        ):
            group.decode_combine(sent.x, sent.plan, encoding=encoding)
        group.decode_combine(sent.x, sent.plan)


def hooks_in_any_order(rank, pg, pair: Pair) -> None:
    """Each rank receives in an order of its own, and throughput calls pass between."""
    pick = random.Random(rank)
    steps = [Step(Case((3, 0, 4), 6, 3, hidden=64, dtype=torch.float32, seed=seed), rank) for seed in range(6)]
    with pair.open(pg, steps[0].case.shape) as group:
        for _ in range(2):
            sent = []
            for step in steps:
                x = step.mine().x.clone()
                sent.append(group.decode_dispatch(x, step.routing(), return_hook=True))
                x.fill_(torch.nan)  # the caller's again as soon as the call returns
            order = list(range(len(steps)))
            pick.shuffle(order)
            for i in order[:3]:
                sent[i].hook()
            check_round_trip(group, steps[0].case, DispatchOptions())
            for i in order[3:] + order:
                sent[i].hook()
            for i in order:
                check_received(steps[i], sent[i], None)
            combine_in_any_order(group, steps, sent, order)


def combine_in_any_order(group, steps, sent, order) -> None:
    """All combines are under way before the first is received."""
    made = [group.decode_combine(one.x * 2, one.plan, return_hook=True) for one in sent]
    for i in order + order:
        made[i].hook()
    for step, one, got in zip(steps, sent, made, strict=True):
        oracle = step.oracle()
        ys = [rows_of(oracle, there, step) * 2 for there in range(step.case.ranks)]
        same_bits(f"{step} combine by hook", got.x, oracle.decode_combine(step.rank, ys))
        check_received(step, one, None)


def rows_of(oracle, rank: int, step: Step) -> torch.Tensor:
    """What rank ``rank`` holds, in its places."""
    table = torch.zeros(oracle.num_local * step.capacity, step.case.hidden, dtype=step.case.dtype)
    for row, x in zip(oracle.rows(rank), oracle.x(rank), strict=True):
        table[row.place] = x
    return table


def test_hooks_may_be_called_in_any_order_and_twice(run, pair):
    run(pair, 3, hooks_in_any_order)


def forgotten_hook(rank, pg, pair: Pair) -> None:
    """A rank that never receives a result harms nobody."""
    case = Case((3, 4), 4, 2, hidden=64)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        for _ in range(20):
            sent = group.decode_dispatch(step.mine().x, step.routing(), return_hook=True)
            if rank == 0:
                sent.hook()
                check_received(step, sent, None)
            del sent
        check_round_trip(group, case, DispatchOptions())


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.transport != "process_group"], ids=str)
def test_a_hook_that_is_never_called_harms_nobody_in_shared_memory(run, pair):
    """Not over torch.distributed: there a message that nobody receives stays in the process group."""
    run(pair, 2, forgotten_hook)


BEFORE = 10**15
"""Nanoseconds that a counter holds already."""


def counters(rank, pg, pair: Pair, ranks: int) -> list[list[int]]:
    case = Case((3, 2, 4)[:ranks], 2 * ranks, 3, hidden=64, routing="repeated")
    step = Step(case, rank)
    counts = torch.tensor(step.oracle().expert_counts(rank), dtype=torch.int32)
    base = torch.arange(2, dtype=torch.int32) * 100
    stats = DecodeStats(base.clone(), torch.full((ranks,), BEFORE, dtype=torch.int64))
    waits = DecodeStats(wait_ns=torch.zeros(ranks, dtype=torch.int64))
    with pair.open(pg, case.shape) as group:
        group.decode_dispatch(step.mine().x, step.routing())  # no counters: nothing to add to
        for i in range(1, 4):
            if rank == 0:
                time.sleep(0.05)  # so that the others wait
            sent = group.decode_dispatch(step.mine().x, step.routing(), stats=stats, return_hook=i == 2)
            sent.hook()
            sent.hook()
            same_bits(f"{step} received", stats.received, base + counts * i)
        if rank == 0:
            time.sleep(0.05)
        group.decode_combine(sent.x, sent.plan, stats=waits)
    return [stats.wait_ns.tolist(), waits.wait_ns.tolist()]


def check_counters(told: list[list[list[int]]]) -> None:
    """What `counters` gave on each rank: only peers are waited for, and rank 0, which was late, by the others."""
    for rank, (dispatch, combine) in enumerate(told):
        assert min(dispatch) >= BEFORE
        assert min(combine) >= 0
        assert (dispatch[rank], combine[rank]) == (BEFORE, 0), "nobody waits for himself"
        if rank:
            # Nanoseconds, not seconds; less than the whole test may take.
            assert BEFORE < dispatch[0] < BEFORE + 60e9
            assert 0 < combine[0] < 60e9


def test_counters_are_added_to(run, pair):
    check_counters(run(pair, 3, counters, 3))


def many_tokens(rank, pg, pair: Pair) -> None:
    """More rows than any block in which a backend may work."""
    case = Case((300, 260), 4, 2, hidden=640, dtype=torch.float32)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        check_received(step, sent, None)
        for fast in (False, True):
            check_combined(group, step, sent, torch.float32, fast=fast, into=fast)


def test_many_tokens(run, pair):
    run(pair, 2, many_tokens)


def weights_later(rank, pg, pair: Pair) -> None:
    case = Case((3, 4), 4, 2, hidden=64, dtype=torch.float32)
    step = Step(case, rank)
    mine = step.mine()
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(mine.x, Routing(mine.topk_idx))
        check_received(Step(replace(case, weights=False), rank), sent, None)
        later = replace(sent, plan=replace(sent.plan, topk_weights=mine.topk_weights))
        check_combined(group, step, later, torch.float32)


def test_weights_may_come_with_the_plan(run, pair):
    run(pair, 2, weights_later)


def other_calls_between(rank, pg, pair: Pair) -> None:
    """Both families, two shapes and several live results on one group; a rank is late now and then."""
    one = Step(Case((3, 1, 2), 6, 2, hidden=128), rank)
    two = Step(Case((1, 5, 0), 3, 3, hidden=256, dtype=torch.float32, routing="repeated", seed=2), rank)
    pick = random.Random(rank)
    with pair.open(pg, one.case.shape) as group:
        views = [group.for_shape(step.case.shape) for step in (one, two)]
        for turn in range(3):
            if rank == turn:
                time.sleep(pick.random() * 0.02)
            sent = [v.decode_dispatch(s.mine().x, s.routing()) for v, s in zip(views, (one, two), strict=True)]
            check_round_trip(views[0], one.case, DispatchOptions())
            for view, step, got in zip(views, (one, two), sent, strict=True):
                check_received(step, got, None)
                check_combined(view, step, got, torch.bfloat16, fast=turn == 1, hook=turn == 2)


def test_families_and_shapes_share_a_group(run, pair):
    run(pair, 3, other_calls_between)


def masks(rank, pg, pair: Pair) -> None:
    """Ranks 0 and 1 go on without 2, and 2 without them; then all together again."""
    case = Case((3, 2, 4), 6, 3, hidden=128, dtype=torch.float32)
    away = frozenset({2}) if rank < 2 else frozenset({0, 1})
    with pair.open(pg, case.shape) as group:
        everyone, apart = Step(case, rank), Step(case, rank, away)
        for step in (everyone, apart, everyone, apart):
            for other in (0, 1, 2):
                if other != rank:
                    group.mask(other, masked=other in step.away)
            assert group.masked_ranks == step.away
            for fp8 in (None, Scale.FLOAT32):
                sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=fp8 is None)
                sent.hook()
                check_received(step, sent, fp8)
                check_combined(group, step, sent, torch.float32)
                check_combined(group, step, sent, torch.float32, fast=True, hook=True)
        for other in away:
            group.mask(other, masked=False)
        check_round_trip(group, case, DispatchOptions())


def test_masked_ranks_are_skipped_both_ways(run, pair):
    run(pair, 3, masks)


def fast_is_near(rank, pg, pair: Pair) -> None:
    """The promise about "fast" in numbers: one more rounding per rank, no more."""
    case = Case((6, 5), 8, 6, hidden=256)
    step = Step(case, rank)
    with pair.open(pg, case.shape) as group:
        sent = group.decode_dispatch(step.mine().x, step.routing())
        exact = group.decode_combine(sent.x, sent.plan).x.float()
        fast = group.decode_combine(sent.x, sent.plan, numerics="fast").x.float()
    assert not torch.equal(exact, fast), "the same numbers: nothing was summed before the encoding"
    largest = float((case.inputs()[rank].topk_weights.abs().sum(1) * 1024).max())
    close("fast", fast, exact, rtol=2**-7, atol=largest * 2**-8)


def test_fast_differs_by_rounding_only(run, pair):
    run(pair, 2, fast_is_near)
