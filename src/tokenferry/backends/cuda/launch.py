"""One function a kernel: from what a call knows to a params struct and a launch. Nothing here decides anything.

Host time counts: a whole eager call may cost 15 us. So params are kept for each geometry, with all that follows from it
filled in, and what differs from call to call lies side by side, to be packed in one go.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.jit.kernel import KernelSpec
from tokenferry.kernels.codes import PIECE_BYTES, TYPES
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.kernels.dispatch_expand import spec as expand_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.kernels.stage_input import spec as stage_spec
from tokenferry.tuning import num_pushers
from tokenferry.types import Plan

_OFFSETS = struct.Struct("<6I")
_COUNT = struct.Struct("<8QI")
_SEVEN = struct.Struct("<7Q")
_SUM = struct.Struct("<9Q")  # pull_spec.SUM_FIELDS
_PUSH = struct.Struct("<QII")


@dataclass(slots=True)
class Tables:
    """What `count` and `place` fill.

    Attributes:
        table: Address of ``[units, E + R]`` int32, in the allocation of ``places``.
        bases: Address of ``[2 * R + E]`` int32, likewise.
        dst_counts: ``[R]`` int64 rows to each rank.
        src_counts: ``[R]`` int64 rows from each rank.
        expert_counts: ``[L]`` int32.
        expert_offsets: EXPERTS: ``[L + 1]`` int32.
        places: ``[T, C]`` int32.
        dst_token: ``[T * min(K, R)]`` int64.
    """

    table: int
    bases: int
    dst_counts: Tensor
    src_counts: Tensor
    expert_counts: Tensor
    expert_offsets: Tensor | None
    places: Tensor
    dst_token: Tensor


@dataclass(slots=True)
class Payload:
    """What one rank's rows bring along; ``topk_idx`` in a first dispatch only."""

    rows: Tensor
    scale: Tensor | None
    weights: Tensor | None
    topk_idx: Tensor | None
    row_bytes: int
    scale_bytes: int


@dataclass(slots=True)
class RecvOffsets:
    """Where rows land in this rank's window, as offsets; 0 for what does not travel."""

    rows: int = 0
    scale: int = 0
    weights: int = 0
    ids: int = 0
    src_token: int = 0
    row_idx: int = 0


def address(tensor: Tensor | None) -> int:
    """Where a tensor begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def count(context: Context, call: Call, topk_idx: Tensor, tables: Tables, sizes: tuple[int, ...], num_sms: int) -> None:
    """Launch `count`; ``sizes``: E, layout, alignment, capacity, room."""
    num_tokens, top_k = topk_idx.shape
    wide = topk_idx.dtype is torch.int64
    key = (notify_spec.SPEC, wide, top_k, sizes)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(key, notify_spec.SPEC, wide=int(wide))
        p = template.params
        p.top_k = top_k
        p.num_experts, p.layout, p.alignment, p.capacity, p.room = sizes
        template.block = notify_spec.THREADS
        template.smem_bytes = notify_spec.smem_bytes(p.num_experts, context.num_ranks)
    context.address(template, call)
    _COUNT.pack_into(
        template.view,
        template.first,
        topk_idx.data_ptr(),
        tables.table,
        tables.bases,
        tables.dst_counts.data_ptr(),
        tables.src_counts.data_ptr(),
        tables.expert_counts.data_ptr(),
        address(tables.expert_offsets),
        context.pinned.host_address,
        num_tokens,
    )
    template.launch(max(1, min(notify_spec.num_units(num_tokens), num_sms)), call.stream)


def place(
    context: Context, call: Call, topk_idx: Tensor, tables: Tables, sizes: tuple[int, bool], num_sms: int
) -> None:
    """Launch `place`; ``sizes``: E, whether rows lie by expert."""
    num_experts, by_expert = sizes
    num_tokens, top_k = topk_idx.shape
    if not num_tokens:
        return
    wide = topk_idx.dtype is torch.int64
    key = (assign_spec.SPEC, wide, top_k, num_experts, by_expert)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(key, assign_spec.SPEC, wide=int(wide))
        p = template.params
        p.top_k, p.num_experts, p.by_expert = top_k, num_experts, by_expert
        template.block = assign_spec.THREADS
        template.smem_bytes = notify_spec.smem_bytes(num_experts, context.num_ranks)
    context.address(template, call)
    _SEVEN.pack_into(
        template.view,
        template.first,
        topk_idx.data_ptr(),
        tables.table,
        tables.bases,
        tables.dst_counts.data_ptr(),
        tables.places.data_ptr(),
        tables.dst_token.data_ptr(),
        num_tokens,
    )
    template.launch(min(notify_spec.num_units(num_tokens), num_sms), call.stream)


def _dispatch_template(
    context: Context, key: tuple[Any, ...], payload: Payload, geometry: tuple[int, int, bool]
) -> LaunchTemplate:
    template = context.new_template(key, dispatch_spec.SPEC)
    p, scale = template.params, payload.scale
    p.top_k, p.num_local, p.by_expert = geometry
    p.row_bytes = payload.row_bytes
    p.width = assign_spec.num_columns(context.num_ranks, p.top_k, by_expert=geometry[2])
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
    return template


def move(
    context: Context,
    call: Call,
    payload: Payload,
    route: tuple[Tensor, Tensor, Tensor],
    geometry: tuple[int, int, bool],
    recv: RecvOffsets,
    num_sms: int,
) -> None:
    """Launch `move`; ``route``: places, rows out, rows in; ``geometry``: K, L, by expert."""
    scale, index = payload.scale, payload.topk_idx
    scale_ptr = 0
    kind: tuple[Any, ...] | None = None
    if scale is not None and payload.scale_bytes:
        scale_ptr = scale.data_ptr()
        kind = (scale.shape[1], scale.stride(), scale.is_contiguous(), scale.element_size(), scale_ptr % 16)
    key = (dispatch_spec.SPEC, payload.row_bytes, kind, geometry, index is not None and index.dtype)
    template = context.templates.get(key) or _dispatch_template(context, key, payload, geometry)
    context.address(template, call)
    _OFFSETS.pack_into(
        template.view,
        template.offsets,
        recv.rows // OFFSET_BYTES,
        recv.scale // OFFSET_BYTES,
        recv.weights // OFFSET_BYTES,
        recv.ids // OFFSET_BYTES,
        recv.src_token // OFFSET_BYTES,
        recv.row_idx // OFFSET_BYTES,
    )
    _SEVEN.pack_into(
        template.view,
        template.first,
        payload.rows.data_ptr(),
        scale_ptr,
        address(payload.weights),
        address(index),
        route[0].data_ptr(),
        route[1].data_ptr(),
        route[2].data_ptr(),
    )
    template.params.num_tokens = payload.rows.shape[0]
    template.launch(num_sms, call.stream)


@dataclass(slots=True)
class Delivered:
    """Rows that have landed, as addresses, and how they are laid out.

    Attributes:
        rows: Address.
        scale: Address, or 0.
        weights: Address, or 0.
        num_rows: ``Plan.num_delivered``, or 0 where it ends with the last expert's last aligned row.
        row_bytes: Of a row.
        scale_bytes: Of its scales.
        alignment: A.
        capacity: MASKED: rows of an expert.
        zero: Whether padding is zeroed.
    """

    rows: int
    scale: int
    weights: int
    num_rows: int
    row_bytes: int
    scale_bytes: int
    alignment: int
    capacity: int
    zero: bool


def unpack(
    context: Context, call: Call, delivered: Delivered, plan: tuple[int, int, Tensor, Tensor], num_sms: int
) -> None:
    """Launch `unpack`; the plan's part: address of row_idx, K, src_counts, expert_counts."""
    row_idx, top_k, src_counts, expert_counts = plan
    key = (expand_spec.SPEC, top_k)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(key, expand_spec.SPEC)
        template.params.top_k = top_k
        template.block = expand_spec.THREADS
    p = template.params
    context.address(template, call)
    p.rows, p.scale, p.weights = delivered.rows, delivered.scale, delivered.weights
    p.row_idx, p.src_counts, p.expert_counts = row_idx, src_counts.data_ptr(), expert_counts.data_ptr()
    p.num_delivered, p.row_bytes, p.scale_bytes = delivered.num_rows, delivered.row_bytes, delivered.scale_bytes
    p.num_local, p.alignment = expert_counts.shape[0], delivered.alignment
    p.capacity, p.zero = delivered.capacity, delivered.zero
    template.launch(num_sms, call.stream)


def stage(context: Context, call: Call, source: Tensor, target: int, plan: Plan, num_sms: int) -> None:
    """Launch `stage` for ``source`` ``[L, capacity, H]``."""
    key = (stage_spec.SPEC,)
    template = context.templates.get(key)
    if template is None:
        template = context.new_template(key, stage_spec.SPEC)
        template.block = stage_spec.THREADS
    p = template.params
    context.address(template, call)
    p.source, p.to = source.data_ptr(), target
    p.src_counts, p.expert_counts = plan.src_counts.data_ptr(), plan.expert_counts.data_ptr()
    p.num_local, p.capacity, p.row_bytes = *source.shape[:2], source.shape[2] * source.element_size()
    template.launch(num_sms, call.stream)


@dataclass(slots=True)
class Sum:
    """What `pull` and `push` add up, and where they put it.

    Attributes:
        plan: Where the rows of each token are.
        out: ``[T, H]``.
        biases: What sums start from: up to two of ``[T, H]``.
        weights_out: ``[T, K]`` float32 for the weights that come home, or None.
    """

    plan: Plan
    out: Tensor
    biases: tuple[Tensor, ...]
    weights_out: Tensor | None


def pull(context: Context, call: Call, result: Sum, offsets: tuple[int, int], num_sms: int) -> None:
    """Launch `pull`; ``offsets``: where in this rank's window its rows and weights are."""
    template = _combine_template(context, pull_spec.SPEC, result)
    first = 2 * context.num_ranks + result.plan.topk_idx.shape[1]  # the columns `pull`
    _fill_combine(context, call, template, result, 4 * first)
    _OFFSETS.pack_into(
        template.view, template.offsets, offsets[0] // OFFSET_BYTES, offsets[1] // OFFSET_BYTES, 0, 0, 0, 0
    )
    template.launch(num_sms, call.stream)


def push(
    context: Context, call: Call, result: Sum, source: Tensor, offsets: tuple[int, int, int], num_sms: int
) -> None:
    """Launch `push` for ``source`` ``[N, H]``.

    ``offsets`` in this rank's window: where peers' rows land, its weights, and, if peers are to fetch them, its rows.
    """
    template = _combine_template(context, push_spec.SPEC, result)
    _fill_combine(context, call, template, result, 0)
    recv, weights, rows = offsets
    num_tokens, pieces = result.out.shape[0], -(-source.shape[1] * source.element_size() // PIECE_BYTES)
    pushers = 0 if rows or context.num_ranks == 1 else num_pushers(num_sms)
    whole = 0 if rows else push_spec.num_whole(num_tokens, pieces, max(1, num_sms - pushers))
    bits = push_spec.unit_bits(num_tokens)
    _PUSH.pack_into(template.view, template.first + _SUM.size, source.data_ptr(), pushers, whole)
    _OFFSETS.pack_into(
        template.view,
        template.offsets,
        recv // OFFSET_BYTES,
        weights // OFFSET_BYTES,
        0,
        bits,
        rows // OFFSET_BYTES,
        0,
    )
    template.launch(num_sms, call.stream)


def _combine_template(context: Context, spec: KernelSpec, result: Sum) -> LaunchTemplate:
    out, stride, top_k = result.out, result.plan.places.shape[1], result.plan.topk_idx.shape[1]
    key = (spec, out.dtype, out.shape[1], stride, top_k)
    found = context.templates.get(key)
    if found is not None:
        return found
    found = context.new_template(key, spec, type=TYPES[out.dtype])
    p = found.params
    p.table_stride = p.places_stride = stride
    p.top_k = top_k
    p.row_bytes = out.shape[1] * out.element_size()
    p.pieces = -(-p.row_bytes // PIECE_BYTES)
    found.block, found.smem_bytes = spec.max_threads, pull_spec.SMEM_BYTES
    p.width = top_k
    if spec is push_spec.SPEC:
        p.width, rings = context.num_ranks, push_spec.cut(p.row_bytes)
        p.row_pieces, p.piece_bytes, p.pitch = rings.pieces, rings.piece_bytes, rings.pitch
        p.stages, p.warps, found.smem_bytes = rings.stages, rings.warps, rings.smem_bytes
    return found


def _fill_combine(context: Context, call: Call, template: LaunchTemplate, result: Sum, before: int) -> None:
    """What `pull` and `push` have in common; ``before``: bytes of ``places`` before the columns of the table."""
    plan, biases, out, places = result.plan, result.biases, result.out, result.plan.places.data_ptr()
    context.address(template, call)
    _SUM.pack_into(
        template.view,
        template.first,
        places + before,
        places,
        out.data_ptr(),
        biases[0].data_ptr() if biases else 0,
        biases[1].data_ptr() if len(biases) > 1 else 0,
        address(result.weights_out),
        plan.src_counts.data_ptr(),
        plan.dst_counts.data_ptr(),
        out.shape[0],
    )
