"""Decode calls of the CPU backend: fixed shapes, FP8 casts and weighted sums, receive hooks, masked ranks.

A call has two halves. The first casts, packs and sends; the second, which may be a hook, receives and then arranges or
sums the rows. The first half allocates all results, so that a hook only fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, Encoding, no_hook
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.exchange import Exchange, Kind, Pending, Signature
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.backends.tensors import drop_ranks, without_autocast
from tokenferry.formats import fp8, logfmt
from tokenferry.formats.dtypes import dtype_code
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodePlan, DecodeStats, Quantized, Scale

_COUNT_BITS = 32
"""Each entry of ``DecodePlan.src_range`` is a start, shifted by this, and a count."""


@without_autocast
def decode_dispatch(
    exchange: Exchange, key: str, request: DecodeDispatchRequest
) -> DecodeDispatched[Tensor | Quantized]:
    """Cast and send the rows; then, at once or in the hook, arrange those that arrive as ``[L, R*M, H]``."""
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
        token=torch.arange(topk_idx.shape[0], dtype=torch.int64, device="cpu"),
    )
    pending = _start_dispatch(exchange, request, payload, topk_idx, skip)
    num_rows = num_ranks * shape.max_tokens
    weighted = routing.topk_weights is not None
    row_weights = torch.empty(num_local, num_rows, dtype=torch.float32, device="cpu") if weighted else None
    result = DecodeDispatched(
        x=_empty_like(rows, num_local, num_rows, exchange.allocator),
        expert_counts=torch.empty(num_local, dtype=torch.int32, device="cpu"),
        plan=DecodePlan(
            group_key=key,
            num_tokens=topk_idx.shape[0],
            num_experts=shape.num_experts,
            topk_idx=topk_idx,
            topk_weights=routing.topk_weights,
            src_token=torch.empty(num_local, num_rows, dtype=torch.int32, device="cpu"),
            src_range=torch.empty(num_local, num_ranks, dtype=torch.int64, device="cpu"),
            row_weights=row_weights,
            _call_number=pending.number,
        ),
        hook=no_hook,
    )

    def arrange(received: Sequence[ReceivedRows]) -> None:
        _arrange(result, payload, received, exchange.allocator, first=exchange.rank * num_local)
        if request.stats.received is not None:
            request.stats.received.add_(result.expert_counts)

    hook = _finish(pending, request.stats, arrange, return_hook=request.return_hook)
    return DecodeDispatched(result.x, result.expert_counts, result.plan, hook)


@without_autocast
def decode_combine(exchange: Exchange, request: DecodeCombineRequest) -> DecodeCombined:
    """Send the experts' rows back, if ``fast`` weighted and summed per token; then sum the rows that arrive."""
    y, plan, weights, encoding = request.y, request.plan, request.plan.topk_weights, request.encoding
    num_ranks, num_local = exchange.num_ranks, plan.num_experts // exchange.num_ranks
    assert weights is not None
    skip = frozenset(exchange.masked)
    outgoing = _outgoing(request, num_ranks, skip, exchange.allocator)
    payload = outgoing.payload
    pending = _start_combine(exchange, request, outgoing, skip)
    out = request.out
    if out is None:
        out = exchange.allocator.empty(plan.num_tokens, y.shape[-1], dtype=y.dtype)

    def reduce(received: Sequence[ReceivedRows]) -> None:
        absent = frozenset(exchange.masked) | skip
        topk_idx = drop_ranks(plan.topk_idx, absent, num_local)
        if request.fast:
            tokens, expected = cpu_routing.destinations(topk_idx, plan.num_experts, num_ranks)
        else:
            assigned = cpu_routing.assign(topk_idx, plan.num_experts, 1, None)
            expected = assigned.counts.view(num_ranks, num_local).sum(1)
        # The rows of a rank that is masked by now do not count, even if they have arrived.
        received = [ReceivedRows(0, []) if src in absent else one for src, one in enumerate(received)]
        pending.check_counts(received, expected.tolist())
        if request.fast:
            by_source = torch.split(tokens, expected.tolist())
            sums = _sums_by_source(payload, received, encoding, exchange.allocator)
            cpu_routing.reduce_rows(out, by_source, sums, exchange.allocator)
            return
        rows = _decoded_rows(payload, received, encoding, exchange.allocator)
        cpu_routing.reduce_weighted(out, rows, assigned.row_idx, weights, exchange.allocator)

    return DecodeCombined(out, _finish(pending, request.stats, reduce, return_hook=request.return_hook))


def _start_dispatch(
    exchange: Exchange, request: DecodeDispatchRequest, payload: Payload, topk_idx: Tensor, skip: frozenset[int]
) -> Pending:
    """Send each rank the rows that its experts need."""
    shape, quantize = request.shape, request.quantize
    fields = {
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "max_tokens": shape.max_tokens,
        "dtype": dtype_code(request.x.dtype),
        "fp8 scale": 0 if quantize is None else 1 + list(type(quantize)).index(quantize),
        **payload.fields,
    }
    dst_token, dst_counts = cpu_routing.destinations(topk_idx, shape.num_experts, exchange.num_ranks)
    counts = dst_counts.tolist()
    outgoing = Outgoing(payload, torch.split(dst_token, counts), counts)
    signature = Signature(Kind.decode_dispatch, fields)
    return exchange.start(signature, outgoing, skip=skip, copy_own=request.return_hook)


def _start_combine(
    exchange: Exchange, request: DecodeCombineRequest, outgoing: Outgoing, skip: frozenset[int]
) -> Pending:
    """Send each rank the rows of its tokens."""
    fields = {
        "dispatch of the plan": request.plan._call_number,
        "fast": int(request.fast),
        "encoding": int(request.encoding),
        "dtype": dtype_code(request.y.dtype),
        **outgoing.payload.fields,
    }
    signature = Signature(Kind.decode_combine, fields)
    return exchange.start(signature, outgoing, skip=skip, copy_own=request.return_hook)


def _outgoing(request: DecodeCombineRequest, num_ranks: int, skip: frozenset[int], allocator: Allocator) -> Outgoing:
    """Select the rows for each rank not in ``skip``, sum them per token if ``fast``, and encode them."""
    flat, plan = request.y.view(-1, request.y.shape[-1]), request.plan
    nowhere = torch.empty(0, dtype=torch.int64, device="cpu")
    positions = [nowhere if src in skip else _positions_from(plan, src) for src in range(num_ranks)]
    if request.encoding is Encoding.same and not request.fast:
        return Outgoing(Payload(flat), positions, [each.numel() for each in positions])
    parts = [_sum_per_token(flat, plan, each, allocator) if request.fast else flat[each] for each in positions]
    counts = [part.shape[0] for part in parts]
    ends = torch.tensor(counts, dtype=torch.int64, device="cpu").cumsum(0).tolist()
    slices = [slice(end - num, end) for end, num in zip(ends, counts, strict=True)]
    rows = torch.cat(parts)
    if request.encoding is Encoding.same:
        return Outgoing(Payload(rows), slices, counts)
    # This rank's own rows are encoded too, so that the sum does not depend on which rank an expert lives on.
    encoded = fp8.cast(rows, Scale.FLOAT32) if request.encoding is Encoding.fp8 else logfmt.encode(rows)
    return Outgoing(Payload(encoded.data, scale=encoded.scale), slices, counts)


def _decoded_rows(
    payload: Payload, received: Sequence[ReceivedRows], encoding: Encoding, allocator: Allocator
) -> Tensor:
    """Return the rows of all sources: as they were sent, or, if they were encoded, in float32."""
    rows = payload.gather_rows(received, allocator)
    if encoding is Encoding.same:
        return rows
    encoded = Quantized(rows, payload.gather_metadata(received)["scale"])
    return fp8.dequantize(encoded) if encoding is Encoding.fp8 else logfmt.decode(encoded)


def _sums_by_source(
    payload: Payload, received: Sequence[ReceivedRows], encoding: Encoding, allocator: Allocator
) -> Sequence[Tensor]:
    """Return the decoded rows of each source, without a copy if they were not encoded."""
    if encoding is Encoding.same:
        return [payload.view_rows(source) for source in received]
    return torch.split(_decoded_rows(payload, received, encoding, allocator), [each.num_rows for each in received])


def _finish(
    pending: Pending, stats: DecodeStats, work: Callable[[Sequence[ReceivedRows]], None], *, return_hook: bool
) -> Callable[[], None]:
    """Run the second half of a call now, or return a hook that runs it once."""
    done = False

    @torch.inference_mode()  # results, `out` and counters may come from inference mode, and be filled outside of it
    @without_autocast
    def hook() -> None:
        nonlocal done
        if done or pending.aborted:
            return
        with pending.receive(stats.wait_ns, tolerant=True, hooked=return_hook) as received:
            work(received)
        done = True

    if return_hook:
        return hook
    hook()
    return no_hook


def _arrange(
    result: DecodeDispatched[Tensor | Quantized],
    payload: Payload,
    received: Sequence[ReceivedRows],
    allocator: Allocator,
    *,
    first: int,
) -> None:
    """Fill the result of a decode dispatch with received rows; ``first`` is the first local expert."""
    plan = result.plan
    num_local, capacity = plan.src_token.shape
    metadata = payload.gather_metadata(received)
    local_idx = cpu_routing.to_local(metadata["topk_idx"], first, num_local)
    assigned = cpu_routing.assign(local_idx, num_local, 1, capacity)
    row_idx = assigned.row_idx
    row, slot = (row_idx >= 0).nonzero().unbind(1)
    expert, column = row_idx[row, slot] // capacity, row_idx[row, slot] % capacity

    target = result.x.data if isinstance(result.x, Quantized) else result.x
    ranges = [range(i * capacity, i * capacity + count) for i, count in enumerate(assigned.counts.tolist())]
    rows = payload.gather_rows(received, allocator)
    cpu_routing.expand_rows(rows, row_idx, ranges, target.view(-1, target.shape[-1]))
    if isinstance(result.x, Quantized):
        result.x.scale[expert, column] = metadata["scale"][row]
    if plan.row_weights is not None:
        weights = cpu_routing.scatter_weights(metadata["weights"], row_idx, num_local * capacity)
        plan.row_weights.copy_(weights.view(num_local, capacity))
    plan.src_token[expert, column] = metadata["token"][row, 0].int()
    result.expert_counts.copy_(assigned.counts)

    num_rows = torch.tensor([source.num_rows for source in received], dtype=torch.int64, device="cpu")
    src = torch.repeat_interleave(torch.arange(len(received), dtype=torch.int64, device="cpu"), num_rows)
    hits = cpu_routing.hits(local_idx, 1, num_local).long()
    counts = torch.zeros(len(received), num_local, dtype=torch.int64, device="cpu").index_add_(0, src, hits).T
    starts = counts.cumsum(1) - counts
    plan.src_range.copy_(starts << _COUNT_BITS | counts)


def _positions_from(plan: DecodePlan, src: int) -> Tensor:
    """Return the positions (expert * capacity + row) of the rows from one rank, by expert, then token."""
    capacity = plan.src_token.shape[1]
    ranges = plan.src_range[:, src]
    counts = ranges & ((1 << _COUNT_BITS) - 1)
    firsts = (ranges >> _COUNT_BITS) + torch.arange(ranges.numel(), dtype=torch.int64, device="cpu") * capacity
    before = counts.cumsum(0) - counts
    within = torch.arange(int(counts.sum()), dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(firsts - before, counts) + within


def _sum_per_token(flat: Tensor, plan: DecodePlan, positions: Tensor, allocator: Allocator) -> Tensor:
    """Return weighted sums of the rows at ``positions``, one per distinct token, by token.

    The experts of a token are added in order, and the sum is rounded once.
    """
    assert plan.row_weights is not None
    tokens, which, counts = torch.unique(plan.src_token.flatten()[positions], return_inverse=True, return_counts=True)
    # Build the table of each token's positions: sorted by token and, because the sort is stable, by expert within one.
    order = which.argsort(stable=True)
    which = which[order]
    column = torch.arange(which.numel(), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[which]
    most = int(counts.max()) if counts.numel() else 0
    row_idx = torch.full((tokens.numel(), most), -1, dtype=torch.int64, device="cpu")
    row_idx[which, column] = positions[order]
    weights = torch.zeros(row_idx.shape, dtype=torch.float32, device="cpu")
    weights[which, column] = plan.row_weights.flatten()[positions[order]]
    sums = flat.new_empty(tokens.numel(), flat.shape[1])
    cpu_routing.reduce_weighted(sums, flat, row_idx, weights, allocator)
    return sums


def _empty_like(rows: Tensor | Quantized, num_local: int, num_rows: int, allocator: Allocator) -> Tensor | Quantized:
    """Return undefined rows of a result; scales are column-major, so that a grouped FP8 GEMM can load them by TMA."""
    if not isinstance(rows, Quantized):
        return allocator.empty(num_local, num_rows, rows.shape[1], dtype=rows.dtype)
    data = allocator.empty(num_local, num_rows, rows.data.shape[1], dtype=rows.data.dtype)
    scale = allocator.empty(num_local, rows.scale.shape[1], num_rows, dtype=rows.scale.dtype)
    return Quantized(data, scale.transpose(1, 2))
