"""Forms of dispatch and redispatch across nodes: what follows from sizes, options and dtypes, worked out once.

The kernels of one node see the experts of that node only, and a routing of one segment for each node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across import launch as across_launch
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.parcels import Chunks, RoutingParcels, RowWidths, Step, Swap, routing_bytes
from tokenferry.backends.cuda.across.rails import Parts
from tokenferry.backends.cuda.across.relay import Relay, RelayLayout, relay_layout
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Context, LaunchTemplate
from tokenferry.backends.cuda.forms import (
    Sms,
    dispatch_signature,
    expand_form,
    signature_fields,
    sms_of,
)
from tokenferry.backends.cuda.launch import RowKind
from tokenferry.backends.cuda.plan import LAYOUT_CODES, Geometry
from tokenferry.backends.cuda.results import PlanForm, PlanLayout, RowLayout
from tokenferry.backends.cuda.signature import Signature
from tokenferry.errors import ConfigError
from tokenferry.kernels.codes import EXPERTS
from tokenferry.kernels.control_block import RAIL_WORDS
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.topology import Topology
from tokenferry.tuning import NCCL_SMS, routing_at_once
from tokenferry.types import DispatchOptions, Layout, MoeShape

_MAX_SIZES = 1024
"""Numbers of tokens for which a form remembers sizes."""


@dataclass(frozen=True, slots=True, eq=False)
class MoveForm:
    """What all calls that move the same kind of rows share.

    Attributes:
        signature: Signature of the calls.
        kind: Types and widths of the rows.
        sms: SMs of the kernels.
        pack: Kernel that makes parcels of the rows for other nodes.
        move: Kernel that moves rows of this rank inside the node.
        pass_on: The same for rows from other nodes.
        expand: Kernel that lays out rows by expert; None for ROWS.
        chunks: In which chunks rows cross.
        widths: Bytes of what crosses.
        layouts: Where received rows lie, by their number.
    """

    signature: Signature
    kind: RowKind
    sms: Sms
    pack: LaunchTemplate
    move: LaunchTemplate
    pass_on: LaunchTemplate
    expand: LaunchTemplate | None
    chunks: Chunks
    widths: RowWidths
    layouts: BoundedDict[int, RowLayout]


@dataclass(frozen=True, slots=True, eq=False)
class AcrossForm:
    """What all dispatches with the same shape, options, types and ``num_sms`` share.

    Attributes:
        signature: Signature of the calls.
        geometry: Geometry of the calls, in the whole group.
        rows: The rows.
        plan: What the plans share.
        split: Kernel that counts the tokens for each rank and node.
        rails: Kernel that writes the routing for each node.
        relay: Kernel that says how many tokens come.
        notify: Kernel that counts inside the node.
        assign: Kernel that computes places inside the node.
        waits: Whether as many rows cross as there are, and results have exactly as many as arrive.
        tight: Whether rows may exceed a capacity.
        fixed_bytes: Bytes of received rows if the host waits for counts on which they do not depend (MASKED); else 0.
        by_offsets: Whether results have `Dispatched.expert_offsets`.
        at_once: Whether the routing crosses along with the headers, in the size of M tokens, used or not.
        known: What is known of such calls before anything is sent, by T.
    """

    signature: Signature
    geometry: Geometry
    rows: MoveForm
    plan: PlanForm
    split: LaunchTemplate
    rails: LaunchTemplate
    relay: LaunchTemplate
    notify: LaunchTemplate
    assign: LaunchTemplate
    waits: bool
    tight: bool
    fixed_bytes: int
    by_offsets: bool
    at_once: bool
    known: BoundedDict[int, AcrossSizes]


class RoutingMemory(NamedTuple):
    """Where the parts of the routing lie, in bytes from ``ids``, and where they end.

    Attributes:
        tokens: The numbers of tokens from other nodes.
        out: The parcels for other nodes.
        came: Those from there.
        table: The table of the kernels of one node.
        bases: Their bases.
        num_bytes: The end.
    """

    tokens: int
    out: int
    came: int
    table: int
    bases: int
    num_bytes: int


class AcrossSizes(NamedTuple):
    """Where the parts of a plan lie, and the routing that it is made from.

    Attributes:
        routing: How much of the routing crosses.
        relay: Where the parts of ``Plan._places`` lie.
        plan: Where the parts of the plan lie that do not depend on the rows that arrive.
        memory: Where the parts of the routing lie.
        parts: What of the routing crosses; see `CrossingRouting.parts`.
        swaps: The exchanges of rows, if it is known how many cross.
    """

    routing: Relay
    relay: RelayLayout
    plan: PlanLayout
    memory: RoutingMemory
    parts: Parts
    swaps: list[Swap] | None


@dataclass(frozen=True, slots=True)
class MoveSizes:
    """What a `MoveForm` depends on.

    Attributes:
        shape: Sizes of the group, or of its view.
        options: Options of the plan.
        kind: Types and widths of the rows.
        num_local: Number of local experts, L.
        capacity: MASKED: rows of an expert; else 0.
        num_sms: SMs of the kernels; None: as tuned.
    """

    shape: MoeShape
    options: DispatchOptions
    kind: RowKind
    num_local: int
    capacity: int
    num_sms: int | None


class Group(NamedTuple):
    """What forms need to know of the group.

    Attributes:
        context: Context of this rank, in its node.
        topology: The nodes.
        crossing: Exchanges with other nodes.
        host: Address of the words of the host that `dispatch_relay` writes.
    """

    context: Context
    topology: Topology
    crossing: Crossing
    host: int


def new_across_form(group: Group, plan: PlanForm, shape: MoeShape, kind: RowKind, num_sms: int | None) -> AcrossForm:
    """Return the form of a dispatch across nodes.

    Raises:
        ConfigError, CapacityError: as `tokenferry.backends.cuda.plan.geometry`; or a view of the group has more experts
            than this GPU has shared memory to count.
    """
    context, topology = group.context, group.topology
    why_not = cuda_plan.too_many_experts(shape, topology, context.smem_bytes)
    if why_not:
        raise ConfigError(f"for_shape: backend cuda: {why_not}; use fewer, or a group with backend='cpu'")
    options, K, E, M = plan.options, kind.top_k, shape.num_experts, shape.max_tokens
    geometry = cuda_plan.geometry(shape, options, plan.num_ranks)
    wide, num_nodes = kind.topk_dtype is torch.int64, topology.num_nodes
    # Whether rows fit into a capacity is decided on the hosts, by the ranks of all nodes together.
    sizes = replace(geometry.sizes, num_experts=E // num_nodes, row_limit=cuda_plan.most_rows(geometry.layout))
    notify = launch.notify_template(context, sizes, K, wide=wide)
    assign = launch.assign_template(context, sizes, K, wide=wide)
    notify.params.segments = assign.params.segments = num_nodes
    split = across_launch.split_template(context, topology, E, K, wide=wide)
    on_device = options.counts == "device"
    split.params.capacity = M if on_device else 0
    at_once = on_device or routing_at_once(M, routing_bytes(K), num_nodes - 1)
    rails = across_launch.rails_template(context, topology, E, K, wide=wide)
    rails.params.apart = M if at_once else 0
    split.params.num_states = num_nodes * group.crossing.chunks(kind.row_bytes).num
    if shape.max_nodes is not None and shape.max_nodes < min(num_nodes, K):
        split.params.max_nodes = shape.max_nodes
    notify.smem_bytes = notify_spec.smem_bytes(sizes.num_experts, context.num_ranks, num_nodes)
    signature = dispatch_signature(geometry, kind, options.capacity or 0)
    moved = MoveSizes(shape, options, kind, geometry.num_local, geometry.sizes.capacity, num_sms)
    send_counts = SendCounts(RAIL_WORDS, M if on_device else 0)
    relay = across_launch.relay_template(context, topology, group.host, K, wide=wide)
    relay.params.capacity = M if on_device else 0
    relay.params.apart = rails.params.apart
    fixed_bytes = 0
    if options.layout is Layout.MASKED and not on_device:
        fixed_bytes = cuda_plan.row_layout(Layout.MASKED, kind, geometry.most_delivered).num_bytes
    return AcrossForm(
        signature,
        geometry,
        _move_form(group, signature, moved, send_counts),
        plan,
        split,
        rails,
        relay,
        notify,
        assign,
        not on_device,
        geometry.space.tight,
        fixed_bytes,
        geometry.layout == EXPERTS,
        at_once,
        BoundedDict(_MAX_SIZES),
    )


def sizes_of(form: AcrossForm, num_ranks: int, steps: Sequence[Step], routing: Relay, num_sent: int) -> AcrossSizes:
    """Return the sizes of a plan.

    Args:
        form: The form of the dispatch.
        num_ranks: Ranks of a node, G.
        steps: The nodes to send to and to receive from, one after the other.
        routing: How much of the routing crosses.
        num_sent: Most rows that this rank sends.
    """
    geometry, K = form.geometry, form.plan.top_k
    num_tokens, num_nodes, num_in = routing.came[routing.node], routing.num_nodes, routing.first_in[-1]
    width = num_columns(num_ranks, K, by_expert=geometry.by_expert)
    relay = relay_layout(routing, num_tokens, num_ranks, width)
    num_offsets = geometry.num_local + 1 if form.by_offsets else 0
    src_at, counts_at, offsets_at, places_at, end = section_ends(
        8 * num_sent, 8 * form.plan.num_ranks, 4 * geometry.num_local, 4 * num_offsets, 4 * relay.num_words
    )
    num, id_bytes = num_nodes * routing.segment, K * form.plan.topk_dtype.itemsize
    columns = geometry.shape.num_experts // num_nodes + num_ranks
    out, came = (RoutingParcels(rows, routing.node, K) for rows in (routing.went, routing.came))
    memory = RoutingMemory(*section_ends(
        num * id_bytes, 4 * num_in, out.num_bytes, came.num_bytes, 4 * num_units(num) * columns,
        4 * num_nodes * (columns + num_ranks),
    ))  # fmt: skip
    swaps = None
    if not (form.waits and form.at_once):
        swaps = routing.swaps(steps, form.rows.chunks, form.rows.widths, back=False)
    return AcrossSizes(
        routing,
        relay,
        PlanLayout(num_tokens, num_sent, width, 0, 0, src_at, counts_at, offsets_at, places_at, 0, 0, end),
        memory,
        came.parts(memory.came, is_sent=False) + out.parts(memory.out, is_sent=True),
        swaps,
    )


def new_again_form(group: Group, moved: MoveSizes) -> MoveForm:
    """Return the form of a redispatch along a plan."""
    layout = LAYOUT_CODES[moved.options.layout]
    signature = Signature("redispatch", layout=layout, **signature_fields(moved.kind))
    return _move_form(group, signature, moved, SendCounts(1, 0))


def beside_nccl(context: Context, num_sms: int) -> int:
    """Return how many of so many SMs a kernel may take while rows cross: NCCL keeps some."""
    return min(num_sms, max(1, context.num_sms - NCCL_SMS))


def cap_sms(context: Context, num_sms: int | None) -> int | None:
    """Return the SMs of a call's kernels, as `beside_nccl`; None: as tuned, which leaves enough.

    With one rank a node they may take all SMs of a small GPU: no kernel there waits for another rank.
    """
    return None if num_sms is None else beside_nccl(context, num_sms)


class SendCounts(NamedTuple):
    """The form in which `dispatch_pack` reads how many rows go to each node.

    Attributes:
        stride: Words between the numbers of two nodes.
        capacity: So many to each, used or not; 0: as many as there are.
    """

    stride: int
    capacity: int


def _move_form(group: Group, signature: Signature, moved: MoveSizes, send_counts: SendCounts) -> MoveForm:
    context, topology = group.context, group.topology
    kind, by_expert = moved.kind, moved.options.layout is not Layout.ROWS
    # Rows from other nodes come with their scales side by side.
    packed = replace(kind, bulk_scale=kind.scale_bytes % 16 == 0)
    spread = None
    if by_expert:
        spread = expand_form(context, kind, moved.num_local, moved.options, moved.capacity)
        spread.params.num_sources = topology.num_ranks
    widths, chunks = RowWidths.of(kind), group.crossing.chunks(kind.row_bytes)
    pack = across_launch.pack_template(context, topology, kind, chunks, widths.pitch)
    pack.params.went_stride, pack.params.capacity = send_counts
    return MoveForm(
        signature,
        kind,
        sms_of(context, moved.shape, cap_sms(context, moved.num_sms)),
        pack,
        launch.dispatch_template(context, kind, moved.num_local, by_expert=by_expert),
        launch.dispatch_template(context, packed, moved.num_local, by_expert=by_expert),
        spread,
        chunks,
        widths,
        BoundedDict(_MAX_SIZES),
    )
