"""Templates of the kernels of dispatch and combine: one function for each, which fills in what calls of a form share.

What differs from call to call is written by the ``pack`` of a template, in the order of the packers below, which are
checked against the params structs when this module is imported; see `tokenferry.backends.cuda.context.call_packer` for
the values that come before those named here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.cuda.context import Context, LaunchTemplate, call_packer
from tokenferry.errors import ShapeError
from tokenferry.jit.kernel import KernelSpec
from tokenferry.jit.params import Packer
from tokenferry.kernels.codes import PIECE_BYTES, ROWS, TYPES
from tokenferry.kernels.combine_pull import spec as pull_spec
from tokenferry.kernels.combine_push import spec as push_spec
from tokenferry.kernels.control_block import COMBINE_WEIGHTS_WORD, RECV_ROW_IDX_WORD, ROWS_AT_WORD
from tokenferry.kernels.dispatch import spec as dispatch_spec
from tokenferry.kernels.dispatch_assign import spec as assign_spec
from tokenferry.kernels.dispatch_expand import spec as expand_spec
from tokenferry.kernels.dispatch_fused import spec as fused_spec
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.kernels.stage_input import spec as stage_spec

WIDEST_SCALE = 8
"""Bytes of the widest scales that lanes copy one by one."""

_NOTIFY = call_packer(
    notify_spec.SPEC,
    "topk_idx", "table", "bases", "dst_counts", "src_counts", "expert_counts", "expert_offsets",
    "sizes", "num_tokens",
)  # fmt: skip
_ASSIGN = call_packer(
    assign_spec.SPEC,
    "topk_idx", "table", "bases", "dst_counts", "places", "dst_token", "num_tokens",
)  # fmt: skip
_DISPATCH = call_packer(
    dispatch_spec.SPEC,
    "x", "scale", "weights", "topk_idx", "places", "rows_out", "rows_in", "scale_row_stride", "scale_stride",
    "tokens", "num_tokens",
    last_offset=RECV_ROW_IDX_WORD,
)  # fmt: skip
_FUSED = call_packer(
    fused_spec.SPEC,
    "x", "scale", "weights", "topk_idx", "table", "bases", "dst_counts", "src_counts", "expert_counts",
    "expert_offsets", "places", "dst_token", "scale_row_stride", "scale_stride", "num_tokens",
    last_offset=RECV_ROW_IDX_WORD,
)  # fmt: skip
_EXPAND = call_packer(
    expand_spec.SPEC,
    "rows", "scale", "weights", "row_idx", "src_counts", "expert_counts", "num_delivered",
)  # fmt: skip
_STAGE = call_packer(stage_spec.SPEC, "source", "to", "expert_counts", "src_counts")
_PULL = call_packer(
    pull_spec.SPEC,
    "table", "places", "out", "bias0", "bias1", "weights_out", "rows_out", "rows_in", "num_tokens",
    last_offset=COMBINE_WEIGHTS_WORD,
)  # fmt: skip
_PUSH = call_packer(
    push_spec.SPEC,
    "table", "places", "out", "bias0", "bias1", "weights_out", "rows_out", "rows_in", "num_tokens", "source", "pushers",
    "whole",
    last_offset=ROWS_AT_WORD,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanSizes:
    """Sizes that `dispatch_notify` and `dispatch_assign` need.

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


@dataclass(frozen=True, slots=True)
class RowKind:
    """The types and widths of what a dispatch sends.

    Attributes:
        dtype: dtype of the rows.
        columns: Elements of a row.
        scale_dtype: dtype of the scales; None without them.
        scale_columns: Scales of a row, S.
        bulk_scale: Whether the scales of a row lie side by side, so that they travel with it; else they are copied one
            by one.
        weighted: Whether weights are sent.
        topk_dtype: dtype of ``topk_idx``; None where it is not sent, along an existing plan.
        top_k: Experts of a token, K.
    """

    dtype: torch.dtype
    columns: int
    scale_dtype: torch.dtype | None
    scale_columns: int
    bulk_scale: bool
    weighted: bool
    topk_dtype: torch.dtype | None
    top_k: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.columns * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a row."""
        return 0 if self.scale_dtype is None else self.scale_columns * self.scale_dtype.itemsize


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def notify_template(context: Context, sizes: PlanSizes, top_k: int, *, wide: bool) -> LaunchTemplate:
    """Return a template of `dispatch_notify`; ``wide``: ``topk_idx`` is int64."""
    template = context.new_template(notify_spec.SPEC, _NOTIFY, wide=int(wide))
    p = template.params
    p.host = context.pinned.host_address
    p.top_k, p.num_experts, p.layout = top_k, sizes.num_experts, sizes.layout
    p.alignment, p.capacity, p.row_limit = sizes.alignment, sizes.capacity, sizes.row_limit
    p.segments, p.segment_units = 1, notify_spec.ONE_SEGMENT
    template.block = notify_spec.THREADS
    template.smem_bytes = notify_spec.smem_bytes(sizes.num_experts, context.num_ranks)
    return template


def assign_template(context: Context, sizes: PlanSizes, top_k: int, *, wide: bool) -> LaunchTemplate:
    """Return a template of `dispatch_assign`; ``wide``: ``topk_idx`` is int64."""
    template = context.new_template(assign_spec.SPEC, _ASSIGN, wide=int(wide))
    p = template.params
    p.top_k, p.num_experts, p.by_expert = top_k, sizes.num_experts, sizes.layout != ROWS
    p.segments, p.segment_units = 1, notify_spec.ONE_SEGMENT
    template.block = assign_spec.THREADS
    template.smem_bytes = notify_spec.smem_bytes(sizes.num_experts, context.num_ranks)
    return template


def dispatch_template(context: Context, kind: RowKind, num_local: int, *, by_expert: bool) -> LaunchTemplate:
    """Return a template of `dispatch`; ``num_local``: number of local experts, L."""
    template = context.new_template(dispatch_spec.SPEC, _DISPATCH)
    p = template.params
    _set_rows(context, p, kind, num_local, by_expert=by_expert)
    rings = _set_rings(p, kind, dispatch_spec.cut, context.dynamic_bytes(dispatch_spec.SPEC))
    p.wide = kind.topk_dtype is torch.int64
    template.block, template.smem_bytes = rings.warps * 32, rings.smem_bytes
    return template


def fused_template(context: Context, kind: RowKind, sizes: PlanSizes, num_local: int) -> LaunchTemplate:
    """Return a template of `dispatch_fused`, which does what notify, assign and dispatch do."""
    wide, num_ranks = kind.topk_dtype is torch.int64, context.num_ranks
    template = context.new_template(fused_spec.SPEC, _FUSED, wide=int(wide))
    p = template.params
    _set_rows(context, p, kind, num_local, by_expert=sizes.layout != ROWS)
    p.host = context.pinned.host_address
    p.num_experts, p.layout, p.alignment = sizes.num_experts, sizes.layout, sizes.alignment
    p.capacity, p.row_limit = sizes.capacity, sizes.row_limit
    p.segments, p.segment_units = 1, notify_spec.ONE_SEGMENT
    p.rings_at = fused_spec.rings_at(sizes.num_experts, num_ranks)
    left = context.dynamic_bytes(fused_spec.SPEC) - p.rings_at
    rings = _set_rings(p, kind, fused_spec.cut_rings, left)
    p.warps = rings.warps
    template.block, template.smem_bytes = fused_spec.THREADS, p.rings_at + rings.smem_bytes
    return template


def _set_rows(context: Context, p: Any, kind: RowKind, num_local: int, *, by_expert: bool) -> None:  # noqa: ANN401
    """Set the fields of a params struct that say what the rows are."""
    p.top_k, p.num_local, p.by_expert = kind.top_k, num_local, by_expert
    p.row_bytes = kind.row_bytes
    p.width = assign_spec.num_columns(context.num_ranks, kind.top_k, by_expert=by_expert)


def _set_rings(
    p: Any,  # noqa: ANN401
    kind: RowKind,
    cut: Callable[[int, int, int], dispatch_spec.Rings],
    room: int,
) -> dispatch_spec.Rings:
    """Set the fields of a params struct that say how rows and scales are copied; return the rings.

    Scales that lie side by side travel with their row, unless a ring would then have no room in shared memory.

    Raises:
        ShapeError: that is so, and a lane cannot copy such scales one by one.
    """
    rings = cut(kind.row_bytes, kind.scale_bytes if kind.bulk_scale else 0, room)
    bulk = kind.bulk_scale and rings.smem_bytes <= room
    p.bulk_scale_bytes = kind.scale_bytes if bulk else 0
    p.small_scale = int(kind.scale_bytes > 0 and not bulk)
    if p.small_scale:
        assert kind.scale_dtype is not None
        if kind.scale_dtype.itemsize > WIDEST_SCALE:
            raise ShapeError(
                f"dispatch: scale: rows of {kind.scale_bytes} bytes of {kind.scale_dtype} have no room in the shared "
                f"memory of this GPU; use a dtype of at most {WIDEST_SCALE} bytes, or fewer columns"
            )
        p.scale_size, p.num_scales = kind.scale_dtype.itemsize, kind.scale_columns
        rings = cut(kind.row_bytes, 0, room)
    p.piece_bytes, p.pitch, p.pieces, p.stages = rings.piece_bytes, rings.pitch, rings.pieces, rings.stages
    return rings


def expand_template(
    context: Context, kind: RowKind, num_local: int, *, alignment: int, capacity: int, zero_padding: bool
) -> LaunchTemplate:
    """Return a template of `dispatch_expand`; ``capacity``: rows of an expert (MASKED), else 0."""
    template = context.new_template(expand_spec.SPEC, _EXPAND)
    p = template.params
    p.row_bytes, p.scale_bytes, p.top_k, p.num_local = kind.row_bytes, kind.scale_bytes, kind.top_k, num_local
    p.alignment, p.capacity, p.zero = alignment, capacity, zero_padding
    p.num_sources = context.num_ranks
    template.block = expand_spec.THREADS
    return template


def stage_template(context: Context, num_local: int, capacity: int, row_bytes: int) -> LaunchTemplate:
    """Return a template of `stage_input` for rows ``[L, capacity, H]``."""
    template = context.new_template(stage_spec.SPEC, _STAGE)
    p = template.params
    p.num_local, p.capacity, p.row_bytes = num_local, capacity, row_bytes
    template.block = stage_spec.THREADS
    return template


def pull_template(context: Context, dtype: torch.dtype, columns: int, top_k: int) -> LaunchTemplate:
    """Return a template of `combine_pull`: peers' rows are fetched from where they lie by expert."""
    template = _combine_template(context, pull_spec.SPEC, _PULL, dtype, columns, top_k)
    warps = pull_spec.num_warps(context.dynamic_bytes(pull_spec.SPEC))
    template.block, template.smem_bytes = warps * 32, warps * pull_spec.WARP_BYTES
    return template


def push_template(context: Context, dtype: torch.dtype, columns: int, top_k: int) -> LaunchTemplate:
    """Return a template of `combine_push`: rows are pushed, or fetched by peers if they lie in the window."""
    template = _combine_template(context, push_spec.SPEC, _PUSH, dtype, columns, top_k)
    p = template.params
    smem_bytes = context.dynamic_bytes(push_spec.SPEC)
    p.width, rings = context.num_ranks, push_spec.cut(p.row_bytes, smem_bytes)
    template.block = push_spec.num_warps(smem_bytes) * 32
    p.row_pieces, p.piece_bytes, p.pitch = rings.pieces, rings.piece_bytes, rings.pitch
    p.stages, p.warps, template.smem_bytes = rings.stages, rings.warps, rings.smem_bytes
    return template


def _combine_template(
    context: Context, spec: KernelSpec, packer: Packer, dtype: torch.dtype, columns: int, top_k: int
) -> LaunchTemplate:
    template = context.new_template(spec, packer, type=TYPES[dtype])
    p = template.params
    by_expert = spec is pull_spec.SPEC
    p.table_stride = p.places_stride = assign_spec.num_columns(context.num_ranks, top_k, by_expert=by_expert)
    p.top_k = p.width = top_k
    p.row_bytes = columns * dtype.itemsize
    p.pieces = -(-p.row_bytes // PIECE_BYTES)
    return template
