"""Jobs whose routings name experts that do not exist."""

import pytest
import torch

from support.decoding import Step, check_combined, check_received
from support.pairs import Pair
from support.throughput import check_round_trip
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
                message = r"decode_dispatch: topk_idx\[5, 2\] is -?\d+, expected an expert in \[0, 8\)"
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
