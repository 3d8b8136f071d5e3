"""The plan of a dispatch on CUDA: its sizes, where its parts lie, and the counts that the host waits for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.launch import PlanSizes, RowKind
from tokenferry.backends.cuda.results import Arrivals, PlanLayout, RowLayout, ints_of
from tokenferry.errors import CapacityError, ConfigError
from tokenferry.kernels.codes import EXPERTS, MASKED, ROWS
from tokenferry.kernels.control_block import MAX_EXPERTS, MAX_TOP_K, RANK_SHIFT
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.layout import RowCapacity, row_capacity
from tokenferry.topology import Topology
from tokenferry.types import DispatchOptions, Layout, MoeShape

LAYOUT_CODES = {Layout.ROWS: ROWS, Layout.EXPERTS: EXPERTS, Layout.MASKED: MASKED}
_NO_LIMIT = 0xFFFFFFFF
_MOST_ROWS_BY_TOKEN = (1 << 31) - 1
"""Rows that places of ROWS can number; they are int32."""
_MOST_ROWS_BY_EXPERT = (1 << RANK_SHIFT) - 1
"""The same of the other layouts, whose places hold a rank, too."""


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """Everything about a dispatch that follows from the shape and options alone; made once for each.

    Attributes:
        shape: Sizes of the group, or of its view.
        options: Options of the call.
        num_local: Number of local experts, L.
        space: How many rows there is space for.
        sizes: Sizes for the kernels that make the plan.
        by_expert: Whether rows lie by expert.
        most_delivered: Rows of ``Dispatched.x`` in the worst case.
        bounded: Whether M says how many rows there may be; otherwise there may be as many as places can number.
    """

    shape: MoeShape
    options: DispatchOptions
    num_local: int
    space: RowCapacity
    sizes: PlanSizes
    by_expert: bool
    most_delivered: int
    bounded: bool

    @property
    def layout(self) -> int:
        """ROWS, EXPERTS or MASKED."""
        return self.sizes.layout

    @property
    def guesses(self) -> bool:
        """Whether calls guess how many rows there will be: there may be more than any memory holds.

        That follows from what has to be the same on all ranks, so it is the same on all ranks, too.
        """
        return self.options.counts == "host" and self.layout == ROWS and not self.bounded


def too_large(shape: MoeShape) -> str:
    """Return which size of a shape is too large for the kernels; empty if none is."""
    for name, value, most in (("num_experts", shape.num_experts, MAX_EXPERTS), ("top_k", shape.top_k, MAX_TOP_K)):
        if value > most:
            return f"{name}={value}, and at most {most} are possible"
    return ""


def too_many_experts(shape: MoeShape, topology: Topology, smem_bytes: int) -> str:
    """Return why the shared memory of a block has no room to count these experts; empty if it has.

    On one node it always has: every GPU has room for `MAX_EXPERTS` there.
    """
    num_nodes, left = topology.num_nodes, smem_bytes - notify_spec.SPEC.static_smem
    most = num_nodes * notify_spec.most_experts(topology.ranks_per_node, num_nodes, left)
    if shape.num_experts <= most:
        return ""
    most = max(0, most // topology.num_ranks * topology.num_ranks)
    return (
        f"num_experts={shape.num_experts}, and on {topology} at most {most} are possible with the {smem_bytes >> 10} "
        "KB of shared memory that a block has on this GPU"
    )


def most_rows(layout: int) -> int:
    """Return the most rows that places of a layout can number."""
    return _MOST_ROWS_BY_TOKEN if layout == ROWS else _MOST_ROWS_BY_EXPERT


def geometry(shape: MoeShape, options: DispatchOptions, num_ranks: int) -> Geometry:
    """Return the geometry of a dispatch.

    Raises:
        ConfigError: a view of the group (`ExpertGroup.for_shape`) has sizes that are too large for the kernels.
        CapacityError: there may be more rows than places can number.
    """
    why_not = too_large(shape)
    if why_not:
        raise ConfigError(f"for_shape: backend cuda: {why_not}; use fewer, or a group with backend='cpu'")
    layout, space, num_local = (
        LAYOUT_CODES[options.layout],
        row_capacity(shape, options, num_ranks),
        shape.num_experts // num_ranks,
    )
    limit = min(space.given if space.tight else _NO_LIMIT, most_rows(layout))
    most = space.given * (num_local if layout == MASKED else 1)
    if most > _MOST_ROWS_BY_EXPERT and (layout == MASKED or options.counts == "device"):
        raise CapacityError(
            f"dispatch: options: up to {most} rows, and at most {_MOST_ROWS_BY_EXPERT} are possible; give a "
            "smaller DispatchOptions.capacity, or make the group with a smaller max_tokens"
        )
    return Geometry(
        shape=shape,
        options=options,
        num_local=num_local,
        space=space,
        sizes=PlanSizes(
            num_experts=shape.num_experts,
            layout=layout,
            alignment=options.alignment,
            capacity=space.given if layout == MASKED else 0,
            row_limit=limit,
        ),
        by_expert=layout != ROWS,
        most_delivered=most,
        bounded=space.given < most_rows(layout),
    )


def within(geometry: Geometry, kind: RowKind, heap_bytes: int) -> Geometry:
    """Return the geometry with a limit of the rows that a heap of so many bytes can hold if it is empty.

    With more on any rank all ranks refuse the call alike, before a row moves. Where memory is taken for the worst case,
    before anything is sent, no limit is needed.
    """
    sizes, layout = geometry.sizes, geometry.options.layout
    if geometry.options.counts == "device" or layout is Layout.MASKED or geometry.space.tight:
        return geometry
    rows, weights = kind.row_bytes + kind.scale_bytes, 4 * kind.weighted * (kind.top_k if layout is Layout.ROWS else 1)
    return replace(geometry, sizes=replace(sizes, row_limit=min(sizes.row_limit, heap_bytes // (rows + weights))))


def limited(geometry: Geometry, num_rows: int) -> Geometry:
    """Return the geometry of a dispatch of ROWS with space for a number of rows, and no more."""
    num_rows = min(num_rows, geometry.sizes.row_limit)
    return replace(
        geometry,
        space=RowCapacity(num_rows, num_rows, num_rows, geometry.space.sent),
        sizes=replace(geometry.sizes, row_limit=num_rows),
        most_delivered=num_rows,
        bounded=True,
    )


class Counts(NamedTuple):
    """Numbers of rows, as counted.

    Attributes:
        received: Rows that this rank receives, N.
        delivered: Rows that ``Dispatched.x`` has.
        sent: Rows that this rank sends.
        experts: Rows of each local expert, as words of 32 bits.
    """

    received: int
    delivered: int
    sent: int
    experts: bytes


def plan_layout(geometry: Geometry, num_ranks: int, num_tokens: int, top_k: int) -> PlanLayout:
    """Return where the parts of a plan lie that depend on this rank's tokens only."""
    R, E, L = num_ranks, geometry.sizes.num_experts, geometry.num_local
    columns = num_columns(R, top_k, by_expert=geometry.by_expert)
    sent = num_tokens * geometry.space.sent
    num_offsets = L + 1 if geometry.sizes.layout == EXPERTS else 0
    num_words = max(num_units(num_tokens), 1) * (E + R)
    ends = section_ends(
        8 * sent, 8 * R, 8 * R, 4 * L, 4 * num_offsets, 4 * num_tokens * columns, 4 * num_words, 8 * R + 4 * E
    )
    return PlanLayout(num_tokens, sent, columns, 0, *ends)


def arrivals(geometry: Geometry, num_rows: int, top_k: int, topk_dtype: torch.dtype) -> Arrivals:
    """Return where the parts of a plan lie that depend on the number of rows that arrive."""
    token_end, idx_end, end = section_ends(
        8 * num_rows, num_rows * top_k * topk_dtype.itemsize, 8 * num_rows * top_k if geometry.by_expert else 0
    )
    return Arrivals(num_rows, 0, token_end, idx_end, end)


def row_layout(layout: Layout, kind: RowKind, num_rows: int) -> RowLayout:
    """Return where the parts of received rows lie in a block.

    Rows come last: where there are fewer than expected, the memory behind them is given back.
    """
    weights = num_rows * 4 * (kind.top_k if layout is Layout.ROWS else 1) if kind.weighted else 0
    weights_end, scale_end, end = section_ends(weights, num_rows * kind.scale_bytes, num_rows * kind.row_bytes)
    return RowLayout(kind, layout is Layout.MASKED, 0, weights_end, scale_end, end)


def wait(context: Context, call: Call, geometry: Geometry) -> Counts:
    """Wait for the counts.

    Raises:
        CapacityError: rows do not fit into a tight capacity, or into the heap; on every rank.
        RoutingError, MismatchError, PeerTimeout: as `ExpertGroup.dispatch`.
    """
    try:
        context.wait_for_counts(call)
    except CapacityError as error:
        if not geometry.space.tight:
            raise
        raise CapacityError(f"{error} of {geometry.space.worst}") from None
    return counted(context, geometry)


def counted(context: Context, geometry: Geometry) -> Counts:
    """Return the counts, which are known to have come."""
    received, sent, experts = context.pinned.counts(context.num_ranks, geometry.num_local)
    layout = geometry.sizes.layout
    if layout == ROWS:
        delivered = received
    elif layout == EXPERTS:
        unit, rows = geometry.options.alignment, ints_of(experts)
        delivered = sum(rows) if unit == 1 else sum(-(-num // unit) * unit for num in rows)
    else:
        delivered = geometry.most_delivered
    return Counts(received, delivered, sent, experts)
