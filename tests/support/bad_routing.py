"""Jobs whose routings name experts that do not exist, or on too many nodes."""

from dataclasses import replace

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.pairs import Pair
from support.throughput import all_options, check_round_trip
from tokenferry import DispatchOptions, ExpertGroup, Routing, RoutingError, Scale
from tokenferry.testing.cases import Case

CASE = Case((300, 7), 8, 4, hidden=64)
BAD = (8, 9, 255, 1 << 20, (1 << 31) - 1, -2, -256, -(1 << 31))
BAD_LONG = (1 << 32, (1 << 32) + 1, 1 << 40, (1 << 63) - 1, -(1 << 32), -(1 << 63), (1 << 63) - 8)
"""Numbers of 64 bits whose lower half may look like an expert."""


def with_bad_expert(rank: int, token: int, slot: int, expert: int, dtype: torch.dtype) -> tuple[torch.Tensor, Routing]:
    """Return the rows of a rank and their routing, one expert of which does not exist."""
    mine = CASE.inputs()[rank]
    topk_idx = mine.topk_idx.to(dtype)
    topk_idx[token, slot] = expert
    return mine.x, Routing(topk_idx, mine.topk_weights)


def decode_with_bad_experts(rank, pg, pair: Pair, culprit: int) -> None:
    """A bad decode_dispatch and the combine along its plan are no-ops; then the call is made again."""
    with pair.open(pg, CASE.shape) as group:
        step = Step(CASE, rank)
        for i, expert in enumerate((*BAD, *BAD_LONG)):
            hook, fp8 = i % 2 == 1, (None, Scale.FLOAT32)[i % 2]
            if rank == culprit:
                shown = str(expert)  # of which a kernel notes the nearest int32
                if pair.backend == "cuda" and abs(expert) >= 2**31 - 1:
                    shown = "2147483647 or more" if expert > 0 else "-2147483648 or less"
                message = rf"decode_dispatch: topk_idx\[5, 2\] is {shown}, expected an expert in \[0, 8\)"
                x, routing = with_bad_expert(rank, 5, 2, expert, torch.int64)
                with pytest.raises(RoutingError, match=message):
                    decode_pair(group, x, routing, fp8, hook)
            sent = group.decode_dispatch(step.mine().x, step.routing(), quantize=fp8, return_hook=hook)
            sent.hook()
            check_received(step, sent, fp8)
            check_combined(group, step, sent, torch.float32, hook=hook, fast=hook)
        check_round_trip(group, CASE, DispatchOptions())


def decode_pair(group: ExpertGroup, x: torch.Tensor, routing: Routing, fp8: Scale | None, hook: bool) -> None:
    got = group.decode_dispatch(x, routing, quantize=fp8, return_hook=hook)
    got.hook()
    y = torch.ones((*got.plan.src_token.shape, CASE.hidden), device=group.device)
    home = group.decode_combine(y, got.plan, return_hook=hook)
    home.hook()
    group.synchronize()


def with_too_many_nodes(rank, pg, pair: Pair) -> None:
    """One rank after the other names experts on one node too many, which its peers do not notice; then all go on."""
    ranks = pg.size()
    case = Case((5, 4, 7, 3, 6, 2, 1, 8)[:ranks], 2 * ranks, 4, routing="own_rank")
    limited = replace(case.shape, max_nodes=1)
    with pair.open(pg, limited) as group:
        where, mine = group.topology, case.inputs()[rank]
        ahead = (where.node + 1) % where.num_nodes
        topk_idx = mine.topk_idx.clone()
        topk_idx[-1] = torch.tensor([-1, 2 * where.nodes[ahead][0], 2 * rank, 2 * where.nodes[ahead][-1] + 1])
        nodes = ", ".join(map(str, sorted((where.node, ahead))))
        error = rf"topk_idx\[{len(topk_idx) - 1}\] has experts on 2 nodes \({nodes}\), expected at most 1; "
        for culprit in range(ranks):
            if rank == culprit:
                for call in (group.dispatch, group.decode_dispatch):
                    with pytest.raises(RoutingError, match=f"^{call.__name__}: {error}"):
                        call(mine.x, Routing(topk_idx, mine.topk_weights))
            for options in all_options(case)[culprit::ranks]:
                check_round_trip(group, case, options)
            step = Step(case, rank)
            sent = group.decode_dispatch(step.mine().x, step.routing())
            check_received(step, sent, None)
            check_combined(group, step, sent, torch.float32, hook=False, fast=False)
        # A view has the limit of its own shape.
        free = group.for_shape(replace(limited, max_nodes=where.num_nodes))
        check_round_trip(free, replace(case, routing="even"), DispatchOptions())
