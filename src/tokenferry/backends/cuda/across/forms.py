"""Forms of dispatch and redispatch across nodes: what follows from sizes, options and dtypes, worked out once.

The kernels of one node see the experts of that node only, and a routing of one segment for each node.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tokenferry.backends.cuda import launch
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across import launch as across_launch
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
from tokenferry.backends.cuda.results import PlanForm
from tokenferry.backends.cuda.signature import Signature
from tokenferry.kernels.dispatch_notify import spec as notify_spec
from tokenferry.topology import Topology
from tokenferry.tuning import NCCL_SMS
from tokenferry.types import DispatchOptions, Layout, MoeShape


@dataclass(frozen=True, slots=True, eq=False)
class MoveForm:
    """What all calls that move the same kind of rows share.

    Attributes:
        signature: Signature of the calls.
        kind: Types and widths of the rows.
        sms: SMs of the kernels.
        pack: Kernel that lays the rows for other nodes side by side.
        move: Kernel that moves rows of this rank inside the node.
        pass_on: The same for rows from other nodes.
        expand: Kernel that lays out rows by expert; None for ROWS.
    """

    signature: Signature
    kind: RowKind
    sms: Sms
    pack: LaunchTemplate
    move: LaunchTemplate
    pass_on: LaunchTemplate
    expand: LaunchTemplate | None


@dataclass(frozen=True, slots=True, eq=False)
class AcrossForm:
    """What all dispatches with the same shape, options, types and ``num_sms`` share.

    Attributes:
        geometry: Geometry of the calls, in the whole group.
        rows: The rows.
        plan: What the plans share.
        split: Kernel that counts the tokens for each rank and node.
        rails: Kernel that writes the routing for each node.
        notify: Kernel that counts inside the node.
        assign: Kernel that computes places inside the node.
        waits: Whether as much crosses as there is, and results have exactly as many rows as arrive.
    """

    geometry: Geometry
    rows: MoveForm
    plan: PlanForm
    split: LaunchTemplate
    rails: LaunchTemplate
    notify: LaunchTemplate
    assign: LaunchTemplate
    waits: bool


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


def new_across_form(
    context: Context, topology: Topology, plan: PlanForm, shape: MoeShape, kind: RowKind, num_sms: int | None
) -> AcrossForm:
    """Return the form of a dispatch across nodes.

    Raises:
        ConfigError, CapacityError: as `tokenferry.backends.cuda.plan.geometry`.
    """
    options, K, E = plan.options, kind.top_k, shape.num_experts
    geometry = cuda_plan.geometry(shape, options, plan.num_ranks)
    wide, num_nodes = kind.topk_dtype is torch.int64, topology.num_nodes
    # Whether rows fit into a capacity is decided on the hosts, by the ranks of all nodes together.
    sizes = replace(geometry.sizes, num_experts=E // num_nodes, row_limit=cuda_plan.most_rows(geometry.layout))
    notify = launch.notify_template(context, sizes, K, wide=wide)
    assign = launch.assign_template(context, sizes, K, wide=wide)
    notify.params.segments = assign.params.segments = num_nodes
    split = across_launch.split_template(context, topology, E, K, wide=wide)
    split.params.capacity = shape.max_tokens if options.counts == "device" else 0
    if shape.max_nodes is not None and shape.max_nodes < min(num_nodes, K):
        split.params.max_nodes = shape.max_nodes
    notify.smem_bytes = notify_spec.smem_bytes(sizes.num_experts, context.num_ranks, num_nodes)
    signature = dispatch_signature(geometry, kind, options.capacity or 0)
    moved = MoveSizes(shape, options, kind, geometry.num_local, geometry.sizes.capacity, num_sms)
    return AcrossForm(
        geometry,
        _move_form(context, topology, signature, moved),
        plan,
        split,
        across_launch.rails_template(context, topology, E, K, wide=wide),
        notify,
        assign,
        options.counts == "host",
    )


def new_again_form(context: Context, topology: Topology, moved: MoveSizes) -> MoveForm:
    """Return the form of a redispatch along a plan."""
    layout = LAYOUT_CODES[moved.options.layout]
    return _move_form(context, topology, Signature("redispatch", layout=layout, **signature_fields(moved.kind)), moved)


def cap_sms(context: Context, num_sms: int | None) -> int | None:
    """Return the SMs of a call's kernels, of which NCCL keeps some; None: as tuned, which leaves enough."""
    return None if num_sms is None else min(num_sms, max(1, context.num_sms - NCCL_SMS))


def _move_form(context: Context, topology: Topology, signature: Signature, moved: MoveSizes) -> MoveForm:
    kind, by_expert = moved.kind, moved.options.layout is not Layout.ROWS
    # Rows from other nodes come with their scales side by side.
    packed = replace(kind, bulk_scale=kind.scale_bytes % 16 == 0)
    spread = None
    if by_expert:
        spread = expand_form(context, kind, moved.num_local, moved.options, moved.capacity)
        spread.params.num_sources = topology.num_ranks
    return MoveForm(
        signature,
        kind,
        sms_of(context, moved.shape, cap_sms(context, moved.num_sms)),
        across_launch.pack_template(context, topology, kind),
        launch.dispatch_template(context, kind, moved.num_local, by_expert=by_expert),
        launch.dispatch_template(context, packed, moved.num_local, by_expert=by_expert),
        spread,
    )
