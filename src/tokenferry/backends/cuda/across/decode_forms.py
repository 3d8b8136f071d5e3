"""Forms of decode calls across nodes: what follows from sizes, options and dtypes, worked out once.

The kernels of one node see the experts of that node only, and the tokens of a rank's whole rail: first those that it
passes on, a segment for each other node, then its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tokenferry.backends.cuda.across.launch import pack_decode_template, unpack_decode_template
from tokenferry.backends.cuda.across.rail_words import RailWords
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Context, LaunchTemplate, call_packer
from tokenferry.backends.cuda.decode_forms import (
    DISPATCH_FIELDS,
    SCALE_CODES,
    DecodeDispatchForm,
    DispatchKind,
    DispatchSizes,
    cast_type,
    fill_dispatch,
    form_of,
)
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspace
from tokenferry.errors import ConfigError
from tokenferry.kernels.decode_dispatch import spec as dispatch_spec
from tokenferry.kernels.decode_pack import spec as pack_spec
from tokenferry.kernels.decode_words import PLACES_WORD
from tokenferry.topology import Topology
from tokenferry.types import DecodePlan, MoeShape

_DISPATCH = call_packer(dispatch_spec.ACROSS, *DISPATCH_FIELDS, "records", "overflows", waits=True)
_SEGMENT = 8
"""Segments have a multiple of this many tokens, so that their choices are aligned."""
_MAX_TOKENS = 1 << 19
"""Most tokens that the ranks of a rail's nodes may bring, R * M: their masks have to fit into shared memory."""


class RailSizes(NamedTuple):
    """How many tokens cross in decode calls, and where `DecodePlan._table` says which.

    Its parts: the table of the kernels of one node; ``ids`` ``[V, K]``, the experts on this node of all tokens that
    this rank acts for, as `decode_unpack` and `decode_pack` write them; ``slots`` ``[T, N]`` of `decode_pack`; then the
    number of the dispatch, the same on all ranks of a rail.

    Attributes:
        num_nodes: N.
        node: This node.
        ranks_per_node: G.
        max_tokens: M.
        top_k: K.
        segment: Tokens of a segment.
        num_relayed: Tokens that this rank passes on.
        most: Most tokens that this rank acts for, its own included: V.
        ids: Where ``ids`` begins, in words.
        slots: Where ``slots`` begins.
        number: Where the number of the dispatch is.
        table_words: Where the parts end.
    """

    num_nodes: int
    node: int
    ranks_per_node: int
    max_tokens: int
    top_k: int
    segment: int
    num_relayed: int
    most: int
    ids: int
    slots: int
    number: int
    table_words: int

    @classmethod
    def of(cls, topology: Topology, max_tokens: int, top_k: int, segment: int) -> RailSizes:
        """Return the sizes for segments of so many tokens."""
        num_nodes, node, per_node = topology.num_nodes, topology.node, topology.ranks_per_node
        num_relayed = (num_nodes - 1) * segment
        most = num_relayed + max_tokens
        ids = PLACES_WORD + per_node * most * top_k
        slots = ids + most * top_k
        number = slots + max_tokens * num_nodes
        return cls(
            num_nodes, node, per_node, max_tokens, top_k, segment, num_relayed, most, ids, slots, number, number + 1
        )

    def shape(self, num_experts: int, hidden: int) -> MoeShape:
        """Return the sizes that the kernels of one node see, of calls with E experts in all."""
        return MoeShape(num_experts // self.num_nodes, self.top_k, hidden, self.most)


def rail_sizes(shape: MoeShape, topology: Topology) -> RailSizes:
    """Return the sizes of a dispatch.

    Raises:
        ConfigError: they are too large for the kernels.
    """
    tokens = topology.num_ranks * shape.max_tokens
    if tokens > _MAX_TOKENS:
        raise ConfigError(
            f"for_shape: backend cuda: R * max_tokens is {tokens}, and at most {_MAX_TOKENS} are possible in decode "
            "calls across nodes; use fewer, or a group with backend='cpu'"
        )
    segment = -(-num_slots(shape) // _SEGMENT) * _SEGMENT
    return RailSizes.of(topology, shape.max_tokens, shape.top_k, segment)


def _pack_bytes(shape: MoeShape, topology: Topology, dynamic_bytes: int) -> int:
    """Return the dynamic shared memory of a block of `decode_pack`.

    Raises:
        ConfigError: this GPU has less.
    """
    needed = pack_spec.smem_bytes(shape.max_tokens, topology.num_nodes)
    if needed > dynamic_bytes:
        raise ConfigError(
            f"for_shape: backend cuda: max_tokens={shape.max_tokens}, and in decode calls of {topology} at most "
            f"{pack_spec.most_tokens(topology.num_nodes, dynamic_bytes)} fit into the shared memory of this GPU; use "
            "fewer, or a group with backend='cpu'"
        )
    return needed


def sizes_of(plan: DecodePlan, topology: Topology, max_tokens: int) -> RailSizes:
    """Return the sizes of the dispatch that made a plan, which may have been copied, or be used in another view."""
    assert plan._table is not None
    num_nodes, per_node, K = topology.num_nodes, topology.ranks_per_node, plan.topk_idx.shape[1]
    acted_for = (plan._table.numel() - PLACES_WORD - max_tokens * num_nodes - 1) // ((per_node + 1) * K)
    segment = (acted_for - max_tokens) // (num_nodes - 1)
    return RailSizes.of(topology, max_tokens, K, segment)


def num_slots(shape: MoeShape) -> int:
    """Return the most tokens of a rank that may go to the same other node."""
    return shape.max_tokens if shape.node_slots is None else min(shape.node_slots, shape.max_tokens)


class RecordMemory(NamedTuple):
    """Where the parts of the memory of a dispatch lie, in bytes from its beginning.

    Attributes:
        words: What ranks send each other besides rows.
        sent: Records for other nodes.
        came: Records from them.
        weights: ``[tokens, K]``: weights of all tokens that this rank acts for.
        num_bytes: Where they end.
    """

    words: RailWords
    sent: int
    came: int
    weights: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class AcrossDispatchForm:
    """What all decode dispatches of the same shape, dtypes and options share.

    Attributes:
        inside: The form of the calls inside the node.
        sizes: How many tokens cross.
        seen: Sizes that the kernels of one node see.
        pack: Kernel that lays tokens for other nodes side by side.
        unpack: Kernel that takes apart what came.
        signature: As that of ``inside``, and so are the next two.
        workspace: Number of the workspace.
        members: A bit for each rank of the node with which it was made.
        body_bytes: Bytes of the records for a node.
        memory: Where the parts of the memory of a call lie.
    """

    inside: DecodeDispatchForm
    sizes: RailSizes
    seen: MoeShape
    pack: LaunchTemplate
    unpack: LaunchTemplate
    signature: Signature
    workspace: int
    members: int
    body_bytes: int
    memory: RecordMemory


def dispatch_signature(kind: DispatchKind) -> Signature:
    """Return the signature of a dispatch across nodes."""
    signature = kind.signature()
    fields = {**dict(signature.fields[1:]), "node_slots": kind.shape.node_slots or 0}
    return Signature(signature.phase, **fields)


def new_across_dispatch(
    context: Context, group_key: str, topology: Topology, workspace: Workspace, kind: DispatchKind
) -> AcrossDispatchForm:
    """Return the form of decode dispatches whose rows under way are in a workspace."""
    shape, cast = kind.shape, kind.quantize is not None
    sizes = rail_sizes(shape, topology)
    row = (shape.hidden, kind.dtype.itemsize)
    units = pack_spec.record_units(*row, shape.top_k, cast=cast, weighted=kind.weighted)
    routing_at = pack_spec.routing_at(*row, cast=cast)
    pack = pack_decode_template(context, topology, type=cast_type(kind))
    unpack = unpack_decode_template(context, topology)
    kernel = context.new_template(dispatch_spec.ACROSS, _DISPATCH, type=cast_type(kind), relays=1)
    fill_dispatch(context, kernel, workspace, kind, topology.num_ranks)
    for p in (pack.params, unpack.params, kernel.params):
        p.segment, p.record_units, p.top_k = sizes.segment, units, shape.top_k
    pack.params.routing_at = unpack.params.routing_at = routing_at
    p = kernel.params
    p.max_tokens, p.first_own, p.wide = sizes.most, sizes.num_relayed, 0
    p.num_nodes, p.node, p.node_slots = topology.num_nodes, topology.node, num_slots(shape)
    per_node = sizes.ranks_per_node
    E, most = shape.num_experts, sizes.most
    kept = dispatch_spec.kept_bytes(E, per_node, most, context.dynamic_bytes(dispatch_spec.ACROSS))
    kernel.smem_bytes = dispatch_spec.smem_bytes(most * shape.top_k, kept, E, per_node, most)
    p = pack.params
    p.num_experts, p.node_slots, p.max_nodes = shape.num_experts, num_slots(shape), shape.max_nodes or 0
    p.columns, p.row_units, p.scale_format = shape.hidden, kernel.params.row_units, SCALE_CODES[kind.quantize]
    p.wide, p.weighted = int(kind.topk_dtype.itemsize == 8), int(kind.weighted)
    pack.smem_bytes = _pack_bytes(shape, topology, context.dynamic_bytes(pack_spec.SPEC))
    made = DispatchSizes(topology.num_ranks, sizes.table_words, kept)
    inside = form_of(kernel, group_key, dispatch_signature(kind), workspace, kind, made)
    seen = sizes.shape(shape.num_experts, shape.hidden)
    records, words = 16 * units * sizes.num_relayed, RailWords.of(sizes.num_nodes)
    weight_bytes = 4 * most * shape.top_k if kind.weighted else 0
    ends = section_ends(words.num_bytes, records, records, weight_bytes)
    return AcrossDispatchForm(
        inside,
        sizes,
        seen,
        pack,
        unpack,
        inside.signature,
        inside.workspace,
        inside.members,
        16 * units * sizes.segment,
        RecordMemory(words, *ends),
    )
