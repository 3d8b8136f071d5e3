"""Experts that do not exist, or on too many nodes: the rank that named them raises, and its peers go on.

Nothing is accessed out of bounds. On GPUs the device finds them: the call raises if it waits for counts; otherwise
`synchronize` or the next call does.
"""

import pytest
import torch

from support.bad_routing import (
    BAD,
    BAD_LONG,
    CASE,
    decode_with_bad_experts,
    with_bad_expert,
    with_too_many_nodes,
)
from support.lost_ranks import complete
from support.pairs import CUDA_PAIRS, NODES, Pair
from support.throughput import check_round_trip
from tokenferry import DispatchOptions, ExpertGroup, Layout, Routing, RoutingError

OPTIONS = (
    DispatchOptions(),
    DispatchOptions(Layout.EXPERTS, alignment=4),
    DispatchOptions(Layout.MASKED),
    DispatchOptions(counts="device"),
    DispatchOptions(Layout.EXPERTS, counts="device"),
    DispatchOptions(Layout.MASKED, counts="device"),
)


def call_with_bad_expert(
    group: ExpertGroup, rank: int, token: int, expert: int, options: DispatchOptions, dtype: torch.dtype
) -> None:
    message = rf"topk_idx\[{token}, 2\] is {expert}, expected an expert in \[0, 8\)"
    if dtype is torch.int64 and not -(1 << 31) <= expert < 1 << 31:
        message = rf"topk_idx\[{token}, 2\] is -?\d+"  # a device may report no more than 32 bits of it
    x, routing = with_bad_expert(rank, token, 2, expert, dtype)
    with pytest.raises(RoutingError, match=message):
        complete(group, lambda: group.dispatch(x, routing, options=options))


def one_rank_names_bad_experts(rank, pg, pair: Pair) -> None:
    """One rank after the other makes bad calls that its peer does not notice, then all go on."""
    with pair.open(pg, CASE.shape) as group:
        before = group.dispatch(CASE.inputs()[rank].x, Routing(CASE.inputs()[rank].topk_idx))
        kept = before.x.clone()
        for i, options in enumerate(OPTIONS):
            for culprit in (0, 1):
                if rank == culprit:
                    last = CASE.tokens[rank] - 1
                    for expert in BAD[i % 2 :: 2]:
                        call_with_bad_expert(
                            group, rank, (0, last)[i % 2], expert, options, (torch.int32, torch.int64)[i % 2]
                        )
                    for expert in BAD_LONG[i % 2 :: 2]:
                        call_with_bad_expert(group, rank, last // 2, expert, options, torch.int64)
                check_round_trip(group, CASE, options)
        assert torch.equal(before.x, kept)


def test_one_rank_names_bad_experts(worlds, pair):
    worlds(2, pair.backend).run(one_rank_names_bad_experts, pair)


def all_ranks_name_bad_experts(rank, pg, pair: Pair) -> None:
    with pair.open(pg, CASE.shape) as group:
        for options in OPTIONS:
            call_with_bad_expert(group, rank, 3, 8 + rank, options, torch.int64)
            check_round_trip(group, CASE, options)


def test_all_ranks_name_bad_experts(worlds, pair):
    worlds(2, pair.backend).run(all_ranks_name_bad_experts, pair)


def every_slot_is_bad(rank, pg, pair: Pair) -> None:
    """Every slot is bad; the error names the first."""
    with pair.open(pg, CASE.shape) as group:
        mine = CASE.inputs()[rank]
        for expert in (*BAD, *BAD_LONG):
            with pytest.raises(RoutingError, match=r"topk_idx\[0, 0\] is"):
                group.dispatch(mine.x, Routing(torch.full_like(mine.topk_idx, expert), mine.topk_weights))
        check_round_trip(group, CASE, DispatchOptions())


def test_every_slot_is_bad(worlds, pair):
    worlds(2, pair.backend).run(every_slot_is_bad, pair)


@pytest.mark.parametrize("culprit", [0, 1])
def test_decoding_goes_on_after_bad_experts(worlds, pair, culprit):
    worlds(2, pair.backend).run(decode_with_bad_experts, pair, culprit)


def found_by_the_next_call(rank, pg, pair: Pair) -> None:
    with pair.open(pg, CASE.shape) as group:
        mine = CASE.inputs()[rank]
        for options in OPTIONS[3:]:
            if rank == 1:
                x, routing = with_bad_expert(1, 5, 2, 8, torch.int64)
                group.dispatch(x, routing, options=options)
                torch.cuda.synchronize()
                with pytest.raises(RoutingError, match=r"dispatch: topk_idx\[5, 2\] is 8"):
                    group.dispatch(mine.x, Routing(mine.topk_idx), options=options)
            check_round_trip(group, CASE, options)


@pytest.mark.parametrize("pair", CUDA_PAIRS, ids=str)
def test_the_next_call_raises(worlds, pair):
    worlds(2, pair.backend).run(found_by_the_next_call, pair)


@pytest.mark.parametrize(("nodes", "ranks"), NODES, ids=str)
def test_one_rank_names_experts_on_too_many_nodes(worlds, nodes, ranks):
    worlds(ranks).run(with_too_many_nodes, nodes)
