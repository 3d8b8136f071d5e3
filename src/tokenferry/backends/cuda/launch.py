"""Launches of the kernels of dispatch and combine: one function for each, which fills a params struct and enqueues it.

The functions are named for their kernels, and decide nothing.

Host time matters: a whole eager call may take 15 us. So one template is kept for each geometry, with everything that
follows from the geometry filled in. The other fields are written by packers, which are checked against the params
struct when this module is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Packer
from tokenferry.kernels.codes import PIECE_BYTES, ROWS, TYPES
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.kernels.dispatch_expand import spec as expand_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.kernels.stage_input import spec as stage_spec
from tokenferry.memory.heap import Block
from tokenferry.tuning import num_pushers
from tokenferry.types import Plan

_NOTIFY = Packer(
    notify_spec.SPEC.params.struct,
    "topk_idx", "table", "bases", "dst_counts", "src_counts", "expert_counts", "expert_offsets",
)  # fmt: skip
_NOTIFY_REST = Packer(notify_spec.SPEC.params.struct, "num_tokens")
_ASSIGN = Packer(
    assign_spec.SPEC.params.struct,
    "topk_idx", "table", "bases", "dst_counts", "places", "dst_token", "num_tokens",
)  # fmt: skip
_DISPATCH = Packer(
    dispatch_spec.SPEC.params.struct,
    "x", "scale", "weights", "topk_idx", "places", "rows_out", "rows_in",
)  # fmt: skip
_DISPATCH_REST = Packer(dispatch_spec.SPEC.params.struct, "num_tokens")
_EXPAND = Packer(
    expand_spec.SPEC.params.struct,
    "rows", "scale", "weights", "row_idx", "src_counts", "expert_counts", "num_delivered", "row_bytes", "scale_bytes",
    "top_k", "num_local", "alignment", "capacity", "zero",
)  # fmt: skip
_STAGE = Packer(
    stage_spec.SPEC.params.struct,
    "source", "to", "expert_counts", "src_counts", "num_local", "capacity", "row_bytes",
)  # fmt: skip
_PULL, _PUSH = (
    Packer(
        spec.params.struct,
        "table", "places", "out", "bias0", "bias1", "weights_out", "rows_out", "rows_in", "num_tokens",
    )
    for spec in (pull_spec.SPEC, push_spec.SPEC)
)  # fmt: skip
_PUSH_REST = Packer(push_spec.SPEC.params.struct, "source", "pushers", "whole")


@dataclass(frozen=True, slots=True, eq=False)
class PlanSizes:
    """Sizes that `dispatch_notify` and `dispatch_assign` need; one object for each geometry, and templates by object.

    Attributes:
        num_experts: Number of experts, E.
        layout: The code of the layout: ROWS, EXPERTS or MASKED.
        alignment: Multiple to which the rows of each expert are padded, A.
        capacity: MASKED: rows of an expert; else 0.
        row_limit: Most rows that a rank may receive.
    """

    num_experts: int
    layout: int
    alignment: int
    capacity: int
    row_limit: int


@dataclass(slots=True)
class Route:
    """The destinations of the rows of a dispatch.

    Attributes:
        places: ``[T, C]`` int32, as `dispatch_assign` writes it.
        dst_counts: ``[R]`` int64 rows to each rank.
        src_counts: ``[R]`` int64 rows from each rank.
        top_k: Experts of a token, K.
        num_local: Number of local experts, L.
        by_expert: Whether rows lie by expert.
    """

    places: Tensor
    dst_counts: Tensor
    src_counts: Tensor
    top_k: int
    num_local: int
    by_expert: bool


@dataclass(slots=True)
class Tables:
    """Tensors and memory that `dispatch_notify` and `dispatch_assign` fill.

    Attributes:
        route: Destinations of the rows.
        table: Address of ``[units, E + R]`` int32, in the allocation of ``route.places``.
        bases: Address of ``[2 * R + E]`` int32, likewise.
        expert_counts: ``[L]`` int32 rows of each local expert.
        expert_offsets: ``[L + 1]`` int32, where the rows of each local expert begin; None unless EXPERTS.
        dst_token: ``[T * min(K, R)]`` int64 tokens of the rows sent, by destination.
    """

    route: Route
    table: int
    bases: int
    expert_counts: Tensor
    expert_offsets: Tensor | None
    dst_token: Tensor


@dataclass(slots=True)
class Payload:
    """Rows to send, with their scales, weights and, where a plan is made, their ``topk_idx``.

    Attributes:
        rows: ``[T, H]``, at a multiple of 16 bytes.
        scale: ``[T, S]``, or None.
        weights: ``[T, K]`` float32, or None.
        topk_idx: ``[T, K]``, or None.
        row_bytes: Bytes of a row.
        scale_bytes: Bytes of the scales of a row.
    """

    rows: Tensor
    scale: Tensor | None
    weights: Tensor | None
    topk_idx: Tensor | None
    row_bytes: int
    scale_bytes: int


@dataclass(slots=True)
class RecvBuffers:
    """Memory for the rows that a call receives: blocks, and where their parts begin, as offsets in this rank's window.

    Attributes:
        block: Holds rows, scales and weights.
        copy_out: Whether results have to leave the block at once.
        rows: Offset of the rows, in ``block``.
        scale: Offset of the scales, likewise.
        weights: Offset of the weights, likewise.
        plan_block: Holds the parts of the plan that peers write; None for a redispatch.
        topk_idx: Offset of `Plan.topk_idx`, in ``plan_block``.
        src_token: Offset of `Plan.src_token`, likewise.
        row_idx: Offset of `Plan.row_idx`, likewise.
    """

    block: Block
    copy_out: bool
    rows: int
    scale: int
    weights: int
    plan_block: Block | None = None
    topk_idx: int = 0
    src_token: int = 0
    row_idx: int = 0


@dataclass(slots=True)
class Expansion:
    """The layout by expert of rows that have arrived.

    Attributes:
        route: Destinations of the rows.
        row_idx: Address of ``[N, K]`` int64: where each row has been put.
        num_delivered: ``Plan.num_delivered``, or 0 where rows end with the last expert's last aligned row.
        alignment: Multiple to which the rows of each expert are padded, A.
        capacity: MASKED: rows of an expert; else 0.
        zero_padding: Whether padding is zeroed.
        expert_counts: ``[L]`` int32 rows of each local expert.
    """

    route: Route
    row_idx: int
    num_delivered: int
    alignment: int
    capacity: int
    zero_padding: bool
    expert_counts: Tensor


@dataclass(slots=True)
class Reduction:
    """The input and output of a combine, and the offsets at which peers find this rank's part of it.

    Offsets are those in the window; 0 for what does not lie there.

    Attributes:
        plan: Where the rows of each token are.
        out: ``[T, H]``, receives the sums.
        biases: Up to two tensors ``[T, H]``, from which the sums start.
        weights_out: ``[T, K]`` float32 for the weights that are sent back, or None.
        weights_offset: Offset of the weights that peers fetch.
        rows_offset: Offset of the rows that peers fetch.
        recv_offset: Offset of the memory for rows that peers push.
    """

    plan: Plan
    out: Tensor
    biases: tuple[Tensor, ...]
    weights_out: Tensor | None
    weights_offset: int
    rows_offset: int = 0
    recv_offset: int = 0


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dispatch_notify(
    context: Context, call: Call, topk_idx: Tensor, tables: Tables, sizes: PlanSizes, num_sms: int
) -> None:
    """Launch `dispatch_notify`."""
    num_tokens, top_k = topk_idx.shape
    wide = topk_idx.dtype is torch.int64
    key = (notify_spec.SPEC, wide, top_k, sizes)
    template = context.templates.get(key) or _notify_template(context, key, sizes, top_k, wide=wide)
    route = tables.route
    template.set_call(call)
    template.pack(
        topk_idx.data_ptr(),
        tables.table,
        tables.bases,
        route.dst_counts.data_ptr(),
        route.src_counts.data_ptr(),
        tables.expert_counts.data_ptr(),
        address(tables.expert_offsets),
    )
    template.pack_rest(num_tokens)
    template.launch(max(1, min(notify_spec.num_units(num_tokens), num_sms)), call.stream)


def _notify_template(
    context: Context, key: tuple[Any, ...], sizes: PlanSizes, top_k: int, *, wide: bool
) -> LaunchTemplate:
    template = context.new_template(notify_spec.SPEC, wide=int(wide))
    p = template.params
    template.pack, template.pack_rest = _NOTIFY.bind(p), _NOTIFY_REST.bind(p)
    p.host = context.pinned.host_address
    p.top_k, p.num_experts, p.layout = top_k, sizes.num_experts, sizes.layout
    p.alignment, p.capacity, p.row_limit = sizes.alignment, sizes.capacity, sizes.row_limit
    template.block = notify_spec.THREADS
    template.smem_bytes = notify_spec.smem_bytes(sizes.num_experts, context.num_ranks)
    context.templates[key] = template
    return template


def dispatch_assign(
    context: Context, call: Call, topk_idx: Tensor, tables: Tables, sizes: PlanSizes, num_sms: int
) -> None:
    """Launch `dispatch_assign`."""
    num_tokens, top_k = topk_idx.shape
    if not num_tokens:
        return
    wide = topk_idx.dtype is torch.int64
    key = (assign_spec.SPEC, wide, top_k, sizes)
    template = context.templates.get(key) or _assign_template(context, key, sizes, top_k, wide=wide)
    route = tables.route
    template.set_call(call)
    template.pack(
        topk_idx.data_ptr(),
        tables.table,
        tables.bases,
        route.dst_counts.data_ptr(),
        route.places.data_ptr(),
        tables.dst_token.data_ptr(),
        num_tokens,
    )
    template.launch(min(notify_spec.num_units(num_tokens), num_sms), call.stream)


def _assign_template(
    context: Context, key: tuple[Any, ...], sizes: PlanSizes, top_k: int, *, wide: bool
) -> LaunchTemplate:
    template = context.new_template(assign_spec.SPEC, wide=int(wide))
    p = template.params
    template.pack = _ASSIGN.bind(p)
    p.top_k, p.num_experts, p.by_expert = top_k, sizes.num_experts, sizes.layout != ROWS
    template.block = assign_spec.THREADS
    template.smem_bytes = notify_spec.smem_bytes(sizes.num_experts, context.num_ranks)
    context.templates[key] = template
    return template


def dispatch(context: Context, call: Call, payload: Payload, route: Route, recv: RecvBuffers, num_sms: int) -> None:
    """Launch `dispatch`."""
    scale, index = payload.scale, payload.topk_idx
    scale_ptr = 0
    kind: tuple[Any, ...] | None = None
    if scale is not None and payload.scale_bytes:
        scale_ptr = scale.data_ptr()
        kind = (scale.shape[1], scale.stride(), scale.is_contiguous(), scale.element_size(), scale_ptr % 16)
    top_k, num_local, by_expert = route.top_k, route.num_local, route.by_expert
    key = (dispatch_spec.SPEC, payload.row_bytes, kind, top_k, num_local, by_expert, index is not None and index.dtype)
    template = context.templates.get(key) or _dispatch_template(context, key, payload, route)
    template.set_call(call)
    template.pack_offsets(
        recv.rows // OFFSET_BYTES,
        recv.scale // OFFSET_BYTES,
        recv.weights // OFFSET_BYTES,
        recv.topk_idx // OFFSET_BYTES,
        recv.src_token // OFFSET_BYTES,
        recv.row_idx // OFFSET_BYTES,
    )
    template.pack(
        payload.rows.data_ptr(),
        scale_ptr,
        address(payload.weights),
        address(index),
        route.places.data_ptr(),
        route.dst_counts.data_ptr(),
        route.src_counts.data_ptr(),
    )
    template.pack_rest(payload.rows.shape[0])
    template.launch(num_sms, call.stream)


def _dispatch_template(context: Context, key: tuple[Any, ...], payload: Payload, route: Route) -> LaunchTemplate:
    template = context.new_template(dispatch_spec.SPEC)
    p, scale = template.params, payload.scale
    template.pack, template.pack_rest = _DISPATCH.bind(p), _DISPATCH_REST.bind(p)
    p.top_k, p.num_local, p.by_expert = route.top_k, route.num_local, route.by_expert
    p.row_bytes = payload.row_bytes
    p.width = assign_spec.num_columns(context.num_ranks, route.top_k, by_expert=route.by_expert)
    p.bulk_scale_bytes = p.small_scale = 0
    if scale is not None and payload.scale_bytes:
        if payload.scale_bytes % 16 == 0 and scale.data_ptr() % 16 == 0 and scale.is_contiguous():
            p.bulk_scale_bytes = payload.scale_bytes
        else:
            p.small_scale, p.scale_size, p.num_scales = 1, scale.element_size(), scale.shape[1]
            p.scale_row_stride, p.scale_stride = scale.stride()
    p.wide = payload.topk_idx is not None and payload.topk_idx.dtype is torch.int64
    rings = dispatch_spec.cut(payload.row_bytes, p.bulk_scale_bytes)
    p.piece_bytes, p.pitch, p.pieces, p.stages = rings.piece_bytes, rings.pitch, rings.pieces, rings.stages
    template.block, template.smem_bytes = rings.warps * 32, rings.smem_bytes
    context.templates[key] = template
    return template


def dispatch_expand(
    context: Context, call: Call, payload: Payload, recv: RecvBuffers, expansion: Expansion, num_sms: int
) -> None:
    """Launch `dispatch_expand` for the rows that have arrived in ``recv``."""
    key = (expand_spec.SPEC,)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(expand_spec.SPEC)
        template.pack = _EXPAND.bind(template.params)
        template.block = expand_spec.THREADS
        context.templates[key] = template
    base, route = context.window.base, expansion.route
    template.set_call(call)
    template.pack(
        base + recv.rows,
        base + recv.scale if payload.scale_bytes else 0,
        0 if payload.weights is None else base + recv.weights,
        expansion.row_idx,
        route.src_counts.data_ptr(),
        expansion.expert_counts.data_ptr(),
        expansion.num_delivered,
        payload.row_bytes,
        payload.scale_bytes,
        route.top_k,
        route.num_local,
        expansion.alignment,
        expansion.capacity,
        expansion.zero_padding,
    )
    template.launch(num_sms, call.stream)


def stage_input(context: Context, call: Call, source: Tensor, target: int, plan: Plan, num_sms: int) -> None:
    """Launch `stage_input` for ``source`` ``[L, capacity, H]``; ``target`` is an address in the window."""
    key = (stage_spec.SPEC,)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(stage_spec.SPEC)
        template.pack = _STAGE.bind(template.params)
        template.block = stage_spec.THREADS
        context.templates[key] = template
    num_local, capacity, hidden = source.shape
    template.set_call(call)
    template.pack(
        source.data_ptr(),
        target,
        plan.expert_counts.data_ptr(),
        plan.src_counts.data_ptr(),
        num_local,
        capacity,
        hidden * source.element_size(),
    )
    template.launch(num_sms, call.stream)


def combine_pull(context: Context, call: Call, reduction: Reduction, num_sms: int) -> None:
    """Launch `combine_pull`: peers' rows are fetched from where they lie by expert."""
    template = _combine_template(context, pull_spec.SPEC, _PULL, reduction)
    first_column = 2 * context.num_ranks + reduction.plan.topk_idx.shape[1]  # of the columns for `combine_pull`
    _set_combine(template, call, reduction, 4 * first_column)
    template.pack_offsets(reduction.rows_offset // OFFSET_BYTES, reduction.weights_offset // OFFSET_BYTES, 0, 0, 0, 0)
    template.launch(num_sms, call.stream)


def combine_push(context: Context, call: Call, reduction: Reduction, y: Tensor, num_sms: int) -> None:
    """Launch `combine_push` for ``y`` ``[N, H]``: rows are pushed, or fetched by peers if they lie in the window."""
    template = _combine_template(context, push_spec.SPEC, _PUSH, reduction)
    _set_combine(template, call, reduction, 0)
    rows = reduction.rows_offset
    num_tokens, pieces = reduction.out.shape[0], -(-y.shape[1] * y.element_size() // PIECE_BYTES)
    pushers = 0 if rows or context.num_ranks == 1 else num_pushers(num_sms)
    whole = 0 if rows else push_spec.num_whole(num_tokens, pieces, max(1, num_sms - pushers))
    template.pack_rest(y.data_ptr(), pushers, whole)
    template.pack_offsets(
        reduction.recv_offset // OFFSET_BYTES,
        reduction.weights_offset // OFFSET_BYTES,
        0,
        push_spec.unit_bits(num_tokens),
        rows // OFFSET_BYTES,
        0,
    )
    template.launch(num_sms, call.stream)


def _combine_template(context: Context, spec: KernelSpec, packer: Packer, reduction: Reduction) -> LaunchTemplate:
    """Return the template of `combine_pull` or `combine_push`."""
    out, stride, top_k = reduction.out, reduction.plan._places.shape[1], reduction.plan.topk_idx.shape[1]
    key = (spec, out.dtype, out.shape[1], stride, top_k)
    found = context.templates.get(key)
    if found is not None:
        return found
    template = context.new_template(spec, type=TYPES[out.dtype])
    p = template.params
    template.pack = packer.bind(p)
    p.table_stride = p.places_stride = stride
    p.top_k = top_k
    p.row_bytes = out.shape[1] * out.element_size()
    p.pieces = -(-p.row_bytes // PIECE_BYTES)
    template.block, template.smem_bytes = spec.max_threads, pull_spec.SMEM_BYTES
    p.width = top_k
    if spec is push_spec.SPEC:
        template.pack_rest = _PUSH_REST.bind(p)
        p.width, rings = context.num_ranks, push_spec.cut(p.row_bytes)
        p.row_pieces, p.piece_bytes, p.pitch = rings.pieces, rings.piece_bytes, rings.pitch
        p.stages, p.warps, template.smem_bytes = rings.stages, rings.warps, rings.smem_bytes
    context.templates[key] = template
    return template


def _set_combine(template: LaunchTemplate, call: Call, reduction: Reduction, table_offset: int) -> None:
    """Write what `combine_pull` and `combine_push` have in common; ``table_offset``: bytes of ``places`` to skip."""
    plan, biases, out, places = reduction.plan, reduction.biases, reduction.out, reduction.plan._places.data_ptr()
    template.set_call(call)
    template.pack(
        places + table_offset,
        places,
        out.data_ptr(),
        biases[0].data_ptr() if biases else 0,
        biases[1].data_ptr() if len(biases) > 1 else 0,
        address(reduction.weights_out),
        plan.src_counts.data_ptr(),
        plan.dst_counts.data_ptr(),
        out.shape[0],
    )
