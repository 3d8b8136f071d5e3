"""The CPU backend: what the API promises, over a transport between processes."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.backends.base import (
    CombineRequest,
    DecodeCombineRequest,
    DecodeDispatchRequest,
    DispatchRequest,
    RedispatchRequest,
    Resolved,
)
from tokenferry.backends.cpu import decode
from tokenferry.backends.cpu import routing as cpu_routing
from tokenferry.backends.cpu.exchange import Exchange, Kind, Payload, Received, Signature
from tokenferry.errors import ArgumentError, BackendUnavailable, CapacityError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.layout import Room, Sections, room
from tokenferry.transports.rendezvous import meet
from tokenferry.types import (
    Combined,
    DecodeCombined,
    DecodeDispatched,
    Dispatched,
    DispatchOptions,
    Layout,
    MoeShape,
    Plan,
    Quantized,
)

_LAYOUTS = {Layout.ROWS: 0, Layout.EXPERTS: 1, Layout.MASKED: 2}


def make_cpu_backend(group: dist.ProcessGroup | None, resolved: Resolved) -> CpuBackend:
    """Meet the other ranks and return a backend; collective."""
    terms: dict[str, object] = {
        "shape": str(resolved.shape),
        "transport": resolved.transport,
        "on_timeout": "mask" if resolved.mask_on_timeout else "raise",
    }
    agreement = meet(group, resolved.transport, resolved.timeout_s, terms)
    if resolved.mask_on_timeout and agreement.transport.name == "process_group":
        raise BackendUnavailable(
            "ExpertGroup: on_timeout='mask' needs the transport 'shared_memory', this group has 'process_group' "
            f"({agreement.why}): after one timeout gloo closes all connections, so nobody can go on; use "
            "on_timeout='raise'"
        )
    exchange = Exchange(agreement.transport, resolved.timeout_s, mask_on_timeout=resolved.mask_on_timeout)
    return CpuBackend(exchange, agreement.key, agreement.why)


class CpuBackend:
    """The backend for tensors in main memory; see `tokenferry.backends.base.Backend`."""

    name = "cpu"
    checks_routing = False

    def __init__(self, exchange: Exchange, key: str, why: str) -> None:
        self.key = key
        self.why = why
        self.rank = exchange.rank
        self.num_ranks = exchange.num_ranks
        self.transport = exchange.transport.name if exchange.num_ranks > 1 else "none"
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
            self._exchange.take_back(rank)

    def close(self) -> None:
        """Free the transport."""
        self._exchange.close("was closed", linger=True)

    def warmup(self) -> None:
        """Nothing is compiled."""

    def synchronize(self) -> None:
        """Calls return with their work done."""

    def empty_rows(self, plan: Plan, dtype: torch.dtype, hidden: int) -> Tensor:
        """Rows in the shape of ``Dispatched.x``, undefined."""
        rows = self._exchange.allocator.empty(plan.num_delivered, hidden, dtype=dtype)
        if plan.options.layout is not Layout.MASKED:
            return rows
        num_local = plan.expert_counts.numel()
        return rows.view(num_local, plan.num_delivered // num_local, hidden)

    def plan_columns(self, shape: MoeShape, options: DispatchOptions) -> int:
        """Plans have no places."""
        return 0

    def new_traces(self, num_calls: int) -> Tensor | None:
        """There are no time stamps of calls on the CPU."""
        return None

    def set_trace(self, trace: Tensor | None) -> None:
        """Refuse a trace."""
        if trace is not None:
            raise BackendUnavailable("set_trace: backend 'cpu' has no time stamps of calls; use backend='cuda'")

    @torch.no_grad()
    def dispatch(self, request: DispatchRequest) -> Dispatched:
        """Make the plan and move the rows in one exchange: each message says how many rows it holds."""
        _no_sms("dispatch", request.num_sms)
        shape, options, routing = request.shape, request.options, request.routing
        num_tokens, num_local = routing.topk_idx.shape[0], shape.num_experts // self.num_ranks
        dst_token, dst_counts = cpu_routing.destinations(routing.topk_idx, shape.num_experts, self.num_ranks)
        rows, scale = _parts(request.x)
        payload = Payload(
            rows,
            scale=scale,
            weights=routing.topk_weights,
            topk_idx=routing.topk_idx,
            token=torch.arange(num_tokens),
        )
        fields = {
            "num_experts": shape.num_experts,
            "max_tokens": shape.max_tokens,
            "layout": _LAYOUTS[options.layout],
            "alignment": options.alignment,
            "device counts": int(options.counts == "device"),
            "capacity": options.capacity or 0,
            "dtype": dtype_code(rows.dtype),
            **payload.fields,
        }
        signature = Signature(Kind.dispatch, fields)
        send_counts = dst_counts.tolist()
        fill = payload.fill(torch.split(dst_token, send_counts), self.rank)
        pending = self._exchange.start(signature, payload.sections, send_counts, fill)
        space = room(shape, options, self.num_ranks)
        with pending.receive() as received:
            small = payload.take_small(received)
            local_idx = cpu_routing.to_local(small["topk_idx"], self.rank * num_local, num_local)
            counts, num_delivered, needed, row_idx = _arrange(local_idx, num_local, options, space)
            plan = Plan(
                group_key=self.key,
                options=options,
                num_tokens=num_tokens,
                num_received=local_idx.shape[0] if options.counts == "host" else None,
                num_delivered=num_delivered,
                dst_token=dst_token,
                dst_counts=dst_counts,
                src_token=small["token"][:, 0],
                src_counts=torch.tensor([num for num, _ in received]),
                topk_idx=local_idx,
                row_idx=row_idx,
                expert_counts=counts.int(),
                places=torch.empty(0, 0, dtype=torch.int32),
            )
            fits = needed <= space.given or (options.counts == "host" and options.layout is not Layout.MASKED)
            if fits:
                if options.counts == "device":
                    plan = _padded(plan, space)
                result = self._deliver(plan, payload, received, small)
        if space.tight:
            self._check_capacity(options, space, 0 if fits else needed)
        return result

    @torch.no_grad()
    def redispatch(self, request: RedispatchRequest) -> Dispatched:
        """Move rows along a plan; all counts are known."""
        _no_sms("redispatch", request.num_sms)
        plan = request.plan
        rows, scale = _parts(request.x)
        payload = Payload(rows, scale=scale, weights=request.topk_weights)
        counts = plan.dst_counts.tolist()
        tokens = torch.split(plan.dst_token[: sum(counts)], counts)
        signature = Signature(Kind.redispatch, {"dtype": dtype_code(rows.dtype), **payload.fields})
        pending = self._exchange.start(signature, payload.sections, counts, payload.fill(tokens, self.rank))
        with pending.receive() as received:
            pending.check_counts(received, plan.src_counts.tolist())
            return self._deliver(plan, payload, received, payload.take_small(received))

    @torch.no_grad()
    def combine(self, request: CombineRequest) -> Combined:
        """Send each row home, one per (token, rank), and add up what comes, in rank order."""
        _no_sms("combine", request.num_sms)
        y, plan, weights = request.y, request.plan, request.topk_weights
        src_counts = plan.src_counts.tolist()
        num_rows = sum(src_counts)
        row_idx = plan.row_idx[:num_rows]
        if plan.options.layout is Layout.ROWS:
            rows = y[:num_rows]
            weights = None if weights is None else weights[:num_rows]
        else:
            rows = cpu_routing.gather_sum(y.view(-1, y.shape[-1]), row_idx)
            weights = None if weights is None else cpu_routing.spread_weights(weights, row_idx)
        payload = Payload(rows, weights=weights)
        fields = {"layout": _LAYOUTS[plan.options.layout], "dtype": dtype_code(y.dtype), **payload.fields}
        ends = plan.src_counts.cumsum(0).tolist()
        slices = [slice(end - num, end) for end, num in zip(ends, src_counts, strict=True)]
        signature = Signature(Kind.combine, fields)
        # Rows that stay here are read where they are, unless the sums go over them.
        fill, copy_own = payload.fill(slices, self.rank), request.out is not None and _overlap(request.out, y)
        pending = self._exchange.start(signature, payload.sections, src_counts, fill, copy_own=copy_own)

        out = request.out
        if out is None:
            out = self._exchange.allocator.empty(plan.num_tokens, y.shape[-1], dtype=y.dtype)
        weight_sum = None
        dst_counts = plan.dst_counts.tolist()
        with pending.receive() as received:
            pending.check_counts(received, dst_counts)
            home = torch.split(plan.dst_token[: sum(dst_counts)], dst_counts)
            arrived = [payload.rows_of(*message) for message in received]
            cpu_routing.add_up(out, home, arrived, self._exchange.allocator, request.biases)
            if weights is not None:
                weight_sum = torch.empty(plan.num_tokens, weights.shape[1])
                slots = torch.split(payload.take_small(received)["weights"], dst_counts)
                cpu_routing.add_up(weight_sum, home, slots, self._exchange.allocator)
        return Combined(out, weight_sum)

    @torch.no_grad()
    def decode_dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched:
        """See `tokenferry.backends.cpu.decode`."""
        return decode.dispatch(self._exchange, self.key, request)

    @torch.no_grad()
    def decode_combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """See `tokenferry.backends.cpu.decode`."""
        return decode.combine(self._exchange, request)

    def _deliver(self, plan: Plan, payload: Payload, received: Received, small: dict[str, Tensor]) -> Dispatched:
        """Put received rows where the plan says."""
        options, layout, allocator = plan.options, plan.options.layout, self._exchange.allocator
        num_local, num_delivered = plan.expert_counts.numel(), plan.num_delivered
        counts = plan.expert_counts.tolist()
        starts = cpu_routing.expert_starts(plan.expert_counts, options.alignment)
        if layout is Layout.ROWS:
            rows = payload.take_rows(received, allocator, num_delivered)
            small = {name: cpu_routing.pad(piece, num_delivered) for name, piece in small.items()}
            if "weights" in small:
                small["weights"] = torch.where(plan.topk_idx >= 0, small["weights"], 0.0)
        else:
            if layout is Layout.MASKED:
                starts = torch.arange(num_local + 1) * (num_delivered // num_local)
            places = [range(first, first + count) for first, count in zip(starts.tolist(), counts, strict=False)]
            row_idx = plan.row_idx[: sum(num for num, _ in received)]

            def put(piece: Tensor) -> Tensor:
                out = allocator.empty(num_delivered, piece.shape[1], dtype=piece.dtype)
                cpu_routing.place(piece, row_idx, places, out)
                if options.zero_padding:
                    cpu_routing.zero_rest(places, out)
                return out

            rows = put(payload.take_rows(received, allocator))
            if "scale" in small:
                small["scale"] = put(small["scale"])
            if "weights" in small:
                small["weights"] = cpu_routing.add_weights(small["weights"], row_idx, num_delivered)
        if layout is Layout.MASKED:
            by_expert = (num_local, num_delivered // num_local)
            rows = rows.view(*by_expert, *rows.shape[1:])
            small = {n: small[n].view(*by_expert, *small[n].shape[1:]) for n in ("scale", "weights") if n in small}
        return Dispatched(
            x=Quantized(rows, small["scale"]) if "scale" in small else rows,
            topk_idx=plan.topk_idx if layout is Layout.ROWS else None,
            topk_weights=small.get("weights"),
            expert_counts=plan.expert_counts,
            expert_offsets=starts.int() if layout is Layout.EXPERTS else None,
            host_counts=tuple(counts) if options.counts == "host" else None,
            plan=plan,
        )

    def _check_capacity(self, options: DispatchOptions, space: Room, needed: int) -> None:
        """Tell each other who overflowed, so that all ranks raise or none; collective."""
        verdict = [needed] * self.num_ranks
        pending = self._exchange.start(Signature(Kind.capacity_check, {}), Sections(()), verdict, lambda *_: None)
        with pending.receive() as received:
            needs = [num for num, _ in received]
        if max(needs) > space.given:
            worst = needs.index(max(needs))
            per_expert = " per expert" if options.layout is Layout.MASKED else ""
            raise CapacityError(
                f"dispatch: options.capacity: rank {worst} received {max(needs)} rows{per_expert}, "
                f"capacity={space.given}; raise it, or leave it out for the worst case of {space.worst}"
            )


def _no_sms(call: str, num_sms: int | None) -> None:
    if num_sms is not None:
        raise ArgumentError(
            f"{call}: num_sms: expected None, got {num_sms}; the CPU backend has no SMs; leave num_sms out"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory, or may."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _parts(x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    return (x.data, x.scale) if isinstance(x, Quantized) else (x, None)


def _arrange(
    local_idx: Tensor, num_local: int, options: DispatchOptions, space: Room
) -> tuple[Tensor, int, int, Tensor]:
    """Return rows per expert ``[L]``, rows delivered, rows that had to fit into the room, and ``Plan.row_idx``."""
    num_rows = local_idx.shape[0]
    if options.layout is Layout.ROWS:
        counts = cpu_routing.hits(local_idx.long(), 1, num_local).sum(0)
        none = torch.empty(0, local_idx.shape[1], dtype=torch.int64)
        return counts, num_rows if options.counts == "host" else space.given, num_rows, none
    masked = options.layout is Layout.MASKED
    where = cpu_routing.spread(local_idx, num_local, options.alignment, space.given if masked else None)
    if masked:
        return where.counts, num_local * space.given, int(where.counts.max()), where.row_idx
    needed = int(where.starts[-1])
    return where.counts, needed if options.counts == "host" else space.given, needed, where.row_idx


def _padded(plan: Plan, space: Room) -> Plan:
    """Give the plan's tensors the shapes that they have whatever the routing."""
    return dataclasses.replace(
        plan,
        dst_token=cpu_routing.pad(plan.dst_token, plan.num_tokens * space.sent, 0),
        src_token=cpu_routing.pad(plan.src_token, space.received, 0),
        topk_idx=cpu_routing.pad(plan.topk_idx, space.received, -1),
        row_idx=plan.row_idx
        if plan.options.layout is Layout.ROWS
        else cpu_routing.pad(plan.row_idx, space.received, -1),
    )
