"""The CPU backend: what the API promises, over a wire between processes."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.backends import cpu_decode, cpu_rows
from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    RedispatchRequest,
    Resolved,
)
from tokenferry.backends.cpu_messages import Exchange, Kind, Payload, Received, Signature, dtype_code
from tokenferry.errors import BackendUnavailable, CapacityError
from tokenferry.layout import Room, Sections, room
from tokenferry.wires.rendezvous import meet
from tokenferry.words import Combined, DecodeCombined, DecodeDispatched, Delivery, Dispatched, Layout, Plan, Quantized

_LAYOUTS = {Layout.ROWS: 0, Layout.EXPERTS: 1, Layout.MASKED: 2}


def make_cpu_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> CpuBackend:
    """Meet the other ranks and return a backend; collective."""
    terms: dict[str, object] = {
        "shape": str(resolved.shape),
        "wire": resolved.wire,
        "on_timeout": "mask" if resolved.mask_on_timeout else "raise",
    }
    agreement = meet(group, resolved.wire, resolved.timeout_s, terms)
    if resolved.mask_on_timeout and agreement.wire.name == "group":
        raise BackendUnavailable(
            f"ExpertGroup: on_timeout='mask' needs the wire 'local', this group has 'group' ({agreement.why}): after "
            "one timeout gloo closes all connections, so nobody can go on; use on_timeout='raise'"
        )
    exchange = Exchange(agreement.wire, resolved.timeout_s, mask_on_timeout=resolved.mask_on_timeout)
    return CpuBackend(exchange, agreement.key, agreement.why)


class CpuBackend:
    """The backend for tensors in main memory; see `tokenferry.backends.base.Backend`."""

    name = "cpu"

    def __init__(self, exchange: Exchange, key: str, why: str) -> None:
        self.key = key
        self.why = why
        self.rank = exchange.rank
        self.num_ranks = exchange.num_ranks
        self.wire = exchange.wire.name if exchange.num_ranks > 1 else "none"
        self.device = torch.device("cpu")
        self._exchange = exchange

    @property
    def broken(self) -> str | None:
        """What ended the group, or None."""
        return self._exchange.broken

    def masked(self) -> frozenset[int]:
        """Ranks that decode calls skip."""
        return frozenset(self._exchange.masked)

    def mask(self, rank: int, *, masked: bool) -> None:
        """Skip a rank in decode calls, or stop skipping it."""
        if masked:
            self._exchange.mask(rank)
        else:
            self._exchange.masked.discard(rank)

    def close(self) -> None:
        """Free the wire."""
        self._exchange.close("was closed", linger=True)

    @torch.no_grad()
    def dispatch(self, request: DispatchRequest) -> Dispatched:
        """Make the plan and move the rows in one exchange: each message says how many rows it holds."""
        shape, delivery, routing = request.shape, request.delivery, request.routing
        num_tokens, num_local = routing.topk_idx.shape[0], shape.num_experts // self.num_ranks
        dst_token, dst_counts = cpu_rows.destinations(routing.topk_idx, shape.num_experts, self.num_ranks)
        rows, scale = _parts(request.x)
        payload = Payload(
            rows=rows,
            scale=scale,
            weights=routing.topk_weights,
            topk_idx=routing.topk_idx,
            token=torch.arange(num_tokens),
        )
        fields = {
            "num_experts": shape.num_experts,
            "max_tokens": shape.max_tokens,
            "layout": _LAYOUTS[delivery.layout],
            "alignment": delivery.alignment,
            "device counts": int(delivery.counts == "device"),
            "capacity": delivery.capacity or 0,
            "dtype": dtype_code(rows.dtype),
            **payload.fields,
        }
        signature = Signature(Kind.dispatch, fields)
        tokens = torch.split(dst_token, dst_counts.tolist())
        pending = self._exchange.start(signature, payload.sections, dst_counts.tolist(), payload.fill(tokens))
        space = room(shape, delivery, self.num_ranks)
        with pending.receive() as received:
            topk_idx, src_token = payload.take(received, "topk_idx"), payload.take(received, "token")
            assert topk_idx is not None
            assert src_token is not None
            local_idx = cpu_rows.to_local(topk_idx, self.rank * num_local, num_local)
            counts, num_delivered, needed, row_idx = _arrange(local_idx, num_local, delivery, space)
            plan = Plan(
                group_key=self.key,
                delivery=delivery,
                num_tokens=num_tokens,
                num_received=local_idx.shape[0] if delivery.counts == "host" else None,
                num_delivered=num_delivered,
                dst_token=dst_token,
                dst_counts=dst_counts,
                src_token=src_token[:, 0],
                src_counts=torch.tensor([num for num, _ in received]),
                topk_idx=local_idx,
                row_idx=row_idx,
                expert_counts=counts.int(),
            )
            fits = needed <= space.given or (delivery.counts == "host" and delivery.layout is not Layout.MASKED)
            if fits:
                if delivery.counts == "device":
                    plan = _padded(plan, space)
                result = _deliver(plan, request.x, payload, received)
        if space.tight:
            self._check_capacity(delivery, space, 0 if fits else needed)
        return result

    @torch.no_grad()
    def redispatch(self, request: RedispatchRequest) -> Dispatched:
        """Move rows along a plan; all counts are known."""
        plan = request.plan
        rows, scale = _parts(request.x)
        payload = Payload(rows=rows, scale=scale, weights=request.topk_weights)
        counts = plan.dst_counts.tolist()
        tokens = torch.split(plan.dst_token[: sum(counts)], counts)
        signature = Signature(Kind.redispatch, {"dtype": dtype_code(rows.dtype), **payload.fields})
        pending = self._exchange.start(signature, payload.sections, counts, payload.fill(tokens))
        with pending.receive() as received:
            pending.check_counts(received, plan.src_counts.tolist())
            return _deliver(plan, request.x, payload, received)

    @torch.no_grad()
    def combine(self, request: CombineRequest) -> Combined:
        """Send each row home, one per (token, rank), and add up what comes, in rank order."""
        y, plan, weights = request.y, request.plan, request.topk_weights
        src_counts = plan.src_counts.tolist()
        num_rows = sum(src_counts)
        row_idx = plan.row_idx[:num_rows]
        if plan.delivery.layout is Layout.ROWS:
            rows = y[:num_rows]
            weights = None if weights is None else weights[:num_rows]
        else:
            rows = cpu_rows.gather_sum(y.view(-1, y.shape[-1]), row_idx)
            weights = None if weights is None else cpu_rows.spread_weights(weights, row_idx)
        payload = Payload(rows=rows, weights=weights)
        fields = {"layout": _LAYOUTS[plan.delivery.layout], "dtype": dtype_code(y.dtype), **payload.fields}
        ends = plan.src_counts.cumsum(0).tolist()
        slices = [slice(end - num, end) for end, num in zip(ends, src_counts, strict=True)]
        signature = Signature(Kind.combine, fields)
        pending = self._exchange.start(signature, payload.sections, src_counts, payload.fill(slices))

        out = torch.empty(plan.num_tokens, y.shape[-1], dtype=y.dtype) if request.out is None else request.out
        weight_sum = None if weights is None else torch.empty(plan.num_tokens, weights.shape[1])
        dst_counts = plan.dst_counts.tolist()
        with pending.receive() as received:
            pending.check_counts(received, dst_counts)
            home = torch.split(plan.dst_token[: sum(dst_counts)], dst_counts)
            cpu_rows.add_up(out, home, [pieces[0].view(rows.dtype) for _, pieces in received], request.biases)
            if weight_sum is not None:
                cpu_rows.add_up(weight_sum, home, [pieces[1].view(torch.float32) for _, pieces in received])
        return Combined(out, weight_sum)

    @torch.no_grad()
    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched:
        """See `tokenferry.backends.cpu_decode`."""
        return cpu_decode.dispatch(self._exchange, self.key, request)

    @torch.no_grad()
    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `tokenferry.backends.cpu_decode`."""
        return cpu_decode.combine(self._exchange, request)

    def _check_capacity(self, delivery: Delivery, space: Room, needed: int) -> None:
        """Tell each other who overflowed, so that all ranks raise or none; collective."""
        verdict = [needed] * self.num_ranks
        pending = self._exchange.start(Signature(Kind.capacity_check, {}), Sections(()), verdict, lambda *_: None)
        with pending.receive() as received:
            needs = [num for num, _ in received]
        if max(needs) > space.given:
            worst = needs.index(max(needs))
            per_expert = " per expert" if delivery.layout is Layout.MASKED else ""
            raise CapacityError(
                f"dispatch: delivery.capacity: rank {worst} received {max(needs)} rows{per_expert}, "
                f"capacity={space.given}; raise it, or leave it out for the worst case of {space.worst}"
            )


def _parts(x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    return (x.data, x.scale) if isinstance(x, Quantized) else (x, None)


def _arrange(local_idx: Tensor, num_local: int, delivery: Delivery, space: Room) -> tuple[Tensor, int, int, Tensor]:
    """Return rows per expert ``[L]``, rows delivered, rows that had to fit into the room, and ``Plan.row_idx``."""
    masked = delivery.layout is Layout.MASKED
    where = cpu_rows.spread(local_idx, num_local, delivery.alignment, space.given if masked else None)
    if masked:
        return where.counts, num_local * space.given, int(where.counts.max()), where.row_idx
    needed = local_idx.shape[0] if delivery.layout is Layout.ROWS else int(where.starts[-1])
    row_idx = where.row_idx[:0] if delivery.layout is Layout.ROWS else where.row_idx
    return where.counts, needed if delivery.counts == "host" else space.given, needed, row_idx


def _padded(plan: Plan, space: Room) -> Plan:
    """Give the plan's tensors the shapes that they have whatever the routing."""
    return dataclasses.replace(
        plan,
        dst_token=cpu_rows.pad(plan.dst_token, plan.num_tokens * space.sent, 0),
        src_token=cpu_rows.pad(plan.src_token, space.received, 0),
        topk_idx=cpu_rows.pad(plan.topk_idx, space.received, -1),
        row_idx=plan.row_idx if plan.delivery.layout is Layout.ROWS else cpu_rows.pad(plan.row_idx, space.received, -1),
    )


def _deliver(plan: Plan, x: Tensor | Quantized, payload: Payload, received: Received) -> Dispatched:
    """Put received rows where the plan says."""
    delivery, layout = plan.delivery, plan.delivery.layout
    num_local = plan.expert_counts.numel()
    row_idx = plan.row_idx[: sum(num for num, _ in received)]

    def put(name: str) -> Tensor | None:
        if layout is Layout.ROWS:
            return payload.take(received, name, plan.num_delivered)
        piece = payload.take(received, name)
        if piece is None:
            return None
        piece = cpu_rows.place(piece, row_idx, plan.num_delivered, zero=delivery.zero_padding)
        return piece.view(num_local, len(piece) // num_local, piece.shape[1]) if layout is Layout.MASKED else piece

    rows, scale = put("rows"), put("scale")
    assert rows is not None
    if layout is Layout.ROWS:
        weights = put("weights")
        weights = None if weights is None else torch.where(plan.topk_idx >= 0, weights, 0.0)
    else:
        weights = payload.take(received, "weights")
        if weights is not None:
            weights = cpu_rows.add_weights(weights, row_idx, plan.num_delivered)
            weights = weights.view(num_local, -1) if layout is Layout.MASKED else weights
    starts = cpu_rows.expert_starts(plan.expert_counts, delivery.alignment).int()
    return Dispatched(
        x=Quantized(rows, scale) if isinstance(x, Quantized) and scale is not None else rows,
        topk_idx=plan.topk_idx if layout is Layout.ROWS else None,
        topk_weights=weights,
        expert_counts=plan.expert_counts,
        expert_offsets=starts if layout is Layout.EXPERTS else None,
        host_counts=tuple(plan.expert_counts.tolist()) if delivery.counts == "host" else None,
        plan=plan,
    )
