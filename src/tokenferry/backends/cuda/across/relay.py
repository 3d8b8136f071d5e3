"""What a plan across nodes holds besides that of one node: which rows this rank passes on, and which it sends itself.

It lies in ``Plan._places``, one column of int32, so that copies of a plan have it, too:

``came``        [N] tokens that this rank passes on, by node; of its own node all its T tokens
``went``        [N] tokens of this rank for each node; for its own node T
``most``        `Relay.most`
``segment``     `Relay.segment`
``relayed``     [N, G] int64: rows of each of these segments for each rank of this node
``slots``       [T, N], as `dispatch_rails` writes them
``places``      [N, segment, C], as `dispatch_assign` writes them
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.cuda.across.parcels import Chunk, Chunks, RowWidths, Step, Swap
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.results import LazyPlan, PlanAddresses
from tokenferry.kernels.codes import UNIT_TOKENS
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.topology import Topology
from tokenferry.types import Layout, Plan


class Relay(NamedTuple):
    """How many tokens cross between this rank and its rail peers; with counts on the device, M to each.

    Attributes:
        node: This node.
        came: By node, tokens that this rank passes on; of its own node T.
        went: By node, tokens of this rank for it; for its own node T.
        most: At least as many as any rank of this node passes on from one node, the same number on all of them.
        segment: Tokens of a segment of the routing, with padding.
        first_in: By node, the first row of its tokens among those that came from other nodes; then the end.
        first_out: By node, the first row for it among those that went to other nodes; then the end.
    """

    node: int
    came: tuple[int, ...]
    went: tuple[int, ...]
    most: int
    segment: int
    first_in: tuple[int, ...]
    first_out: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.came)

    def swaps(self, steps: Sequence[Step], chunks: Chunks, widths: RowWidths, *, back: bool) -> list[Swap]:
        """Return the exchanges of rows of a call, with one node after the other.

        Args:
            steps: The steps.
            chunks: In which chunks rows of one step cross.
            widths: Bytes of what crosses.
            back: Whether sums go back where tokens came from, and short chunks go first; else they go last.
        """
        goes, comes, goes_at, comes_at = self.went, self.came, self.first_out, self.first_in
        if back:
            goes, comes, goes_at, comes_at = comes, goes, comes_at, goes_at
        made = []
        for to, source in steps:
            num_out, num_in, firsts = goes[to], comes[source], chunks.firsts if to == chunks.to else (0,)
            is_whole = len(firsts) == 1 or self.most <= firsts[1]
            numbers = range(len(firsts))
            for i in numbers if back else reversed(numbers):
                first = firsts[i]
                used = i == 0 or first < self.most
                if not used and first >= num_out and first >= num_in:
                    continue
                to_end, from_end = num_out, num_in
                if i + 1 < len(firsts):
                    to_end, from_end = min(num_out, firsts[i + 1]), min(num_in, firsts[i + 1])
                go = Chunk.of(to, range(first, to_end), goes_at[to], widths)
                come = Chunk.of(source, range(first, from_end), comes_at[source], widths)
                made.append(Swap(go, come, i, used, is_whole))
        return made


def make_relay(node: int, came: Sequence[int], went: Sequence[int], most: int, segment: int) -> Relay:
    """Return the relay of a rank on a node."""
    first_in, first_out, rows_in, rows_out = [], [], 0, 0
    for m, (num_in, num_out) in enumerate(zip(came, went, strict=True)):
        first_in.append(rows_in)
        first_out.append(rows_out)
        if m != node:
            rows_in, rows_out = rows_in + num_in, rows_out + num_out
    return Relay(node, tuple(came), tuple(went), most, segment, (*first_in, rows_in), (*first_out, rows_out))


def segment_for(num_tokens: int) -> int:
    """Return how long a segment of the routing has to be."""
    return max(1, -(-num_tokens // UNIT_TOKENS)) * UNIT_TOKENS


def fixed_relay(node: int, num_nodes: int, max_tokens: int, num_tokens: int) -> Relay:
    """Return the relay of a rank where counts stay on the device: as many tokens cross as there can be."""
    counts = tuple(num_tokens if m == node else max_tokens for m in range(num_nodes))
    return make_relay(node, counts, counts, max_tokens, segment_for(max_tokens))


class RelayLayout(NamedTuple):
    """Where the parts of ``Plan._places`` begin, in int32 words, and their number."""

    relayed: int
    slots: int
    places: int
    num_words: int


def relay_layout(relay: Relay, num_tokens: int, ranks_per_node: int, columns: int) -> RelayLayout:
    """Return the layout of ``Plan._places``."""
    num_nodes = relay.num_nodes
    relayed = 2 * num_nodes + 2  # an even number: what follows are int64
    slots = relayed + 2 * num_nodes * ranks_per_node
    places = slots + num_tokens * num_nodes
    return RelayLayout(relayed, slots, places, places + num_nodes * relay.segment * columns)


class RelayAddresses(NamedTuple):
    """What the kernels of a call along a plan across nodes need to know of it.

    Attributes:
        relay: How many tokens cross.
        ranks_per_node: Ranks of a node, G.
        columns: Columns of the places.
        came: Address of ``[N]`` int32: what is `Relay.came` on the device, but for the own node.
        went: The same of `Relay.went`.
        relayed: Address of the rows of each segment for each rank of this node.
        slots: Address of the slots.
        dst_counts: Address of `Plan.dst_counts`.
        whole: The plan as that of one node, with the places of all segments.
        segments: What `segment` has returned, by node.
        swaps: The exchanges of the calls of a form along this plan, by form.
        no_counts: Address of a 0 for each rank, -1 if the plan was aborted; for chunks, whose rows nobody has counted.
    """

    relay: Relay
    ranks_per_node: int
    columns: int
    came: int
    went: int
    relayed: int
    slots: int
    dst_counts: int
    whole: PlanAddresses
    segments: dict[int, PlanAddresses]
    swaps: dict[Any, list[Swap]]
    no_counts: int = 0

    def segment(self, node: int) -> PlanAddresses:
        """Return the plan of the tokens from one node, as that of a dispatch inside this node."""
        found = self.segments.get(node)
        if found is None:
            counts, num = 8 * node * self.ranks_per_node, self.relay.came[node]
            found = self._part(node, 0, num, self.relayed + counts, self.whole.src_counts + counts)
            self.segments[node] = found
        return found

    def part(self, swap: Swap, chunk: Chunk) -> PlanAddresses:
        """Return the same of a chunk of these tokens; the kernels do not compare how many rows smaller ones are."""
        if swap.whole:
            return self.segments.get(chunk.node) or self.segment(chunk.node)
        return self._part(chunk.node, chunk.first, chunk.num, self.no_counts, self.no_counts)

    def _part(self, node: int, first: int, num_tokens: int, dst_counts: int, src_counts: int) -> PlanAddresses:
        """Return the plan of some tokens from a node, given where their counts begin."""
        places, _, _, row_idx, expert_counts, _, _, num_local, top_k = self.whole
        return PlanAddresses(
            places + 4 * (node * self.relay.segment + first) * self.columns,
            dst_counts,
            src_counts,
            row_idx,
            expert_counts,
            num_tokens,
            num_tokens * min(top_k, self.ranks_per_node),
            num_local,
            top_k,
        )


class AcrossPlan(LazyPlan):
    """A plan across nodes, in blocks of the heap."""

    __slots__ = ("_along", "_dst_counts", "_relay", "_relay_layout")

    _relay: Relay
    _relay_layout: RelayLayout
    _dst_counts: Tensor
    _along: RelayAddresses
    """What calls along this plan need to know, once it is complete."""

    @property
    def dst_counts(self) -> Tensor:
        """See `Plan.dst_counts`."""
        return self._dst_counts

    @property
    def _places(self) -> Tensor:
        return self._sent("places", (self._relay_layout.num_words, 1), torch.int32)

    @property
    def _host_sizes(self) -> tuple[int, ...]:
        relay = self._relay
        return (*relay.came, *relay.went, relay.most, relay.segment)

    def _managed_by_torch(self) -> tuple[Tensor, ...]:
        return (self._dst_counts,)


def relay_addresses(plan: Plan, topology: Topology) -> RelayAddresses:
    """Return the addresses of a plan of any kind; sizes that the host does not know are read from the device."""
    if isinstance(plan, AcrossPlan):
        return plan._along
    num_nodes, per_node, at = topology.num_nodes, topology.ranks_per_node, plan._places.data_ptr()
    # A compiled function does not know what the host knows.
    sizes = plan._host_sizes or tuple(plan._places[: 2 * num_nodes + 2, 0].tolist())
    relay = make_relay(topology.node, sizes[:num_nodes], sizes[num_nodes : 2 * num_nodes], *sizes[2 * num_nodes :])
    top_k = plan.topk_idx.shape[1]
    columns = num_columns(per_node, top_k, by_expert=plan.options.layout is not Layout.ROWS)
    layout = relay_layout(relay, plan.num_tokens, per_node, columns)
    whole = PlanAddresses(
        at + 4 * layout.places,
        0,
        plan.src_counts.data_ptr(),
        address(plan.row_idx),
        plan.expert_counts.data_ptr(),
        plan.num_tokens,
        0,
        plan.expert_counts.shape[0],
        top_k,
    )
    dst_counts, went = plan.dst_counts.data_ptr(), at + 4 * num_nodes
    relayed, slots = at + 4 * layout.relayed, at + 4 * layout.slots
    return RelayAddresses(relay, per_node, columns, at, went, relayed, slots, dst_counts, whole, {}, {})
