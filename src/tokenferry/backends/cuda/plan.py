"""The first half of a dispatch on CUDA: what is to be counted and placed, and what the host learns of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda.buffers import ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.launch import Tables
from tokenferry.errors import CapacityError, ConfigError
from tokenferry.kernels.codes import EXPERTS, MASKED, ROWS
from tokenferry.kernels.control_block import MAX_EXPERTS, MAX_TOP_K, RANK_SHIFT
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.layout import Room, room
from tokenferry.types import DispatchOptions, Layout, MoeShape

CODES = {Layout.ROWS: ROWS, Layout.EXPERTS: EXPERTS, Layout.MASKED: MASKED}
_NO_LIMIT = 0xFFFFFFFF
_MOST_ROWS = ((1 << 31) - 1, (1 << RANK_SHIFT) - 1)
"""That places can say: of ROWS, which are int32, and of the other layouts, which say a rank, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """What follows from the sizes and options of a dispatch alone; made once for each.

    Attributes:
        shape: Of the group's view.
        options: Of the call.
        layout: ROWS, EXPERTS or MASKED.
        num_local: L.
        space: How many rows there is room for.
        count_sizes: For `launch.count`.
        most_delivered: Rows of ``Dispatched.x`` that the given room holds.
        masked_capacity: MASKED: rows of an expert; else 0.
    """

    shape: MoeShape
    options: DispatchOptions
    layout: int
    num_local: int
    space: Room
    count_sizes: tuple[int, ...]
    most_delivered: int
    masked_capacity: int

    @property
    def by_expert(self) -> bool:
        """Whether rows lie by expert."""
        return self.layout != ROWS


def too_large(shape: MoeShape) -> str:
    """Which size of a shape the kernels have no room for, or nothing."""
    for name, value, most in (("num_experts", shape.num_experts, MAX_EXPERTS), ("top_k", shape.top_k, MAX_TOP_K)):
        if value > most:
            return f"{name}={value}, and at most {most} are possible"
    return ""


def geometry(shape: MoeShape, options: DispatchOptions, num_ranks: int) -> Geometry:
    """Work out a geometry.

    Raises:
        ConfigError: a view of the group (`ExpertGroup.for_shape`) has sizes beyond what the kernels have room for.
        CapacityError: the delivery has room for more rows than a place can say.
    """
    why_not = too_large(shape)
    if why_not:
        raise ConfigError(f"for_shape: backend cuda: {why_not}; use fewer, or a group with backend='cpu'")
    layout, space, num_local = CODES[options.layout], room(shape, options, num_ranks), shape.num_experts // num_ranks
    capacity = space.given if layout == MASKED else 0
    limit = min(space.given if space.tight else _NO_LIMIT, _MOST_ROWS[layout != ROWS])
    most = space.given * (num_local if layout == MASKED else 1)
    if most >= 1 << RANK_SHIFT and (layout == MASKED or options.counts == "device"):
        raise CapacityError(
            f"dispatch: options: room for {most} rows, and a place can say less than {1 << RANK_SHIFT}; give a "
            "smaller DispatchOptions.capacity, or make the group with a smaller max_tokens"
        )
    return Geometry(
        shape=shape,
        options=options,
        layout=layout,
        num_local=num_local,
        space=space,
        count_sizes=(shape.num_experts, layout, options.alignment, capacity, limit),
        most_delivered=most,
        masked_capacity=capacity,
    )


@dataclass(slots=True)
class Counts:
    """How many rows there are, or for how many there is room where nobody has asked the device.

    Attributes:
        received: N.
        delivered: Rows of ``Dispatched.x``.
        sent: Rows that this rank sends.
        host: Rows of each local expert, or None.
    """

    received: int
    delivered: int
    sent: int
    host: tuple[int, ...] | None


def start(context: Context, call: Call, topk_idx: Tensor, found: Geometry, num_sms: int) -> Tables:
    """Launch `count` and `place`; returns what they fill."""
    tables = _tables(context, found, topk_idx)
    launch.count(context, call, topk_idx, tables, found.count_sizes, num_sms)
    launch.place(context, call, topk_idx, tables, (found.shape.num_experts, found.by_expert), num_sms)
    return tables


def _tables(context: Context, found: Geometry, topk_idx: Tensor) -> Tables:
    """Room for what the kernels fill: one allocation of int64 and one of int32, of which plans show parts."""
    R, E, L, device = context.num_ranks, found.shape.num_experts, found.num_local, context.device
    num_tokens, top_k = topk_idx.shape
    num_offsets = L + 1 if found.layout == EXPERTS else 0
    columns = num_columns(R, top_k, by_expert=found.by_expert)
    num_words = max(num_units(num_tokens), 1) * (E + R)
    offsets_end, places_end, table_end, end = ends(
        4 * num_offsets, 4 * num_tokens * columns, 4 * num_words, 8 * R + 4 * E
    )
    sent = num_tokens * min(top_k, R)
    longs = torch.empty(sent + 2 * R, dtype=torch.int64, device=device)
    dst_token, dst_counts, src_counts = longs.split_with_sizes((sent, R, R))
    ints = torch.empty(end // 4 + L, dtype=torch.int32, device=device)
    start = ints.data_ptr()
    return Tables(
        start + places_end,
        start + table_end,
        dst_counts,
        src_counts,
        ints.as_strided((L,), (1,), end // 4),
        ints.as_strided((num_offsets,), (1,)) if num_offsets else None,
        ints.as_strided((num_tokens, columns), (columns, 1), offsets_end // 4),
        dst_token,
    )


def at_most(found: Geometry, num_tokens: int) -> Counts:
    """What there is room for."""
    return Counts(found.space.received, found.most_delivered, num_tokens * found.space.sent, None)


def wait(context: Context, call: Call, found: Geometry) -> Counts:
    """Wait for the counts.

    Raises:
        CapacityError: rows do not fit into a tight capacity; on every rank.
        RoutingError, MismatchError, PeerTimeout: as `ExpertGroup.dispatch`.
    """
    try:
        context.wait_for_counts(call)
    except CapacityError as error:
        raise CapacityError(f"{error} of {found.space.worst}") from None
    received, sent, experts = context.pinned.counts(context.num_ranks, found.num_local)
    num_received = sum(received)
    if found.layout == ROWS:
        delivered = num_received
    elif found.layout == EXPERTS:
        unit = found.options.alignment
        delivered = sum(experts) if unit == 1 else sum(-(-rows // unit) * unit for rows in experts)
    else:
        delivered = found.most_delivered
    return Counts(num_received, delivered, sum(sent), tuple(experts))
