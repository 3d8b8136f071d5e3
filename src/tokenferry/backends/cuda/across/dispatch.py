"""Dispatch and redispatch across nodes.

A row crosses the network once for each other node that it goes to, to the rank across there, which passes it on. So on
each rank the kernels of one node see, behind each other, the tokens of all ranks of its rail that go to this node: one
segment for each node. Rows of this node are moved while those of others are on their way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across.contents import Opening, RowMemory, Words
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.forms import (
    AcrossForm,
    Group,
    MoveForm,
    MoveSizes,
    new_across_form,
    new_again_form,
)
from tokenferry.backends.cuda.across.plan import Planner, Routed
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.across.relay import (
    NO_TOKENS,
    AcrossPlan,
    Relay,
    RelayAddresses,
    relay_addresses,
)
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.dispatch import payload_of
from tokenferry.backends.cuda.forms import Payload, RecvOffsets, Scales, expand, move, row_kind, scale_of
from tokenferry.backends.cuda.launch import RowKind, address
from tokenferry.backends.cuda.plan import Counts
from tokenferry.backends.cuda.results import LazyDispatched, PlanForm
from tokenferry.errors import ArgumentError, CapacityError
from tokenferry.kernels.codes import MASKED
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.topology import Topology
from tokenferry.types import Dispatched, DispatchOptions, Layout, MoeShape, Plan, Quantized

_MAX_FORMS = 256


class Passing(NamedTuple):
    """Rows on their way between nodes.

    Attributes:
        own: What this rank sends inside its node.
        rows: Rows from other nodes, when their exchange has ended.
        transfers: The exchanges, by step: one for each chunk.
        words: What the ranks across from this one say.
    """

    own: Payload
    rows: RowMemory
    transfers: list[list[Transfer]]
    words: Words


class Going(NamedTuple):
    """Which tokens of this rank go to other nodes.

    Attributes:
        slots: Address of the slots of the plan.
        dst_counts: Address of `Plan.dst_counts`.
        num_tokens: T.
        num_rows: How many rows there are, or as many as there can be.
    """

    slots: int
    dst_counts: int
    num_tokens: int
    num_rows: int


class AcrossDispatcher:
    """Dispatch and redispatch calls of one rank, across nodes.

    Args:
        context: Context of this rank, in its node.
        allocator: Allocator of blocks of the heap.
        topology: The nodes.
        crossing: Exchanges with other nodes.
        key: Key of the group, which its plans carry.
    """

    def __init__(
        self, context: Context, allocator: SymmetricAllocator, topology: Topology, crossing: Crossing, key: str
    ) -> None:
        self._context = context
        self._allocator = allocator
        self._topology = topology
        self._crossing = crossing
        self._key = key
        self._node = topology.node
        self._planner = Planner(context, allocator, topology, crossing)
        self._group = Group(context, topology, crossing, self._planner.host)
        self._forms: BoundedDict[tuple[Any, ...], AcrossForm] = BoundedDict(_MAX_FORMS)
        self._again: BoundedDict[MoveSizes, MoveForm] = BoundedDict(_MAX_FORMS)

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Make a plan and send rows along it."""
        index, weights = request.routing.topk_idx, request.routing.topk_weights
        rows, scale = payload_of(request.x)
        kind = row_kind(rows, scale, weighted=weights is not None, topk_idx=index, top_k=index.shape[1])
        form = self.form(request.shape, request.options, kind, request.num_sms)
        call = self._crossing.begin(form.signature)
        if call.capturing and (form.waits or form.geometry.space.tight):
            raise ArgumentError(
                "dispatch: options: across nodes the host waits for the device, which a CUDA graph cannot capture; use "
                'DispatchOptions(counts="device") without a capacity'
            )
        return self.send(
            form, call, Payload(rows.data_ptr(), scale, address(weights), index.data_ptr()), index.shape[0]
        )

    def form(self, shape: MoeShape, options: DispatchOptions, kind: RowKind, num_sms: int | None) -> AcrossForm:
        """Return the form of a dispatch.

        Raises:
            ConfigError, CapacityError: as `tokenferry.backends.cuda.plan.geometry`.
        """
        key = (shape, options, kind, num_sms)
        found = self._forms.get(key)
        if found is None:
            assert kind.topk_dtype is not None
            num_ranks = self._topology.num_ranks
            plan = PlanForm(
                self._key,
                options,
                num_ranks,
                shape.num_experts // num_ranks,
                kind.top_k,
                kind.topk_dtype,
                self._context.device,
            )
            found = self._forms[key] = new_across_form(self._group, plan, shape, kind, num_sms)
            most = cuda_plan.row_layout(options.layout, kind, found.geometry.most_delivered)
            self._allocator.expect(most.num_bytes)
        return found

    def sized(self, form: AcrossForm) -> AcrossForm:
        """Return the form: across nodes no call guesses how many rows there will be."""
        return form

    def send(self, form: AcrossForm, call: Call, payload: Payload, num_tokens: int) -> Dispatched[Any]:
        """Make a plan and send rows along it.

        With counts on the host it waits for the device twice: for its own counts, since a bad index must be found
        before anything is sent; and for those of its rail and its node, since memory is taken, and rows cross, in the
        sizes that they say. If the routing is too large to cross before its size is known, it waits for that, too.
        """
        waits, tight = form.waits, form.tight
        planner, begun = self._planner, self._planner.begin(form, call, payload, num_tokens)
        went, words = begun.went, begun.words
        with self._context.breaking_off():  # peers wait for this rank
            sizes = planner.sizes(form, begun)
            plan = planner.new_plan(form, begun, sizes)
            routed, coming = planner.route(form, begun, sizes, plan)
            relay = sizes.routing
            slots = plan._block.address + plan._layout.places + 4 * sizes.relay.slots
            num_out = relay.first_out[-1] if went is None else went.num_out
            going = Going(slots, plan._dst_counts.data_ptr(), num_tokens, num_out)
            out = self._pack(form.rows, call, going, payload)
            passing = None
            if not (tight or (waits and form.at_once)):
                passing = self._exchange_rows(form.rows, call, relay, payload, out, words)
            coming.join()
            planner.notify(form, begun, plan, routed)
        counts = cuda_plan.wait(self._context, call, form.geometry) if waits or tight else None
        if tight:
            with self._context.breaking_off(CapacityError):
                self._check_capacity(form, call)
        with self._context.breaking_off():
            if went is not None:
                relay = planner.counted_relay(form, sizes.routing, begun)
            passing = passing or self._exchange_rows(form.rows, call, relay, payload, out, words)
            result, recv = self._recv(form, call, plan, relay, counts)
            planner.assign(form, call, plan, routed)
            self._move(form.rows, call, plan._along, passing, recv, routed)
            self._expand(form.rows, call, result, plan, plan._along)
        return result

    def _check_capacity(self, form: AcrossForm, call: Call) -> None:
        """Compare the rows of the fullest rank of each node with the capacity, so that all ranks raise or none."""
        space, verdicts = form.geometry.space, self._crossing.verdicts(call, self._context.pinned.most_received)
        most = max(verdicts)
        if most > space.given:
            per_expert = " per expert" if form.geometry.layout == MASKED else ""
            raise CapacityError(
                f"dispatch: options.capacity: a rank on node {verdicts.index(most)} received {most} rows{per_expert}, "
                f"capacity={space.given}; raise it, or leave it out for the worst case of {space.worst}"
            )

    def _recv(
        self, form: AcrossForm, call: Call, plan: AcrossPlan, relay: Relay, counts: Counts | None
    ) -> tuple[LazyDispatched, RecvOffsets]:
        """Take the memory for what a dispatch receives, which completes the plan."""
        geometry = form.geometry
        plan._relay = relay
        if form.waits and counts is not None:
            plan._num_rows = plan.num_received = counts.received
            plan.num_delivered, plan._counted = counts.delivered, counts.experts
        else:
            plan._num_rows, plan.num_delivered = geometry.space.received, geometry.most_delivered
            plan.num_received = plan._counted = None
        plan._arrivals = arrivals = cuda_plan.arrivals(geometry, plan._num_rows, form.plan.top_k, form.plan.topk_dtype)
        block = plan._recv_block = self._allocator.call_block(call, arrivals.num_bytes)
        plan._recv_at = block.address
        layout, at = plan._relay_layout, plan._block.address + plan._layout.places
        plan._along = RelayAddresses(
            relay,
            self._context.num_ranks,
            plan._layout.columns,
            at,
            at + 4 * len(relay.came),
            at + 4 * layout.relayed,
            at + 4 * layout.slots,
            plan._dst_counts.data_ptr(),
            plan._addresses()._replace(places=at + 4 * layout.places),
        )
        result, recv = self._recv_rows(form.rows, call, plan)
        came = block.offset
        return result, RecvOffsets(
            *recv[:3],
            (came + arrivals.topk_idx) // OFFSET_BYTES,
            (came + arrivals.src_token) // OFFSET_BYTES,
            (came + arrivals.row_idx) // OFFSET_BYTES,
        )

    # ------------------------------------------------------------------ redispatch

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Send rows along an existing plan."""
        plan, weights = request.plan, request.topk_weights
        rows, scale = payload_of(request.x)
        along = relay_addresses(plan, self._topology)
        kind = row_kind(rows, scale, weighted=weights is not None, topk_idx=None, top_k=along.whole.top_k)
        form = self.redispatch_form(request.shape, plan, kind, along.whole.num_local, request.num_sms)
        call = self._crossing.begin(form.signature)
        return self.send_again(form, call, plan, along, Payload(rows.data_ptr(), scale, address(weights), 0))

    def redispatch_form(
        self, shape: MoeShape, plan: Plan, kind: RowKind, num_local: int, num_sms: int | None
    ) -> MoveForm:
        """Return the form of a redispatch along a plan of L local experts."""
        capacity = plan.num_delivered // num_local if plan.options.layout is Layout.MASKED else 0
        sizes = MoveSizes(shape, plan.options, kind, num_local, capacity, num_sms)
        form = self._again.get(sizes)
        if form is None:
            form = self._again[sizes] = new_again_form(self._group, sizes)
        return form

    def send_again(
        self, form: MoveForm, call: Call, plan: Plan, along: RelayAddresses, payload: Payload
    ) -> Dispatched[Any]:
        """Send rows along a plan, whose addresses are given, too."""
        relay, crossing = along.relay, self._crossing
        with self._context.breaking_off():  # peers wait for this rank
            words = crossing.new_words(call, relay.came, form.chunks)
            opening = crossing.open_along(call, words, along.went, along.came)
            going = Going(along.slots, along.dst_counts, along.whole.num_tokens, relay.first_out[-1])
            out = self._pack(form, call, going, payload)
            passing = self._exchange_rows(form, call, relay, payload, out, words)
            result, recv = self._recv_rows(form, call, plan)
            self._move(form, call, along, passing, recv, opening)
            self._expand(form, call, result, plan, along)
        return result

    # ------------------------------------------------------------------ both

    def _pack(self, form: MoveForm, call: Call, going: Going, payload: Payload) -> RowMemory:
        """Lay the rows that go to other nodes side by side."""
        slots, dst_counts, num_tokens, num_rows = going
        out = RowMemory.empty(self._context, form.widths, num_rows)
        if num_rows:
            scale_at, row_stride, stride = scale_of(payload)
            form.pack.pack(
                0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
                payload.rows, scale_at, payload.weights, slots, dst_counts, out.rows, out.scale, out.weights,
                row_stride, stride, num_tokens,
            )  # fmt: skip
            form.pack.launch(form.sms.local, call.stream)
        return out

    def _exchange_rows(
        self, form: MoveForm, call: Call, relay: Relay, payload: Payload, out: RowMemory, words: Words
    ) -> Passing:
        """Begin to send the rows that go to other nodes, and to receive theirs."""
        into = RowMemory.empty(self._context, form.widths, relay.first_in[-1])
        transfers = self._crossing.rows(call, relay, form.chunks, out, into, words)
        return Passing(payload, into, transfers, words)

    def _recv_rows(self, form: MoveForm, call: Call, plan: Plan) -> tuple[LazyDispatched, RecvOffsets]:
        """Take the memory for received rows."""
        result = object.__new__(LazyDispatched)
        result.plan, result._device, result._made = plan, self._context.device, {}
        result._layout = layout = cuda_plan.row_layout(plan.options.layout, form.kind, plan.num_delivered)
        block, result.leaves_block = self._allocator.recv_block(call, layout.num_bytes)
        result._block, at = block, block.offset
        return result, RecvOffsets(
            (at + layout.rows) // OFFSET_BYTES,
            (at + layout.scale) // OFFSET_BYTES,
            (at + layout.weights) // OFFSET_BYTES,
        )

    def _move(
        self,
        form: MoveForm,
        call: Call,
        along: RelayAddresses,
        passing: Passing,
        recv: RecvOffsets,
        begun: Routed | Opening,
    ) -> None:
        """Move the rows of this rank inside its node, then those from each other node as soon as they are here.

        ``begun``: the routing of a dispatch, or the opening of a call along a plan.
        """
        relay, node, sms, src_counts = along.relay, self._node, form.sms.links, along.whole.src_counts
        routed, ids, tokens = begun if isinstance(begun, Routed) else None, 0, 0
        if routed is not None:
            ids = routed.routing.ids.at(node * relay.segment)
        move(form.move, call, sms, recv, passing.own._replace(topk_idx=ids), along.segment(node))
        if isinstance(begun, Opening):  # a dispatch has done this before it counted
            self._crossing.confirm(call, begun, src_counts)
        used = form.chunks.used(relay.most)
        if used > 1:
            no_counts = self._crossing.no_counts(src_counts)
            along = along._replace(no_counts=address(no_counts))
        for step, transfers in zip(self._crossing.steps, passing.transfers, strict=True):
            source = step.source
            chunks = form.chunks.cut(relay.came[source])
            for i in range(max(used, len(transfers))):
                chunk = chunks[i] if i < len(chunks) else NO_TOKENS
                if i < len(transfers):
                    transfers[i].join()
                if chunk.num:
                    self._crossing.check(call, passing.words.state(source, i), src_counts)
                if i >= used:  # no rank of this node has tokens in it
                    continue
                part = along.segment(source) if used == 1 else along.chunk(source, chunk)
                if routed is not None:
                    ids = routed.routing.ids.at(source * relay.segment + chunk.first)
                    tokens = routed.routing.tokens.at(routed.routing.relay.first_in[source] + chunk.first)
                payload = _passed_on(form, passing.rows, relay.first_in[source] + chunk.first, ids, tokens)
                move(form.pass_on, call, sms, recv, payload, part)

    def _expand(self, form: MoveForm, call: Call, result: LazyDispatched, plan: Plan, along: RelayAddresses) -> None:
        """Lay out rows by expert, and leave the heap where it has no room."""
        block = result._block
        assert block is not None
        if form.expand is not None:
            expand(form.expand, call, form.sms.local, block, result._layout, along.whole, plan.num_delivered)
        if result.leaves_block:
            result.leave_block()


def _passed_on(form: MoveForm, rows: RowMemory, row: int, ids: int, tokens: int) -> Payload:
    """Return what came from another node, from a row on, to be passed on."""
    widths, scales = form.widths, None
    if rows.scale:
        scales = Scales(rows.scale + row * widths.scale, form.kind.scale_columns, 1)
    weights = rows.weights and rows.weights + row * widths.weights
    return Payload(rows.rows + row * widths.row, scales, weights, ids, tokens)
