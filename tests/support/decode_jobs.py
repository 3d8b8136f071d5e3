"""Jobs of decode calls; processes on every backend run them, and threads on the emulator."""

import random
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from support.decoding import CASTS, Step, check_combined, check_encoding, check_received
from support.pairs import Pair
from support.throughput import check_round_trip
from tokenferry import DecodeStats, DispatchOptions, MoeShape, PlanError, Routing, Scale
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits


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
        for i, case in enumerate(encoding_cases(ranks)):
            view, step = group.for_shape(case.shape), Step(case, rank)
            sent = view.decode_dispatch(step.mine().x, step.routing())
            for encoding in ("fp8", "logfmt10"):
                if i % 3 == 0:
                    check_encoding(view, step, sent, torch.float16, encoding, fast=False)  # or sums would be infinite
                dtype = (torch.bfloat16, torch.float32)[i % 2]
                check_encoding(view, step, sent, dtype, encoding, fast=False)
                check_encoding(view, step, sent, dtype, encoding, fast=True)


def not_finite(rank, pg, pair: Pair) -> None:
    """Send infinities and NaNs: raw rows keep them, casts and encodings turn them into NaN and keep what is beside."""
    step = Step(Case((9, 8), 4, 2, hidden=256, dtype=torch.float32), rank, spoilt=True)
    with pair.open(pg, step.case.shape) as group:
        for fp8 in CASTS:
            sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8)
            check_received(step, sent, fp8)
        for encoding in ("fp8", "logfmt10"):
            for fast in (False, True):
                check_encoding(group, step, sent, torch.bfloat16, encoding, fast)


def plans_in_other_views(rank, pg, pair: Pair) -> None:
    """Use the plan of a decode dispatch in another view of its group, whose E, K and M differ."""
    step = Step(Case((4, 7, 2), 6, 2, dtype=torch.float32), rank)
    with pair.open(pg, step.case.shape) as group:
        other = group.for_shape(MoeShape(3, 5, step.case.hidden, max_tokens=1))
        sent = group.decode_dispatch(step.mine().x, step.routing())
        for fast in (False, True):
            check_combined(other, step, sent, torch.float32, fast=fast)


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


def hooks_in_any_order(rank, pg, pair: Pair, ranks: int) -> None:
    """Receive in another order on each rank, with throughput calls between."""
    pick = random.Random(rank)
    tokens, experts = (3, 0, 4, 2)[:ranks], 2 * ranks
    steps = [Step(Case(tokens, experts, 3, hidden=64, dtype=torch.float32, seed=seed), rank) for seed in range(6)]
    with pair.open(pg, steps[0].case.shape) as group:
        for _ in range(2):
            sent = []
            for step in steps:
                x = step.mine().x.clone()
                sent.append(group.decode_dispatch(x, step.routing(), return_hook=True))
                x.fill_(torch.nan)  # the caller's again as soon as the call returns
            refuses_what_has_not_come(group, sent[-1])
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


HOOKED = ((True, False, False), (False, False, False), (True, True, False))
"""By rank, which of three calls it receives in a hook.

If a rank that does not waited until others have received what it sent, all would wait: rank 1 in the first call for
rank 2, rank 2 in the third for rank 0, and rank 0 in the second for rank 1.
"""


def hooks_of_some_ranks(rank, pg, pair: Pair, ranks: int) -> None:
    steps = [Step(Case((3, 4, 2, 5)[:ranks], 2 * ranks, 2, hidden=64, seed=seed), rank) for seed in range(3)]
    with pair.open(pg, steps[0].case.shape, timeout_s=20.0) as group:
        for turn in range(2):
            sent = [
                group.decode_dispatch(step.mine().x, step.routing(), return_hook=hooked)
                for step, hooked in zip(steps, HOOKED[rank % 3], strict=True)
            ]
            for step, one in zip(reversed(steps), reversed(sent), strict=True):
                one.hook()
                check_received(step, one, None)
            if turn:
                home = [
                    group.decode_combine(one.x, one.plan, return_hook=hooked)
                    for one, hooked in zip(sent, HOOKED[(rank + 1) % 3], strict=True)
                ]
                for one, got in zip(sent, home, strict=True):
                    got.hook()
                    assert torch.equal(got.x, group.decode_combine(one.x, one.plan).x)


def refuses_what_has_not_come(group, sent) -> None:
    """A combine says so before anything is sent; on GPUs of several nodes it receives what is pending itself."""
    if group.backend == "cuda" and group.topology.num_nodes > 1:
        return
    for plan in (sent.plan, replace(sent.plan, topk_weights=sent.plan.topk_weights)):
        with pytest.raises(PlanError, match=r"have not been received; call the hook\(\)"):
            group.decode_combine(sent.x, plan)


def combine_in_any_order(group, steps, sent, order) -> None:
    """Start all combines before the first is received."""
    made = [group.decode_combine(one.x * 2, one.plan, return_hook=True) for one in sent]
    for i in order + order:
        made[i].hook()
    for step, one, got in zip(steps, sent, made, strict=True):
        oracle = step.oracle()
        ys = [rows_of(oracle, there, step) * 2 for there in range(step.case.ranks)]
        want = oracle.decode_combine(step.rank, ys, nodes=step.levels(group))
        same_bits(f"{step} combine by hook", got.x, want)
        check_received(step, one, None)


def rows_of(oracle, rank: int, step: Step) -> torch.Tensor:
    """Return the rows that a rank has received, in their places."""
    table = torch.zeros(oracle.num_local * step.capacity, step.case.hidden, dtype=step.case.dtype)
    for row, x in zip(oracle.rows(rank), oracle.x(rank), strict=True):
        table[row.place] = x
    return table


BEFORE = 10**15
"""Nanoseconds in a counter before the calls."""


def counters(rank, pg, pair: Pair, ranks: int) -> list[list[int]]:
    case = Case((3, 2, 4, 1)[:ranks], 2 * ranks, 3, hidden=64, routing="repeated")
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


def check_counters(counted: list[list[list[int]]]) -> None:
    """Check the results of `counters`: ranks wait for peers only, and for rank 0, which was late."""
    for rank, (dispatch, combine) in enumerate(counted):
        assert min(dispatch) >= BEFORE
        assert min(combine) >= 0
        assert (dispatch[rank], combine[rank]) == (BEFORE, 0), "a rank waited for itself"
        if rank:
            # Nanoseconds, not seconds; less than the whole test may take.
            assert BEFORE < dispatch[0] < BEFORE + 60e9
            assert 0 < combine[0] < 60e9


def captured(rank: int, pg: dist.ProcessGroup, pair: Pair, quantize: Scale | None, hooks: bool) -> None:
    """On GPUs: replay decode calls with other rows, another routing and fewer tokens, between eager calls."""
    ranks, device = pg.size(), pair.device
    with pair.open(pg, MoeShape(2 * ranks, 3, 512, 64)) as group:
        x = torch.randn(40, 512, device=device, dtype=torch.bfloat16)
        index = torch.zeros(40, 3, device=device, dtype=torch.int64)
        weights = torch.rand(40, 3, device=device)

        def calls() -> list[torch.Tensor]:
            sent = group.decode_dispatch(x, Routing(index, weights), quantize=quantize, return_hook=hooks)
            sent.hook()
            rows = sent.x if quantize is None else sent.x.data.bfloat16()
            homes = []
            for numerics in ("exact", "fast"):
                home = group.decode_combine(rows, sent.plan, numerics=numerics, return_hook=hooks)
                home.hook()
                homes.append(home.x)
            return homes

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls()
        torch.cuda.synchronize()
        pg.barrier().wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out = calls()
        for seed in range(20):
            make = torch.Generator().manual_seed(100 * seed + rank)
            chosen = torch.stack([torch.randperm(2 * ranks, generator=make)[:3] for _ in range(40)])
            chosen[int(torch.randint(0, 41, (1,), generator=make)) :] = -1
            index.copy_(chosen)
            x.copy_(torch.randn(40, 512, generator=make))
            weights.copy_(torch.rand(40, 3, generator=make))
            want = [home.clone() for home in calls()]
            group.synchronize()
            for home in out:
                home.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            for got, home in zip(out, want, strict=True):
                assert got.equal(home), f"replay {seed}"
        for _ in range(100):
            graph.replay()
        torch.cuda.synchronize()
        assert out[0].equal(want[0])
        group.synchronize()
