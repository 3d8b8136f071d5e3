"""Dispatch and redispatch of the CUDA backend: blocks for received rows, and the kernels that send and arrange rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned, section_ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.launch import Expansion, Payload, RecvBuffers, Route, Tables
from tokenferry.backends.cuda.plan import LAYOUT_CODES, Counts, Geometry
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import ArgumentError, TokenferryError
from tokenferry.formats.dtypes import dtype_code
from tokenferry.kernels.codes import MASKED
from tokenferry.tuning import Topology, tune
from tokenferry.types import Dispatched, DispatchOptions, Layout, MoeShape, Plan, Quantized

_MAX_FORMS = 1024


@dataclass(frozen=True, slots=True)
class SmCounts:
    """SMs that the kernels of a call use.

    Attributes:
        links: Kernels that use the links between GPUs.
        local: Kernels that rearrange rows on this GPU.
    """

    links: int
    local: int


@dataclass(frozen=True, slots=True, eq=False)
class DispatchForm:
    """The parts that all dispatches with the same shape, options and kind of payload share.

    Attributes:
        signature: Signature of the calls.
        geometry: Geometry of the calls.
        sms: SMs of the kernels, unless the call sets ``num_sms``.
    """

    signature: Signature
    geometry: Geometry
    sms: SmCounts


@dataclass(frozen=True, slots=True, eq=False)
class RedispatchForm:
    """The parts that all redispatches with the same shape, layout and kind of payload share; see `DispatchForm`."""

    signature: Signature
    sms: SmCounts


class Dispatcher:
    """Dispatch and redispatch calls of one rank.

    Args:
        context: Context of this rank.
        allocator: Allocator of blocks of the heap.
        key: Key of the group, which its plans carry.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, key: str) -> None:
        self._context = context
        self._allocator = allocator
        self._key = key
        self._forms: BoundedDict[tuple[Any, ...], DispatchForm] = BoundedDict(_MAX_FORMS)
        self._redispatch_forms: BoundedDict[tuple[Any, ...], RedispatchForm] = BoundedDict(_MAX_FORMS)
        self._geometries: BoundedDict[tuple[MoeShape, DispatchOptions], Geometry] = BoundedDict(_MAX_FORMS)
        self._no_row_idx: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Make a plan and send rows along it; the rows bring the peers' half of the plan, too.

        If the heap has space for the worst case, rows are sent at once, and the host waits for the counts meanwhile.
        Otherwise it waits for the counts first, and takes blocks of the size that they need.
        """
        options, routing, context = request.options, request.routing, self._context
        index = routing.topk_idx
        payload = _payload(request.x, routing.topk_weights, index)
        key = (request.shape, options, *_kind(payload))
        form = self._forms.get(key) or self._new_form(key, request, payload)
        call = context.begin(form.signature)
        wants_counts = options.counts == "host"
        if wants_counts and call.capturing:
            raise ArgumentError(
                'dispatch: options: counts="host" waits for the device, which a CUDA graph cannot capture; '
                'use DispatchOptions(counts="device")'
            )
        sms = SmCounts(request.num_sms, request.num_sms) if request.num_sms else form.sms
        geometry = form.geometry
        counts = cuda_plan.at_most(geometry, index.shape[0])
        waits_first = wants_counts and not self._allocator.has_room_for_two(_worst_bytes(payload, index, geometry))
        # Taken before anything is sent: if the heap is full, the group is still whole.
        buffers = None if waits_first else self._recv_buffers(call, payload, geometry, counts)
        tables = cuda_plan.start(context, call, index, geometry, sms.links)
        if waits_first or (geometry.space.tight and not call.capturing):
            with context.breaking_off(TokenferryError):  # `wait` itself breaks the group, if the error calls for it
                exact = cuda_plan.wait(context, call, geometry)
            counts = exact if wants_counts else counts
        with context.breaking_off():  # from here on, peers wait for the rows of this rank
            buffers = buffers or self._recv_buffers(call, payload, geometry, counts)
            launch.dispatch(context, call, payload, tables.route, buffers, sms.links)
            if geometry.by_expert:
                expansion = _expansion(geometry, tables, counts, context.window.base + buffers.row_idx)
                launch.dispatch_expand(context, call, payload, buffers, expansion, sms.local)
        if wants_counts and counts.host is None:
            counts = cuda_plan.wait(context, call, geometry)
        return self._planned(payload, geometry, tables, counts, buffers)

    def _new_form(self, key: tuple[Any, ...], request: DispatchRequest, payload: Payload) -> DispatchForm:
        shape, options = request.shape, request.options
        signature = Signature(
            "dispatch",
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            max_tokens=shape.max_tokens,
            layout=LAYOUT_CODES[options.layout],
            alignment=options.alignment,
            device_counts=int(options.counts == "device"),
            capacity=options.capacity or 0,
            **_signature_fields(payload),
        )
        geometry = self._geometries.get((shape, options))
        if geometry is None:
            geometry = cuda_plan.geometry(shape, options, self._context.num_ranks)
            self._geometries[shape, options] = geometry
        form = self._forms[key] = DispatchForm(signature, geometry, self._tuned_sms(shape))
        return form

    def _recv_buffers(self, call: Call, payload: Payload, geometry: Geometry, counts: Counts) -> RecvBuffers:
        """Take the blocks of a dispatch.

        Raises:
            CapacityError: the heap is full.
        """
        index = payload.topk_idx
        assert index is not None
        N, K, by_expert = counts.received, index.shape[1], geometry.by_expert
        idx_end, token_end, end = section_ends(N * K * index.element_size(), N * 8, N * K * 8 if by_expert else 0)
        plan = self._allocator.call_block(call, end)
        # Rows come last: where there are fewer than expected, the memory behind them is given back.
        D = counts.delivered
        weights_end, scale_end, end = section_ends(
            0 if payload.weights is None else D * 4 * (1 if by_expert else K),
            D * payload.scale_bytes,
            D * payload.row_bytes,
        )
        rows, copy_out = self._allocator.recv_block(call, end)
        return RecvBuffers(
            block=rows,
            copy_out=copy_out,
            rows=rows.offset + scale_end,
            scale=rows.offset + weights_end,
            weights=rows.offset,
            plan_block=plan,
            topk_idx=plan.offset,
            src_token=plan.offset + idx_end,
            row_idx=plan.offset + token_end,
        )

    def _planned(
        self, payload: Payload, geometry: Geometry, tables: Tables, counts: Counts, buffers: RecvBuffers
    ) -> Dispatched[Tensor | Quantized]:
        """Return the result of a dispatch with its plan, and give back the memory that it did not need."""
        index, block = payload.topk_idx, buffers.plan_block
        assert index is not None
        assert block is not None
        N, K, allocator, route = counts.received, index.shape[1], self._allocator, tables.route
        dst_token, row_idx = tables.dst_token, self._no_row_idx.get(K)
        if counts.host is not None:  # else results have the size of the worst case
            block.trim(buffers.row_idx - block.offset + (N * K * 8 if geometry.by_expert else 0))
            buffers.block.trim(buffers.rows - buffers.block.offset + counts.delivered * payload.row_bytes)
            dst_token = dst_token[: counts.sent]
        if geometry.by_expert:
            row_idx = allocator.tensor(block, buffers.row_idx, (N, K), torch.int64)
        elif row_idx is None:
            row_idx = self._empty_row_idx(K)
        plan = Plan(
            self._key,
            geometry.options,
            index.shape[0],
            N if geometry.options.counts == "host" else None,
            counts.delivered,
            dst_token,
            route.dst_counts,
            allocator.tensor(block, buffers.src_token, (N,), torch.int64),
            route.src_counts,
            allocator.tensor(block, buffers.topk_idx, (N, K), index.dtype),
            row_idx,
            tables.expert_counts,
            route.places,
            counts.host,
        )
        return self._dispatched(buffers, payload, plan, tables.expert_offsets, counts.host)

    def _empty_row_idx(self, top_k: int) -> Tensor:
        """Return `Plan.row_idx` of ROWS: an empty tensor, which all plans share."""
        with torch.inference_mode(False):  # else no plan with it could be saved for a backward
            made = torch.empty(0, top_k, dtype=torch.int64, device=self._context.device)
        self._no_row_idx[top_k] = made
        return made

    # ------------------------------------------------------------------ redispatch

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Send rows along an existing plan."""
        plan, context = request.plan, self._context
        options, layout = plan.options, plan.options.layout
        payload = _payload(request.x, request.topk_weights, None)
        key = (request.shape, layout, *_kind(payload))
        form = self._redispatch_forms.get(key) or self._new_redispatch_form(key, request, payload)
        call = context.begin(form.signature)
        sms = SmCounts(request.num_sms, request.num_sms) if request.num_sms else form.sms
        K, L, D = plan.topk_idx.shape[1], plan.expert_counts.shape[0], plan.num_delivered
        by_expert = layout is not Layout.ROWS
        rows_end, scale_end, end = section_ends(
            D * payload.row_bytes,
            D * payload.scale_bytes,
            0 if payload.weights is None else D * 4 * (1 if by_expert else K),
        )
        block, copy_out = self._allocator.recv_block(call, end)
        start = block.offset
        buffers = RecvBuffers(block, copy_out, start, start + rows_end, start + scale_end)
        route = Route(plan._places, plan.dst_counts, plan.src_counts, K, L, by_expert)
        launch.dispatch(context, call, payload, route, buffers, sms.links)
        if by_expert:
            capacity = D // L if layout is Layout.MASKED else 0
            expansion = Expansion(
                route, plan.row_idx.data_ptr(), D, options.alignment, capacity, options.zero_padding, plan.expert_counts
            )
            launch.dispatch_expand(context, call, payload, buffers, expansion, sms.local)
        expert_offsets, host_counts = None, plan._host_counts
        if layout is Layout.EXPERTS:
            padded = (plan.expert_counts + options.alignment - 1) // options.alignment * options.alignment
            expert_offsets = torch.nn.functional.pad(padded.cumsum(0), (1, 0)).int()
        if host_counts is None and options.counts == "host":
            host_counts = tuple(plan.expert_counts.tolist())
        return self._dispatched(buffers, payload, plan, expert_offsets, host_counts)

    def _new_redispatch_form(
        self, key: tuple[Any, ...], request: RedispatchRequest, payload: Payload
    ) -> RedispatchForm:
        layout = LAYOUT_CODES[request.plan.options.layout]
        signature = Signature("redispatch", layout=layout, **_signature_fields(payload))
        form = self._redispatch_forms[key] = RedispatchForm(signature, self._tuned_sms(request.shape))
        return form

    # ------------------------------------------------------------------ both

    def _tuned_sms(self, shape: MoeShape) -> SmCounts:
        """Return the SMs of calls that do not set ``num_sms``."""
        context = self._context
        tuning = tune(shape, Topology(context.num_ranks, context.num_sms))
        return SmCounts(tuning.dispatch_sms, context.num_sms)

    def _dispatched(
        self,
        buffers: RecvBuffers,
        payload: Payload,
        plan: Plan,
        expert_offsets: Tensor | None,
        host_counts: tuple[int, ...] | None,
    ) -> Dispatched[Tensor | Quantized]:
        """Return a result over the rows that arrive in a block."""
        block = buffers.block
        D, allocator, by_rows = plan.num_delivered, self._allocator, plan.options.layout is Layout.ROWS
        rows = allocator.tensor(block, buffers.rows, (D, payload.rows.shape[1]), payload.rows.dtype)
        scale = weights = None
        if payload.scale is not None:
            scale = allocator.tensor(block, buffers.scale, (D, payload.scale.shape[1]), payload.scale.dtype)
        if payload.weights is not None:
            shape = (D, payload.weights.shape[1]) if by_rows else (D,)
            weights = allocator.tensor(block, buffers.weights, shape, torch.float32)
        if buffers.copy_out:
            with self._context.breaking_off():  # the rows are sent, and lost if there is no memory for the copy
                rows, scale, weights = rows.clone(), _clone(scale), _clone(weights)
        if plan.options.layout is Layout.MASKED:
            rows = shaped(rows, plan)
            scale = None if scale is None else shaped(scale, plan)
            weights = None if weights is None else shaped(weights, plan)
        return Dispatched(
            rows if scale is None else Quantized(rows, scale),
            plan.topk_idx if by_rows else None,
            weights,
            plan.expert_counts,
            expert_offsets,
            host_counts,
            plan,
        )


def shaped(tensor: Tensor, plan: Plan) -> Tensor:
    """Return ``[rows, ...]`` in the shape of the plan's layout."""
    if plan.options.layout is not Layout.MASKED:
        return tensor
    num_local = plan.expert_counts.numel()
    return tensor.view(num_local, plan.num_delivered // num_local, *tensor.shape[1:])


def _expansion(geometry: Geometry, tables: Tables, counts: Counts, row_idx: int) -> Expansion:
    """Return how the rows of a dispatch are laid out by expert; ``row_idx``: address of `Plan.row_idx`."""
    options = geometry.options
    ends_with_last_row = options.counts == "host" and geometry.layout != MASKED
    return Expansion(
        tables.route,
        row_idx,
        0 if ends_with_last_row else counts.delivered,
        options.alignment,
        geometry.sizes.capacity,
        options.zero_padding,
        tables.expert_counts,
    )


def _payload(x: Tensor | Quantized, weights: Tensor | None, topk_idx: Tensor | None) -> Payload:
    rows, scale = (x.data, x.scale) if isinstance(x, Quantized) else (x, None)
    if scale is not None and scale.element_size() > 8:  # a lane copies up to 8 bytes; wider ones are copied in bulk
        scale = aligned(scale.contiguous())
    return Payload(
        aligned(rows),
        scale,
        weights,
        topk_idx,
        rows.shape[1] * rows.element_size(),
        0 if scale is None else scale.shape[1] * scale.element_size(),
    )


def _kind(payload: Payload) -> tuple[Any, ...]:
    """Return a key that is equal for payloads with the same signature."""
    weights, index, scale = payload.weights, payload.topk_idx, payload.scale
    return (
        payload.rows.dtype,
        payload.row_bytes,
        payload.scale_bytes,
        scale is None,
        None if weights is None else weights.shape[1],
        None if index is None else index.dtype,
    )


def _signature_fields(payload: Payload) -> dict[str, int]:
    index, weights = payload.topk_idx, payload.weights
    return {
        "dtype": dtype_code(payload.rows.dtype),
        "bytes_of_rows": payload.row_bytes,
        "bytes_of_scale": payload.scale_bytes,
        "bytes_of_weights": 0 if weights is None else 4 * weights.shape[1],
        "bytes_of_topk_idx": 0 if index is None else index.shape[1] * index.element_size(),
    }


def _worst_bytes(payload: Payload, topk_idx: Tensor, geometry: Geometry) -> int:
    """Return the bytes that a dispatch needs in the worst case."""
    row = payload.row_bytes + payload.scale_bytes + (0 if payload.weights is None else 4 * payload.weights.shape[1])
    plan = 8 + topk_idx.shape[1] * (topk_idx.element_size() + (8 if geometry.by_expert else 0))
    return geometry.most_delivered * row + geometry.space.received * plan


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
