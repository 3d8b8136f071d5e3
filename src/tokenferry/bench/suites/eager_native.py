"""The eager calls of a program that uses our own API."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import as_tensor
from tokenferry.bench.core.inputs import Inputs
from tokenferry.bench.core.sets import DECODE_PAIR, PAIR, USER_ROWS, Call, Pair, Sets, checked_step
from tokenferry.bench.suites.decode_reference import DecodeReference
from tokenferry.types import Plan, Quantized, Routing, Scale


def native_calls(sets: Sets, group: ExpertGroup) -> Iterator[Call]:
    """Make the calls of the native API; counts on the host. Collective."""

    def dispatch(inputs: Inputs) -> tuple[Tensor, Plan]:
        sent = group.dispatch(inputs.x, inputs.routing)
        return as_tensor(sent.x), sent.plan

    def whole(v: int, rows: str) -> Tensor | Quantized:
        return group.dispatch(sets.rows(v, rows), ready[v].routing).x

    def kept(v: int, rows: str) -> Tensor | Quantized:
        return group.redispatch(sets.rows(v, rows), ready[v].plan).x

    def pair(v: int) -> Tensor:
        sent = group.dispatch(sets.inputs[v].x, ready[v].routing)
        return group.combine(as_tensor(sent.x), sent.plan).x

    ready = sets.ready(dispatch)
    heap = [group.empty_rows(one.plan) for one in ready]
    for rows, one in zip(heap, ready, strict=True):
        rows.copy_(one.y)
    yield from sets.dispatches(whole, kept)
    own = partial(sets.combine_step, "combine", lambda v: group.combine(heap[v], ready[v].plan).x)
    yield Call("combine, rows in the group's memory", "bf16", own)
    user = partial(sets.combine_step, "combine", lambda v: group.combine(ready[v].y, ready[v].plan).x)
    yield Call(USER_ROWS, "bf16", user)
    yield Call(PAIR, "bf16", partial(sets.pair_step, PAIR, pair))


def native_decode(references: list[DecodeReference], group: ExpertGroup, y: Tensor) -> Iterator[Call]:
    """Make the decode pair of the native API: rows cast to FP8 on the way there, exact sums of BF16 rows."""
    routings = [Routing(one.topk_idx, one.topk_weights) for one in references]

    def pair(v: int) -> Pair:
        sent = group.decode_dispatch(references[v].x, routings[v], quantize=Scale.FLOAT32)
        return Pair(sent, group.decode_combine(y, sent.plan).x)

    def check(v: int, got: Pair) -> None:
        references[v].check_dispatch("decode_dispatch", got.sent)
        references[v].check_sums("decode_combine", got.sums, numerics="exact", shift=0)

    yield Call(DECODE_PAIR, "fp8", partial(checked_step, len(references), pair, check))
