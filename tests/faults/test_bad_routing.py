"""Experts that do not exist: reported by the rank that named them, never an access out of bounds, and nobody is harmed.

On GPUs the device finds them: at once if the call waits for counts, else by `synchronize` or the next call.
"""

import pytest
import torch
from test_lost_ranks import done

from support.decoding import Step, check_combined, check_received
from support.pairs import CUDA_PAIRS, Pair
from support.throughput import check_round_trip
from tokenferry import DispatchOptions, ExpertGroup, Layout, Routing, RoutingError, Scale
from tokenferry.testing.cases import Case

CASE = Case((300, 7), 8, 4, hidden=64)
BAD = (8, 9, 255, 1 << 20, (1 << 31) - 1, -2, -256, -(1 << 31))
BAD_LONG = (1 << 32, (1 << 32) + 1, 1 << 40, (1 << 63) - 1, -(1 << 32), -(1 << 63), (1 << 63) - 8)
"""Whose lower half may look like an expert."""

DELIVERIES = (
    DispatchOptions(),
    DispatchOptions(Layout.EXPERTS, alignment=4),
    DispatchOptions(Layout.MASKED),
    DispatchOptions(counts="device"),
    DispatchOptions(Layout.EXPERTS, counts="device"),
    DispatchOptions(Layout.MASKED, counts="device"),
)


def spoilt(rank: int, token: int, slot: int, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, Routing]:
    mine = CASE.inputs()[rank]
    topk_idx = mine.topk_idx.to(dtype)
    topk_idx[token, slot] = expert
    return mine.x, Routing(topk_idx, mine.topk_weights)


def call_badly(
    group: ExpertGroup, rank: int, token: int, expert: int, options: DispatchOptions, dtype: torch.dtype
) -> None:
    place = rf"topk_idx\[{token}, 2\] is {expert}, expected an expert in \[0, 8\)"
    if dtype is torch.int64 and not -(1 << 31) <= expert < 1 << 31:
        place = rf"topk_idx\[{token}, 2\] is -?\d+"  # a device may tell no more than 32 bits of it
    x, routing = spoilt(rank, token, 2, expert, dtype)
    with pytest.raises(RoutingError, match=place):
        done(group, lambda: group.dispatch(x, routing, options=options))


def one_rank_errs(rank, pg, pair: Pair) -> None:
    """Rank after rank makes bad calls that its peer knows nothing of, then all go on."""
    with pair.open(pg, CASE.shape) as group:
        before = group.dispatch(CASE.inputs()[rank].x, Routing(CASE.inputs()[rank].topk_idx))
        kept = before.x.clone()
        for i, options in enumerate(DELIVERIES):
            for culprit in (0, 1):
                if rank == culprit:
                    last = CASE.tokens[rank] - 1
                    for expert in BAD[i % 2 :: 2]:
                        call_badly(group, rank, (0, last)[i % 2], expert, options, (torch.int32, torch.int64)[i % 2])
                    for expert in BAD_LONG[i % 2 :: 2]:
                        call_badly(group, rank, last // 2, expert, options, torch.int64)
                check_round_trip(group, CASE, options)
        assert torch.equal(before.x, kept)


def test_one_rank_errs(worlds, pair):
    worlds(2, pair.backend).run(one_rank_errs, pair)


def all_ranks_err(rank, pg, pair: Pair) -> None:
    with pair.open(pg, CASE.shape) as group:
        for options in DELIVERIES:
            call_badly(group, rank, 3, 8 + rank, options, torch.int64)
            check_round_trip(group, CASE, options)


def test_all_ranks_err(worlds, pair):
    worlds(2, pair.backend).run(all_ranks_err, pair)


def nothing_but_bad(rank, pg, pair: Pair) -> None:
    """Every slot is wrong; the first of them is named."""
    with pair.open(pg, CASE.shape) as group:
        mine = CASE.inputs()[rank]
        for expert in (*BAD, *BAD_LONG):
            with pytest.raises(RoutingError, match=r"topk_idx\[0, 0\] is"):
                group.dispatch(mine.x, Routing(torch.full_like(mine.topk_idx, expert), mine.topk_weights))
        check_round_trip(group, CASE, DispatchOptions())


def test_nothing_but_bad_experts(worlds, pair):
    worlds(2, pair.backend).run(nothing_but_bad, pair)


def decoding_errs(rank, pg, pair: Pair, culprit: int) -> None:
    """A bad decode_dispatch comes to nothing, and so does a combine along its plan; then it is made again."""
    with pair.open(pg, CASE.shape) as group:
        step = Step(CASE, rank)
        for i, expert in enumerate((*BAD, *BAD_LONG)):
            hook, fp8 = i % 2 == 1, (None, Scale.FLOAT32)[i % 2]
            if rank == culprit:
                place = r"decode_dispatch: topk_idx\[5, 2\] is -?\d+, expected an expert in \[0, 8\)"
                x, routing = spoilt(rank, 5, 2, expert, torch.int64)
                with pytest.raises(RoutingError, match=place):
                    decode_badly(group, x, routing, fp8, hook)
            sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=hook)
            sent.hook()
            check_received(step, sent, fp8)
            check_combined(group, step, sent, torch.float32, hook=hook, fast=hook)
        check_round_trip(group, CASE, DispatchOptions())


def decode_badly(group: ExpertGroup, x: torch.Tensor, routing: Routing, fp8: Scale | None, hook: bool) -> None:
    got = group.decode_dispatch(x, routing, quantize=fp8, return_hook=hook)
    got.hook()
    y = torch.ones((*got.plan.src_token.shape, CASE.hidden), device=group.device)
    home = group.decode_combine(y, got.plan, return_hook=hook)
    home.hook()
    group.synchronize()


@pytest.mark.parametrize("culprit", [0, 1])
def test_decoding_goes_on_after_bad_experts(worlds, pair, culprit):
    worlds(2, pair.backend).run(decoding_errs, pair, culprit)


def told_by_the_next_call(rank, pg, pair: Pair) -> None:
    with pair.open(pg, CASE.shape) as group:
        mine = CASE.inputs()[rank]
        for options in DELIVERIES[3:]:
            if rank == 1:
                x, routing = spoilt(1, 5, 2, 8, torch.int64)
                group.dispatch(x, routing, options=options)
                torch.cuda.synchronize()
                with pytest.raises(RoutingError, match=r"dispatch: topk_idx\[5, 2\] is 8"):
                    group.dispatch(mine.x, Routing(mine.topk_idx), options=options)
            check_round_trip(group, CASE, options)


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_the_next_call_tells(worlds, pair):
    worlds(2, pair.backend).run(told_by_the_next_call, pair)
