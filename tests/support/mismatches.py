"""Jobs in which the last rank makes another call than its peers, and what all must report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from support.lost_ranks import (
    CASE,
    LONG_S,
    complete,
)
from support.pairs import Pair
from tokenferry import (
    ClosedError,
    Dispatched,
    DispatchOptions,
    ExpertGroup,
    MismatchError,
    Routing,
    Scale,
)

Call = Callable[[ExpertGroup, torch.Tensor, Routing, Dispatched], Any]
"""Called with the group, rows, their routing, and an earlier dispatch of both."""


@dataclass(frozen=True)
class Mismatch:
    """The call of the last rank, that of all others, and a word that the error must contain."""

    last: Call
    others: Call
    word: str


MISMATCHES = {
    "another method": Mismatch(
        lambda g, x, r, sent: g.combine(sent.x, sent.plan),
        lambda g, x, r, sent: g.dispatch(x, r),
        "dispatch",
    ),
    "another dtype": Mismatch(
        lambda g, x, r, sent: g.dispatch(x.bfloat16(), r),
        lambda g, x, r, sent: g.dispatch(x, r),
        "torch.bfloat16",
    ),
    "another layout": Mismatch(
        lambda g, x, r, sent: g.dispatch(x, r, options=DispatchOptions(counts="device")),
        lambda g, x, r, sent: g.dispatch(x, r),
        "counts",
    ),
    "weights and none": Mismatch(
        lambda g, x, r, sent: g.dispatch(x, Routing(r.topk_idx)),
        lambda g, x, r, sent: g.dispatch(x, r),
        "weights",
    ),
    "another shape": Mismatch(
        lambda g, x, r, sent: g.for_shape(replace(g.shape, max_tokens=99)).dispatch(x, r),
        lambda g, x, r, sent: g.dispatch(x, r),
        "max_tokens",
    ),
    "as many bytes of other choices": Mismatch(
        lambda g, x, r, sent: twice_the_choices(g, x, r),
        lambda g, x, r, sent: g.dispatch(x, Routing(r.topk_idx)),
        "top_k",
    ),
    "the other decode call": Mismatch(
        lambda g, x, r, sent: after_decoding(g, x, r, "decode_combine"),
        lambda g, x, r, sent: after_decoding(g, x, r, "decode_dispatch"),
        "different calls",
    ),
    "decoding and not": Mismatch(
        lambda g, x, r, sent: after_decoding(g, x, r, "decode_dispatch"),
        lambda g, x, r, sent: after_decoding(g, x, r, "dispatch"),
        "different calls",
    ),
    "another cast": Mismatch(
        lambda g, x, r, sent: g.decode_dispatch(x, r, quantize=Scale.FLOAT32),
        lambda g, x, r, sent: g.decode_dispatch(x, r, quantize=Scale.UE8M0),
        "fp8 scale is",
    ),
    "the plan of another dispatch": Mismatch(
        lambda g, x, r, sent: decode_twice(g, x, r, 0),
        lambda g, x, r, sent: decode_twice(g, x, r, 1),
        "dispatch",
    ),
    "other numerics": Mismatch(
        lambda g, x, r, sent: decode_round(g, x, r, "fast"),
        lambda g, x, r, sent: decode_round(g, x, r, "exact"),
        "",
    ),
}


def twice_the_choices(group: ExpertGroup, x: torch.Tensor, routing: Routing) -> Dispatched:
    """Dispatch with twice as many choices in half as many bits."""
    index = routing.topk_idx.int()
    unused = torch.full_like(index, -1)
    other = group.for_shape(replace(group.shape, top_k=2 * group.shape.top_k))
    return other.dispatch(x, Routing(torch.cat([index, unused], dim=1)))


def after_decoding(group: ExpertGroup, x: torch.Tensor, routing: Routing, name: str) -> None:
    got = group.decode_dispatch(x, routing)
    if name == "decode_combine":
        group.decode_combine(got.x, got.plan)
    else:
        getattr(group, name)(x, routing)


def decode_twice(group: ExpertGroup, x: torch.Tensor, routing: Routing, which: int) -> None:
    """Combine one of two dispatches of the same routing, whose counts are equal."""
    got = [group.decode_dispatch(rows, routing) for rows in (x, 2 * x)]
    group.decode_combine(got[which].x, got[which].plan)


def decode_round(group: ExpertGroup, x: torch.Tensor, routing: Routing, numerics: str) -> None:
    got = group.decode_dispatch(x, routing)
    group.decode_combine(got.x, got.plan, numerics=numerics)


def disagree(rank, pg, pair: Pair, name: str) -> str:
    """The last rank makes another call than its peers."""
    mismatch = MISMATCHES[name]
    case = replace(CASE, tokens=CASE.tokens[: pg.size()])
    mine = case.inputs()[rank]
    routing = Routing(mine.topk_idx, mine.topk_weights)
    with pair.open(pg, case.shape, timeout_s=LONG_S) as group:
        sent = group.dispatch(mine.x, routing)
        call = mismatch.last if rank == pg.size() - 1 else mismatch.others
        with pytest.raises(MismatchError) as caught:
            complete(group, lambda: call(group, mine.x, routing, sent))
        with pytest.raises(ClosedError, match="MismatchError"):
            group.dispatch(mine.x, routing)
    return str(caught.value)


def check_mismatch(text: str, rank: int, ranks: int, name: str) -> None:
    assert f"rank {rank}" in text
    if " reported to rank" not in text:  # a rank that was only notified names the rank that notified it
        assert f"rank {ranks - 1}" in text
    assert MISMATCHES[name].word in text or " reported to rank" in text
