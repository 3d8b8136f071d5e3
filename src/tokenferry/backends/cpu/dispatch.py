"""Dispatch and redispatch of the CPU backend: send each row to the ranks of its experts and arrange what arrives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.allocator import Allocator
from tokenferry.backends.cpu.exchange import PLAN_FIELD, CallKind, Exchange, Signature
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.backends.cpu.route import Route
from tokenferry.backends.tensors import without_autocast
from tokenferry.errors import CapacityError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.layout import RowCapacity, row_capacity
from tokenferry.types import Dispatched, DispatchOptions, Layout, Plan, Quantized

LAYOUT_CODES = {Layout.ROWS: 0, Layout.EXPERTS: 1, Layout.MASKED: 2}
"""Values of the field "layout" of signatures."""


@dataclass(frozen=True, slots=True, eq=False)
class _Arrangement:
    """How received rows are delivered.

    Attributes:
        counts: ``[L]`` int64 rows of each expert.
        num_delivered: Rows of the result.
        needed: Rows that the capacity must cover (MASKED: of the fullest expert).
        row_idx: ``Plan.row_idx``.
    """

    counts: Tensor
    num_delivered: int
    needed: int
    row_idx: Tensor


@without_autocast
def dispatch(exchange: Exchange, route: Route, key: str, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
    """Make the plan and move the rows: each message says how many rows it holds."""
    shape, options, routing = request.shape, request.options, request.routing
    num_tokens, num_local = routing.topk_idx.shape[0], shape.num_experts // exchange.num_ranks
    dst_token, dst_counts = cpu_routing.destinations(routing.topk_idx, shape.num_experts, exchange.num_ranks)
    payload = _payload(
        request.x,
        weights=routing.topk_weights,
        topk_idx=routing.topk_idx,
        token=torch.arange(num_tokens, dtype=torch.int64, device="cpu"),
    )
    tokens = torch.split(dst_token, dst_counts.tolist())
    space = row_capacity(shape, options, exchange.num_ranks)
    with route.dispatch(_signature(request, payload), payload, tokens, num_local) as arrived:
        received = arrived.rows
        metadata = payload.gather_metadata(received)
        local_idx = cpu_routing.to_local(metadata["topk_idx"], exchange.rank * num_local, num_local)
        arrangement = _arrange(local_idx, num_local, options, space)
        plan = Plan(
            group_key=key,
            options=options,
            num_tokens=num_tokens,
            num_received=local_idx.shape[0] if options.counts == "host" else None,
            num_delivered=arrangement.num_delivered,
            dst_token=dst_token,
            dst_counts=dst_counts,
            src_token=metadata["token"][:, 0],
            src_counts=torch.tensor([source.num_rows for source in received], dtype=torch.int64, device="cpu"),
            topk_idx=local_idx,
            row_idx=arrangement.row_idx,
            expert_counts=arrangement.counts.int(),
            _places=arrived.relay,
            _call_number=exchange.last_call,
        )
        unlimited = options.counts == "host" and options.layout is not Layout.MASKED
        fits = arrangement.needed <= space.given or unlimited
        if fits:
            if options.counts == "device":
                plan = _padded(plan, space)
            result = _deliver(plan, payload, received, metadata, exchange.allocator)
    if space.tight:
        _check_capacity(exchange, options, space, 0 if fits else arrangement.needed)
    return result


@without_autocast
def redispatch(exchange: Exchange, route: Route, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
    """Move rows along a plan, whose counts are known."""
    plan = request.plan
    payload = _payload(request.x, weights=request.topk_weights)
    rows = request.x.data if isinstance(request.x, Quantized) else request.x
    fields = {PLAN_FIELD: plan._call_number, "dtype": dtype_code(rows.dtype), **payload.fields}
    signature = Signature(CallKind.redispatch, fields)
    with route.redispatch(signature, payload, plan) as arrived:
        metadata = payload.gather_metadata(arrived.rows)
        return _deliver(plan, payload, arrived.rows, metadata, exchange.allocator)


def _payload(x: Tensor | Quantized, **metadata: Tensor | None) -> Payload:
    rows, scale = (x.data, x.scale) if isinstance(x, Quantized) else (x, None)
    return Payload(rows, scale=scale, **metadata)


def _signature(request: DispatchRequest, payload: Payload) -> Signature:
    shape, options = request.shape, request.options
    rows = request.x.data if isinstance(request.x, Quantized) else request.x
    fields = {
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "max_tokens": shape.max_tokens,
        "layout": LAYOUT_CODES[options.layout],
        "alignment": options.alignment,
        "device counts": int(options.counts == "device"),
        "capacity": options.capacity or 0,
        "dtype": dtype_code(rows.dtype),
        **payload.fields,
    }
    return Signature(CallKind.dispatch, fields)


def _arrange(local_idx: Tensor, num_local: int, options: DispatchOptions, space: RowCapacity) -> _Arrangement:
    """Assign received rows their positions in the layout of the result."""
    num_rows = local_idx.shape[0]
    if options.layout is Layout.ROWS:
        counts = cpu_routing.hits(local_idx.long(), 1, num_local).sum(0)
        no_positions = torch.empty(0, local_idx.shape[1], dtype=torch.int64, device="cpu")
        num_delivered = num_rows if options.counts == "host" else space.given
        return _Arrangement(counts, num_delivered, num_rows, no_positions)
    masked = options.layout is Layout.MASKED
    assigned = cpu_routing.assign(local_idx, num_local, options.alignment, space.given if masked else None)
    if masked:
        fullest = int(assigned.counts.max())
        return _Arrangement(assigned.counts, num_local * space.given, fullest, assigned.row_idx)
    needed = int(assigned.starts[-1])
    num_delivered = needed if options.counts == "host" else space.given
    return _Arrangement(assigned.counts, num_delivered, needed, assigned.row_idx)


def _padded(plan: Plan, space: RowCapacity) -> Plan:
    """Pad the plan's tensors to shapes that do not depend on the routing."""
    has_positions = plan.options.layout is not Layout.ROWS
    return dataclasses.replace(
        plan,
        dst_token=cpu_routing.pad(plan.dst_token, plan.num_tokens * space.sent, 0),
        src_token=cpu_routing.pad(plan.src_token, space.received, 0),
        topk_idx=cpu_routing.pad(plan.topk_idx, space.received, -1),
        row_idx=cpu_routing.pad(plan.row_idx, space.received, -1) if has_positions else plan.row_idx,
    )


def _deliver(
    plan: Plan,
    payload: Payload,
    received: Sequence[ReceivedRows],
    metadata: dict[str, Tensor],
    allocator: Allocator,
) -> Dispatched[Tensor | Quantized]:
    """Copy received rows and their metadata to the positions in the plan."""
    options, layout = plan.options, plan.options.layout
    num_local, num_delivered = plan.expert_counts.numel(), plan.num_delivered
    counts = plan.expert_counts.tolist()
    starts = cpu_routing.expert_starts(plan.expert_counts, options.alignment)
    if layout is Layout.ROWS:
        rows = payload.gather_rows(received, allocator, num_delivered)
        metadata = {name: cpu_routing.pad(piece, num_delivered) for name, piece in metadata.items()}
        if "weights" in metadata:
            metadata["weights"] = torch.where(plan.topk_idx >= 0, metadata["weights"], 0.0)
    else:
        if layout is Layout.MASKED:
            starts = torch.arange(num_local + 1, dtype=torch.int64, device="cpu") * (num_delivered // num_local)
        ranges = [range(first, first + count) for first, count in zip(starts.tolist(), counts, strict=False)]
        row_idx = plan.row_idx[: sum(source.num_rows for source in received)]

        def expand(piece: Tensor) -> Tensor:
            out = allocator.empty(num_delivered, piece.shape[1], dtype=piece.dtype)
            cpu_routing.expand_rows(piece, row_idx, ranges, out)
            if options.zero_padding:
                cpu_routing.zero_padding(ranges, out)
            return out

        rows = expand(payload.gather_rows(received, allocator))
        if "scale" in metadata:
            metadata["scale"] = expand(metadata["scale"])
        if "weights" in metadata:
            metadata["weights"] = cpu_routing.scatter_weights(metadata["weights"], row_idx, num_delivered)
    if layout is Layout.MASKED:
        by_expert = (num_local, num_delivered // num_local)
        rows = rows.view(*by_expert, *rows.shape[1:])
        pieces = {name: metadata[name] for name in ("scale", "weights") if name in metadata}
        metadata = {name: piece.view(*by_expert, *piece.shape[1:]) for name, piece in pieces.items()}
    return Dispatched(
        x=Quantized(rows, metadata["scale"]) if "scale" in metadata else rows,
        topk_idx=plan.topk_idx if layout is Layout.ROWS else None,
        topk_weights=metadata.get("weights"),
        expert_counts=plan.expert_counts,
        expert_offsets=starts.int() if layout is Layout.EXPERTS else None,
        host_counts=tuple(counts) if options.counts == "host" else None,
        plan=plan,
    )


def _check_capacity(exchange: Exchange, options: DispatchOptions, space: RowCapacity, needed: int) -> None:
    """Exchange the rows that did not fit (0: all fit), so that either all ranks raise or none; collective."""
    num_ranks, nothing = exchange.num_ranks, Payload(torch.empty(0, 0, dtype=torch.uint8, device="cpu"))
    verdict = Outgoing(nothing, [slice(0, 0)] * num_ranks, [needed] * num_ranks)
    pending = exchange.start(Signature(CallKind.capacity_check, {}), verdict)
    with pending.receive() as received:
        needs = [source.num_rows for source in received]
    if max(needs) > space.given:
        worst = needs.index(max(needs))
        where = f"{'an expert of ' if options.layout is Layout.MASKED else ''}rank {worst}"
        raise CapacityError(
            f"dispatch: options.capacity: {where} received {max(needs)} rows, "
            f"capacity={space.given}; raise it, or leave it out for the worst case of {space.worst}"
        )
