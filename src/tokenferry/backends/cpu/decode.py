"""Decode calls of the CPU backend: fixed shapes, FP8 cast and weighted sum inside, receive hooks, masked ranks.

A call has two halves. The first casts, packs and sends; the second takes, places and adds up, at once or in the hook.
All results are allocated in the first half, so that a hook only fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, Encoding, no_hook
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.exchange import Exchange, Kind, Payload, Pending, Received, Signature
from tokenferry.backends.masking import drop_ranks
from tokenferry.formats import fp8, logfmt
from tokenferry.formats.dtypes import dtype_code
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodePlan, DecodeStats, Quantized, Scale

_COUNT_BITS = 32


def dispatch(exchange: Exchange, key: str, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
    """Cast, send; then, at once or in the hook, place into ``[L, R*M, H]``."""
    shape, routing = request.shape, request.routing
    num_ranks, num_local = exchange.num_ranks, shape.num_experts // exchange.num_ranks
    skip = frozenset(exchange.masked)
    topk_idx = drop_ranks(routing.topk_idx, skip, num_local)
    rows: Tensor | Quantized = request.x if request.quantize is None else fp8.cast(request.x, request.quantize)
    payload = Payload(
        rows.data if isinstance(rows, Quantized) else rows,
        scale=rows.scale if isinstance(rows, Quantized) else None,
        weights=routing.topk_weights,
        topk_idx=topk_idx,
        token=torch.arange(topk_idx.shape[0]),
    )
    dst_token, dst_counts = cpu_routing.destinations(topk_idx, shape.num_experts, num_ranks)
    fields = {
        "num_experts": shape.num_experts,
        "max_tokens": shape.max_tokens,
        "dtype": dtype_code(request.x.dtype),
        "fp8 scale": 0 if request.quantize is None else 1 + list(type(request.quantize)).index(request.quantize),
        **payload.fields,
    }
    counts = dst_counts.tolist()
    fill = payload.fill(torch.split(dst_token, counts), exchange.rank)
    signature = Signature(Kind.decode_dispatch, fields)
    pending = exchange.start(signature, payload.sections, counts, fill, skip=skip, copy_own=request.return_hook)

    room = num_ranks * shape.max_tokens
    result = DecodeDispatched(
        x=_empty_like(rows, num_local, room, exchange.allocator),
        expert_counts=torch.empty(num_local, dtype=torch.int32),
        plan=DecodePlan(
            group_key=key,
            num_tokens=topk_idx.shape[0],
            num_experts=shape.num_experts,
            topk_idx=topk_idx,
            topk_weights=routing.topk_weights,
            src_token=torch.empty(num_local, room, dtype=torch.int32),
            src_range=torch.empty(num_local, num_ranks, dtype=torch.int64),
            row_weights=None if routing.topk_weights is None else torch.empty(num_local, room),
            _call_number=pending.number,
        ),
        hook=no_hook,
    )

    def place(received: Received) -> None:
        _place(result, payload, received, exchange.allocator, first=exchange.rank * num_local)
        if request.stats.received is not None:
            request.stats.received.add_(result.expert_counts)

    hook = _finish(pending, request.stats, place, return_hook=request.return_hook)
    return DecodeDispatched(result.x, result.expert_counts, result.plan, hook)


def combine(exchange: Exchange, request: DecodeCombineRequest) -> DecodeCombined:
    """Send the experts' rows home, weighted and added up per token if ``fast``; then add up what comes."""
    y, plan, weights, encoding = request.y, request.plan, request.plan.topk_weights, request.encoding
    num_ranks, num_local = exchange.num_ranks, plan.num_experts // exchange.num_ranks
    assert weights is not None
    skip = frozenset(exchange.masked)
    places = [
        _places_from(plan, src) if src not in skip else torch.empty(0, dtype=torch.int64) for src in range(num_ranks)
    ]
    payload, parts, counts = _cargo(request, places, exchange.allocator)
    fill = payload.fill(parts, exchange.rank)
    fields = {
        "dispatch of the plan": plan._call_number,
        "fast": int(request.fast),
        "encoding": int(encoding),
        "dtype": dtype_code(y.dtype),
        **payload.fields,
    }
    signature = Signature(Kind.decode_combine, fields)
    pending = exchange.start(signature, payload.sections, counts, fill, skip=skip, copy_own=request.return_hook)
    out = request.out
    if out is None:
        out = exchange.allocator.empty(plan.num_tokens, y.shape[-1], dtype=y.dtype)

    def add_up(received: Received) -> None:
        absent = frozenset(exchange.masked) | skip
        topk_idx = drop_ranks(plan.topk_idx, absent, num_local)
        if request.fast:
            tokens, expected = cpu_routing.destinations(topk_idx, plan.num_experts, num_ranks)
        else:
            where = cpu_routing.spread(topk_idx, plan.num_experts, 1, None)
            expected = where.counts.view(num_ranks, num_local).sum(1)
        # A rank that was masked when its rows came counts as absent altogether.
        received = [(0, []) if src in absent else one for src, one in enumerate(received)]
        pending.check_counts(received, expected.tolist())
        if request.fast:
            home = torch.split(tokens, expected.tolist())
            cpu_routing.add_up(out, home, _sums_of(payload, received, encoding, exchange.allocator), exchange.allocator)
            return
        rows = _rows_of(payload, received, encoding, exchange.allocator)
        cpu_routing.add_up_weighted(out, rows, where.row_idx, weights, exchange.allocator)

    return DecodeCombined(out, _finish(pending, request.stats, add_up, return_hook=request.return_hook))


def _cargo(
    request: DecodeCombineRequest, places: list[Tensor], allocator: Allocator
) -> tuple[Payload, Sequence[Tensor | slice], list[int]]:
    """What travels, in the format of the encoding; which part of it each rank gets, and how many rows that is."""
    flat = request.y.view(-1, request.y.shape[-1])
    if request.encoding is Encoding.same and not request.fast:
        return Payload(flat), places, [at.numel() for at in places]
    parts = [_sum_per_token(flat, request.plan, at, allocator) if request.fast else flat[at] for at in places]
    counts = [part.shape[0] for part in parts]
    ends = torch.tensor(counts).cumsum(0).tolist()
    slices = [slice(end - num, end) for end, num in zip(ends, counts, strict=True)]
    rows = torch.cat(parts)
    if request.encoding is Encoding.same:
        return Payload(rows), slices, counts
    # Own rows as well: the sum shall not depend on where an expert lives.
    encoded = fp8.cast(rows, Scale.FLOAT32) if request.encoding is Encoding.fp8 else logfmt.encode(rows)
    return Payload(encoded.data, scale=encoded.scale), slices, counts


def _rows_of(payload: Payload, received: Received, encoding: Encoding, allocator: Allocator) -> Tensor:
    """The rows of all messages: as they were sent, or, if they were encoded, float32."""
    rows = payload.take_rows(received, allocator)
    if encoding is Encoding.same:
        return rows
    encoded = Quantized(rows, payload.take_small(received)["scale"])
    return fp8.dequantize(encoded) if encoding is Encoding.fp8 else logfmt.decode(encoded)


def _sums_of(payload: Payload, received: Received, encoding: Encoding, allocator: Allocator) -> Sequence[Tensor]:
    """The same by source rank; what was not encoded is not copied."""
    if encoding is Encoding.same:
        return [payload.rows_of(*message) for message in received]
    return torch.split(_rows_of(payload, received, encoding, allocator), [num for num, _ in received])


def _finish(
    pending: Pending, stats: DecodeStats, work: Callable[[Received], None], *, return_hook: bool
) -> Callable[[], None]:
    """Do the second half now, or return a hook that does it once."""
    done = False

    @torch.no_grad()
    def hook() -> None:
        nonlocal done
        if done or pending.void:
            return
        with pending.receive(stats.wait_ns, tolerant=True, hooked=return_hook) as received:
            work(received)
        done = True

    if return_hook:
        return hook
    hook()
    return no_hook


def _place(
    result: DecodeDispatched[Tensor | Quantized],
    payload: Payload,
    received: Received,
    allocator: Allocator,
    *,
    first: int,
) -> None:
    """Fill a result with what came."""
    plan = result.plan
    num_local, room = plan.src_token.shape
    small = payload.take_small(received)
    local_idx = cpu_routing.to_local(small["topk_idx"], first, num_local)
    where = cpu_routing.spread(local_idx, num_local, 1, room)
    row, slot = (where.row_idx >= 0).nonzero().unbind(1)
    expert, column = where.row_idx[row, slot] // room, where.row_idx[row, slot] % room

    target = result.x.data if isinstance(result.x, Quantized) else result.x
    places = [range(i * room, i * room + count) for i, count in enumerate(where.counts.tolist())]
    cpu_routing.place(payload.take_rows(received, allocator), where.row_idx, places, target.view(-1, target.shape[-1]))
    if isinstance(result.x, Quantized):
        result.x.scale[expert, column] = small["scale"][row]
    if plan.row_weights is not None:
        plan.row_weights.copy_(
            cpu_routing.add_weights(small["weights"], where.row_idx, num_local * room).view(num_local, room)
        )
    plan.src_token[expert, column] = small["token"][row, 0].int()
    result.expert_counts.copy_(where.counts)

    src = torch.repeat_interleave(torch.arange(len(received)), torch.tensor([num for num, _ in received]))
    hits = cpu_routing.hits(local_idx, 1, num_local).long()
    counts = torch.zeros(len(received), num_local, dtype=torch.int64).index_add_(0, src, hits).T
    starts = counts.cumsum(1) - counts
    plan.src_range.copy_(starts << _COUNT_BITS | counts)


def _places_from(plan: DecodePlan, src: int) -> Tensor:
    """Places (counting all experts' rooms) of the rows that came from one rank, by expert, then token."""
    room = plan.src_token.shape[1]
    ranges = plan.src_range[:, src]
    counts = ranges & ((1 << _COUNT_BITS) - 1)
    firsts = (ranges >> _COUNT_BITS) + torch.arange(ranges.numel()) * room
    before = counts.cumsum(0) - counts
    return torch.repeat_interleave(firsts - before, counts) + torch.arange(int(counts.sum()))


def _sum_per_token(flat: Tensor, plan: DecodePlan, places: Tensor, allocator: Allocator) -> Tensor:
    """Weighted sums of the rows at ``places``, one per distinct token, by token; experts in order, one rounding."""
    assert plan.row_weights is not None
    tokens, which, counts = torch.unique(plan.src_token.flatten()[places], return_inverse=True, return_counts=True)
    # A table of each token's places: sorted by token, and, since the sort is stable, by expert within one.
    order = which.argsort(stable=True)
    which = which[order]
    column = torch.arange(which.numel()) - (counts.cumsum(0) - counts)[which]
    row_idx = torch.full((tokens.numel(), int(counts.max()) if counts.numel() else 0), -1)
    row_idx[which, column] = places[order]
    weights = torch.zeros(row_idx.shape)
    weights[which, column] = plan.row_weights.flatten()[places[order]]
    sums = flat.new_empty(tokens.numel(), flat.shape[1])
    cpu_routing.add_up_weighted(sums, flat, row_idx, weights, allocator)
    return sums


def _empty_like(rows: Tensor | Quantized, num_local: int, room: int, allocator: Allocator) -> Tensor | Quantized:
    """The result's rows, undefined; scales are column-major, so that a grouped FP8 GEMM can read them by TMA."""
    if not isinstance(rows, Quantized):
        return allocator.empty(num_local, room, rows.shape[1], dtype=rows.dtype)
    data = allocator.empty(num_local, room, rows.data.shape[1], dtype=rows.data.dtype)
    scale = allocator.empty(num_local, rows.scale.shape[1], room, dtype=rows.scale.dtype)
    return Quantized(data, scale.transpose(1, 2))
