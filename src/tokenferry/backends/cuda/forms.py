"""Forms of dispatch and redispatch: what follows from sizes, options and dtypes, worked out once.

A form holds the signature of its calls, the places of all parts in memory, and the kernels, with their params filled in
but for what differs from call to call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.backends.cuda.plan import LAYOUT_CODES, Geometry
from tokenferry.backends.cuda.results import Arrivals, LazyPlan, PlanAddresses, PlanForm, PlanLayout, RowLayout
from tokenferry.backends.cuda.signature import Signature
from tokenferry.formats.dtypes import dtype_code
from tokenferry.memory.heap import Block
from tokenferry.tuning import Machine, tune
from tokenferry.types import DispatchOptions, Layout, MoeShape

_MAX_LAYOUTS = 1024
"""Numbers of tokens, or rows, for which a form remembers where things lie."""
_MAX_GUESSES = 16


@dataclass(frozen=True, slots=True)
class Sms:
    """SMs that the kernels of a call use.

    Attributes:
        links: Kernels that use the links between GPUs.
        local: Kernels that rearrange rows on this GPU.
    """

    links: int
    local: int


class Scales(NamedTuple):
    """Scales in memory that no tensor describes.

    Attributes:
        address: Where they begin.
        row_stride: Scales between those of one row and of the next.
        stride: Scales between two of a row.
    """

    address: int
    row_stride: int
    stride: int


NO_SCALE = (0, 0, 0)
"""In place of an address and strides."""


class SendBuffers(NamedTuple):
    """Addresses of what a call sends.

    Attributes:
        rows: Address of the rows, ``[T, H]``, a multiple of 16.
        scale: The scales, ``[T, S]``, or None.
        weights: Address of the weights, ``[T, K]``, or 0.
        topk_idx: Address of ``topk_idx``, ``[T, K]``; 0 along an existing plan.
        tokens: Address of the number of each token on its source, ``[T]`` int32; 0: they are tokens of this rank.
    """

    rows: int
    scale: Tensor | Scales | None
    weights: int
    topk_idx: int
    tokens: int = 0


class RecvOffsets(NamedTuple):
    """Where this rank receives, as offsets in its window, in units of `OFFSET_BYTES`; 0: it does not receive that.

    Attributes:
        rows: Rows.
        scale: Scales.
        weights: Weights.
        topk_idx: `Plan.topk_idx`.
        src_token: `Plan.src_token`.
        row_idx: `Plan.row_idx`.
    """

    rows: int
    scale: int
    weights: int
    topk_idx: int = 0
    src_token: int = 0
    row_idx: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class DispatchForm:
    """What all dispatches with the same shape, options, types and ``num_sms`` share.

    Attributes:
        signature: Signature of the calls.
        geometry: Geometry of the calls.
        kind: Types and widths of the rows.
        sms: SMs of the kernels.
        plan: What the plans share.
        worst: Where rows lie if there are as many as possible.
        worst_arrivals: The same for the parts of a plan.
        layouts: Where the other parts of a plan lie, by T.
        notify: Kernel that counts and exchanges counts.
        assign: Kernel that computes places.
        move: Kernel that moves rows.
        fused: Kernel that does the work of these three, for few tokens.
        expand: Kernel that lays out rows by expert; None for ROWS.
        guessed: Forms with space for as many rows as are guessed, by that number; None where M says how many.
        waits: Whether results have exactly as many rows as arrive.
        unlimited: The form without the guess, if this is one of those.
    """

    signature: Signature
    geometry: Geometry
    kind: RowKind
    sms: Sms
    plan: PlanForm
    worst: RowLayout
    worst_arrivals: Arrivals
    layouts: BoundedDict[int, PlanLayout]
    notify: LaunchTemplate
    assign: LaunchTemplate
    move: LaunchTemplate
    fused: LaunchTemplate
    expand: LaunchTemplate | None
    guessed: BoundedDict[int, DispatchForm] | None
    waits: bool
    unlimited: DispatchForm | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RedispatchForm:
    """What all redispatches with the same shape, options, types and ``num_sms`` share; see `DispatchForm`."""

    signature: Signature
    kind: RowKind
    sms: Sms
    move: LaunchTemplate
    expand: LaunchTemplate | None
    layouts: BoundedDict[int, RowLayout]
    """Where rows lie, by their number."""


def new_dispatch_form(
    context: Context, key: str, shape: MoeShape, options: DispatchOptions, kind: RowKind, num_sms: int | None
) -> DispatchForm:
    """Return the form of a dispatch; ``key``: the key of the group.

    Raises:
        ConfigError, CapacityError: as `tokenferry.backends.cuda.plan.geometry`.
    """
    geometry = cuda_plan.within(cuda_plan.geometry(shape, options, context.num_ranks), kind, context.heap.num_bytes)
    K, L, by_expert = kind.top_k, geometry.num_local, geometry.by_expert
    assert kind.topk_dtype is not None
    wide = kind.topk_dtype is torch.int64
    worst = cuda_plan.row_layout(options.layout, kind, geometry.most_delivered)
    arrivals = cuda_plan.arrivals(geometry, geometry.space.received, K, kind.topk_dtype)
    return DispatchForm(
        dispatch_signature(geometry, kind, options.capacity or 0),
        geometry,
        kind,
        sms_of(context, shape, num_sms),
        PlanForm(key, options, context.num_ranks, L, K, kind.topk_dtype, context.device),
        worst,
        arrivals,
        BoundedDict(_MAX_LAYOUTS),
        launch.notify_template(context, geometry.sizes, K, wide=wide),
        launch.assign_template(context, geometry.sizes, K, wide=wide),
        launch.dispatch_template(context, kind, L, by_expert=by_expert),
        launch.fused_template(context, kind, geometry.sizes, L),
        expand_form(context, kind, L, options, geometry.sizes.capacity) if by_expert else None,
        BoundedDict(_MAX_GUESSES) if geometry.guesses else None,
        options.counts == "host",
    )


def guessed_form(context: Context, form: DispatchForm, num_rows: int) -> DispatchForm:
    """Return a form of the same calls that has space for a number of rows, which all ranks have guessed.

    The number is a part of the signature: ranks whose guesses differed would find it before any row moves.
    """
    geometry, kind = cuda_plan.limited(form.geometry, num_rows), form.kind
    limit = geometry.sizes.row_limit
    assert kind.topk_dtype is not None
    return replace(
        form,
        signature=dispatch_signature(geometry, kind, limit),
        geometry=geometry,
        worst=cuda_plan.row_layout(geometry.options.layout, kind, limit),
        worst_arrivals=cuda_plan.arrivals(geometry, limit, kind.top_k, kind.topk_dtype),
        notify=launch.notify_template(context, geometry.sizes, kind.top_k, wide=kind.topk_dtype is torch.int64),
        fused=launch.fused_template(context, kind, geometry.sizes, geometry.num_local),
        guessed=None,
        unlimited=form,
    )


def new_redispatch_form(
    context: Context,
    shape: MoeShape,
    options: DispatchOptions,
    kind: RowKind,
    num_local: int,
    capacity: int,
    num_sms: int | None,
) -> RedispatchForm:
    """Return the form of a redispatch along a plan of L local experts; ``capacity``: rows of an expert, or 0."""
    by_expert = options.layout is not Layout.ROWS
    return RedispatchForm(
        Signature("redispatch", layout=LAYOUT_CODES[options.layout], **signature_fields(kind)),
        kind,
        sms_of(context, shape, num_sms),
        launch.dispatch_template(context, kind, num_local, by_expert=by_expert),
        expand_form(context, kind, num_local, options, capacity) if by_expert else None,
        BoundedDict(_MAX_LAYOUTS),
    )


def row_kind(rows: Tensor, scale: Tensor | None, *, weighted: bool, topk_idx: Tensor | None, top_k: int) -> RowKind:
    """Return the types and widths of what a dispatch sends; ``topk_idx``: None along an existing plan."""
    topk_dtype = None if topk_idx is None else topk_idx.dtype
    if scale is None:
        return RowKind(rows.dtype, rows.shape[1], None, 0, False, weighted, topk_dtype, top_k)
    return RowKind(rows.dtype, rows.shape[1], scale.dtype, scale.shape[1], is_bulk(scale), weighted, topk_dtype, top_k)


def is_bulk(scale: Tensor) -> bool:
    """Return whether the scales of a row are copied as one piece."""
    return scale.shape[1] * scale.element_size() % 16 == 0 and scale.data_ptr() % 16 == 0 and scale.is_contiguous()


def move(
    template: LaunchTemplate,
    call: Call,
    num_sms: int,
    recv: RecvOffsets,
    payload: SendBuffers,
    plan: PlanAddresses,
) -> None:
    """Launch `dispatch`; ``recv``: where this rank receives rows, scales, weights and the parts of a plan."""
    # A function less in calls across nodes, for each node: their budgets are in tests/unit/test_across_calls.py.
    scale_at, row_stride, stride = NO_SCALE if payload.scale is None else scale_of(payload)
    template.pack(
        call.alive, call.number, call.signature.words, *recv,
        payload.rows, scale_at, payload.weights, payload.topk_idx, plan.places, plan.dst_counts, plan.src_counts,
        row_stride, stride, payload.tokens, plan.num_tokens,
    )  # fmt: skip
    template.launch(num_sms, call.stream)


def fuse(
    template: LaunchTemplate, call: Call, num_blocks: int, recv: RecvOffsets, payload: SendBuffers, plan: LazyPlan
) -> None:
    """Launch `dispatch_fused`, which makes a plan and sends rows along it."""
    layout, start = plan._layout, plan._block.address
    by_expert = plan._form.options.layout is Layout.EXPERTS
    scale_at, row_stride, stride = scale_of(payload)
    template.pack(
        call.alive, call.number, call.signature.words, *recv,
        payload.rows, scale_at, payload.weights, payload.topk_idx, start + layout.table, start + layout.bases,
        start + layout.dst_counts, start + layout.src_counts, start + layout.expert_counts,
        start + layout.expert_offsets if by_expert else 0, start + layout.places, start + layout.dst_token,
        row_stride, stride, layout.num_tokens,
    )  # fmt: skip
    template.launch(num_blocks, call.stream)


def scale_of(payload: SendBuffers) -> tuple[int, int, int]:
    """Return the address of the scales, and their strides."""
    scale = payload.scale
    if scale is None:
        return NO_SCALE
    if isinstance(scale, Scales):
        return scale
    if not scale.shape[1]:
        return NO_SCALE
    row_stride, stride = scale.stride()
    return scale.data_ptr(), row_stride, stride


def expand(
    template: LaunchTemplate,
    call: Call,
    num_sms: int,
    block: Block,
    layout: RowLayout,
    plan: PlanAddresses,
    num_delivered: int,
) -> None:
    """Launch `dispatch_expand` for rows in a block; ``num_delivered``: 0 where they end with the last aligned row."""
    start, kind = block.address, layout.kind
    template.pack(
        call.alive, call.number, call.signature.words,
        start + layout.rows, start + layout.scale if kind.scale_bytes else 0,
        start + layout.weights if kind.weighted else 0,
        plan.row_idx, plan.src_counts, plan.expert_counts, num_delivered,
    )  # fmt: skip
    template.launch(num_sms, call.stream)


def sms_of(context: Context, shape: MoeShape, num_sms: int | None) -> Sms:
    """Return the SMs of the kernels of a call; ``num_sms``: the limit of the user, or None."""
    if num_sms:
        return Sms(num_sms, num_sms)
    return Sms(tune(shape, Machine(context.num_ranks, context.num_sms)).dispatch_sms, context.num_sms)


def expand_form(
    context: Context, kind: RowKind, num_local: int, options: DispatchOptions, capacity: int
) -> LaunchTemplate:
    """Return the template of `dispatch_expand` for a layout; ``capacity``: rows of an expert (MASKED), else 0."""
    return launch.expand_template(
        context,
        kind,
        num_local,
        alignment=options.alignment,
        capacity=capacity,
        zero_padding=options.zero_padding,
    )


def dispatch_signature(geometry: Geometry, kind: RowKind, capacity: int) -> Signature:
    """Return the signature of a dispatch; ``capacity``: that of the options, or what was guessed, or 0."""
    shape, options = geometry.shape, geometry.options
    return Signature(
        "dispatch",
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        max_tokens=shape.max_tokens,
        layout=geometry.layout,
        alignment=options.alignment,
        device_counts=int(options.counts == "device"),
        capacity=capacity,
        **signature_fields(kind),
    )


def signature_fields(kind: RowKind) -> dict[str, int]:
    """Return the fields of a signature that say what the rows are."""
    return {
        "dtype": dtype_code(kind.dtype),
        "bytes_of_rows": kind.row_bytes,
        "bytes_of_scale": kind.scale_bytes,
        "bytes_of_weights": 4 * kind.top_k if kind.weighted else 0,
        "bytes_of_topk_idx": 0 if kind.topk_dtype is None else kind.top_k * kind.topk_dtype.itemsize,
    }
