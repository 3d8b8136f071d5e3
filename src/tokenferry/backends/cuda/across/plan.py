"""Plans of dispatches across nodes: the routing crosses, and the kernels of each node count rows and place them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenferry.backends.cuda.across.contents import CrossingRouting
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.forms import AcrossForm, AcrossSizes, sizes_of
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.across.relay import AcrossPlan, Relay, fixed_relay, make_relay, segment_for
from tokenferry.backends.cuda.across.split import Split, SplitCounts, Splitter
from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.faults import pinned_words, view_words
from tokenferry.backends.cuda.forms import SendBuffers
from tokenferry.kernels.codes import UNIT_TOKENS
from tokenferry.kernels.control_block import HOST_CAME_WORD
from tokenferry.topology import Topology


class Routed(NamedTuple):
    """The routing of all tokens that a rank passes on, its own included, and where the kernels of its node count it.

    Attributes:
        routing: The routing.
        num: N * segment.
        table: Address of ``[units, E + R]`` int32 of the kernels of one node.
        bases: Likewise.
    """

    routing: CrossingRouting
    num: int
    table: int
    bases: int


class Begun(NamedTuple):
    """A dispatch that has begun.

    Attributes:
        call: The call.
        payload: What it sends.
        num_tokens: T.
        split: The tokens, by rank and by node.
        sizes: The sizes of the plan, if they are those of M tokens.
    """

    call: Call
    payload: SendBuffers
    num_tokens: int
    split: Split
    sizes: AcrossSizes | None


class Planner:
    """Makes the plans of one rank.

    Args:
        context: Context of this rank, in its node.
        allocator: Allocator of blocks of the heap.
        topology: The nodes.
        crossing: Exchanges with other nodes.

    Attributes:
        host: Address of the words of the host that `dispatch_relay` writes.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, topology: Topology, crossing: Crossing) -> None:
        self._context = context
        self._allocator = allocator
        self._crossing = crossing
        self._node = topology.node
        self._num_nodes = topology.num_nodes
        self._splitter = Splitter(context, topology, crossing)
        memory = pinned_words(HOST_CAME_WORD + topology.num_nodes, pin=context.device.type == "cuda")
        self._came, self.host = view_words(memory), memory.data_ptr()

    def begin(self, form: AcrossForm, call: Call, payload: SendBuffers, num_tokens: int) -> Begun:
        """Begin a dispatch: count its tokens; nothing is sent yet.

        Raises:
            CapacityError: the heap has no room for rows whose space does not depend on the counts.
        """
        sizes, rest = None, 0
        if form.fixed_bytes:
            self._allocator.require(call, form.fixed_bytes)
        if form.at_once:
            sizes = form.known.get(num_tokens) or self._known(form, num_tokens)
            rest = sizes.memory.num_bytes
        split = self._splitter.split(form, call, payload.topk_idx, num_tokens, rest)
        return Begun(call, payload, num_tokens, split, sizes)

    def wait(self, begun: Begun) -> SplitCounts:
        """Wait for the counts of a dispatch that has begun.

        Raises:
            RoutingError: an index is outside [-1, E).
        """
        return self._splitter.wait(begun.call, begun.num_tokens)

    def _known(self, form: AcrossForm, num_tokens: int) -> AcrossSizes:
        """Return the sizes of a plan of T tokens whose routing crosses in the size of M."""
        geometry = form.geometry
        routing = fixed_relay(self._node, self._num_nodes, geometry.shape.max_tokens, num_tokens)
        most_sent, num_ranks = num_tokens * geometry.space.sent, self._context.num_ranks
        found = form.known[num_tokens] = sizes_of(form, num_ranks, self._crossing.steps, routing, most_sent)
        return found

    def sizes(self, form: AcrossForm, begun: Begun, went: SplitCounts) -> AcrossSizes:
        """Ask the rail peers for the sizes of a plan."""
        call, words, crossing = begun.call, begun.split.words, self._crossing
        came = crossing.counts(call, words, crossing.open(call, words), begun.num_tokens)
        # `most` is not known yet.
        routing = make_relay(self._node, came, went.went, 0, segment_for(max(came)))
        return sizes_of(form, self._context.num_ranks, crossing.steps, routing, went.num_sent)

    def write(self, form: AcrossForm, begun: Begun, sizes: AcrossSizes) -> tuple[AcrossPlan, Routed]:
        """Take the memory for a plan, and write the routing for each node."""
        call, payload, num_tokens, split, _ = begun
        relay, layout, id_bytes = sizes.routing, sizes.plan, form.plan.top_k * form.plan.topk_dtype.itemsize
        tokens_at, out_at, came_at, table_at, bases_at, num_bytes = sizes.memory
        plan = object.__new__(AcrossPlan)
        plan._form, plan._dst_counts, plan._made = form.plan, split.dst_counts, {}
        plan._layout, plan._relay_layout, plan._num_sent = layout, sizes.relay, layout.num_sent
        plan._block = self._allocator.call_block(call, layout.num_bytes)
        words, start = split.words, plan._block.address
        memory, at = words.memory, split.rest
        if begun.sizes is None:
            memory = self._context.empty((num_bytes,), (1,), torch.uint8)
            at = memory.data_ptr()
        routing = CrossingRouting(memory, at, id_bytes, at + tokens_at, at + came_at, sizes.parts, relay)
        form.rails.pack(
            call.alive, call.number, call.signature.words,
            payload.topk_idx, split.table, split.bases, words.mine, words.headers,
            split.dst_counts.data_ptr(), start + layout.places + 4 * sizes.relay.slots, at, at + out_at,
            start + layout.dst_token, num_tokens, relay.segment,
        )  # fmt: skip
        # All ids are written.
        form.rails.launch(min(self._num_nodes * relay.segment // UNIT_TOKENS, form.rows.sms.local), call.stream)
        return plan, Routed(routing, self._num_nodes * relay.segment, at + table_at, at + bases_at)

    def relay(self, form: AcrossForm, begun: Begun, plan: AcrossPlan, routed: Routed, coming: Transfer | None) -> None:
        """When the routing has come, check who has called, lay it out, and tell the host how many tokens cross.

        ``coming``: the exchange of the routing; None: nothing comes.
        """
        call, words, routing = begun.call, begun.split.words, routed.routing
        if coming is not None:
            coming.join()
        form.relay.pack(
            call.alive, call.number, call.signature.words,
            routing.parcels, words.headers, words.mine, routing.ids, routing.tokens,
            plan._block.address + plan._layout.places, begun.split.dst_counts.data_ptr(), begun.num_tokens,
            routing.relay.segment,
        )  # fmt: skip
        form.relay.launch(min(routed.num // UNIT_TOKENS, form.rows.sms.local), call.stream)

    def notify(self, form: AcrossForm, call: Call, plan: AcrossPlan, routed: Routed) -> None:
        """Count the rows of all segments inside the node, exchange the counts there, and compute the places of rows."""
        layout, parts, start = plan._layout, plan._relay_layout, plan._block.address
        segment = routed.routing.relay.segment
        alive, number, signature, sizes = call.alive, call.number, call.signature.words, start + layout.places
        notify = form.notify
        notify.params.segment_units = segment // UNIT_TOKENS
        notify.pack(
            alive, number, signature,
            routed.routing.ids, routed.table, routed.bases, sizes + 4 * parts.relayed,
            start + layout.src_counts, start + layout.expert_counts,
            start + layout.expert_offsets if form.by_offsets else 0, sizes, routed.num,
        )  # fmt: skip
        blocks = min(routed.num // UNIT_TOKENS, form.rows.sms.links)
        notify.launch(blocks, call.stream)
        assign = form.assign
        assign.params.segment_units = segment // UNIT_TOKENS
        assign.pack(
            alive, number, signature,
            routed.routing.ids, routed.table, routed.bases, sizes + 4 * parts.relayed, sizes + 4 * parts.places, 0,
            routed.num,
        )  # fmt: skip
        assign.launch(blocks, call.stream)

    def wait_for_relay(self, begun: Begun, sizes: AcrossSizes, went: SplitCounts) -> Relay:
        """Wait until `relay` has told how many tokens cross; `Relay.most` is not known yet, and 0.

        Raises:
            MismatchError: a rail peer has made another call.
            PeerTimeout: one did not answer in time.
        """
        self._context.wait_for_words(begun.call, self._came)
        came = self._came[HOST_CAME_WORD:].tolist()
        return make_relay(self._node, came, went.went, 0, sizes.routing.segment)

    def counted_relay(self, relay: Relay) -> Relay:
        """Return it with `Relay.most`, when the host has waited for the counts of the node."""
        node, came, went, _, segment, first_in, first_out = relay
        return Relay(node, came, went, UNIT_TOKENS * self._context.pinned.most_units, segment, first_in, first_out)
