"""Dispatch and redispatch across nodes.

A row crosses the network once for each other node that it goes to, to the rail peer there, which passes it on. So on
each rank the kernels of one node see, behind each other, the tokens of all ranks of its rail that go to this node: one
segment for each node. Rows of this node are moved while those of others are on their way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across.contents import CrossingRouting, Opening, Words
from tokenferry.backends.cuda.across.crossing import Crossing, Transfers
from tokenferry.backends.cuda.across.forms import (
    AcrossForm,
    Group,
    MoveForm,
    MoveSizes,
    new_across_form,
    new_again_form,
)
from tokenferry.backends.cuda.across.parcels import Chunk, Swap
from tokenferry.backends.cuda.across.plan import Begun, Planner, Routed
from tokenferry.backends.cuda.across.relay import AcrossPlan, Relay, RelayAddresses, relay_addresses
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.dispatch import payload_of
from tokenferry.backends.cuda.forms import (
    NO_SCALE,
    RecvOffsets,
    Scales,
    SendBuffers,
    expand,
    move,
    row_kind,
    scale_of,
)
from tokenferry.backends.cuda.launch import RowKind, address
from tokenferry.backends.cuda.plan import Counts
from tokenferry.backends.cuda.results import LazyDispatched, PlanAddresses, PlanForm
from tokenferry.errors import ArgumentError, CapacityError, TokenferryError
from tokenferry.kernels.codes import MASKED
from tokenferry.kernels.control_block import OFFSET_BYTES, ROWS_WORD
from tokenferry.topology import Topology
from tokenferry.types import Dispatched, DispatchOptions, Layout, MoeShape, Plan, Quantized

_MAX_FORMS = 256


class RowsInTransit(NamedTuple):
    """Rows on their way between nodes.

    Attributes:
        own: What this rank sends inside its node.
        rows: Where the parcels from other nodes are, when their exchange has ended.
        memory: Keeps them.
        transfers: The exchanges.
        words: What the rail peers say about the call.
    """

    own: SendBuffers
    rows: int
    memory: Tensor
    transfers: Transfers
    words: Words


class OutgoingTokens(NamedTuple):
    """Which tokens of this rank go to other nodes.

    Attributes:
        slots: Address of the slots of the plan.
        dst_counts: Address of `Plan.dst_counts`.
        went: Address of how many go to each node, as the form of the call says.
        num_tokens: T.
    """

    slots: int
    dst_counts: int
    went: int
    num_tokens: int


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
        self._breaking_off = context.breaking_off()
        self._waiting = context.breaking_off(TokenferryError)  # it breaks the group itself if it has to
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
            form, call, SendBuffers(rows.data_ptr(), scale, address(weights), index.data_ptr()), index.shape[0]
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
            if found.geometry.bounded:
                most = cuda_plan.row_layout(options.layout, kind, found.geometry.most_delivered)
                self._allocator.expect(most.num_bytes)
        return found

    def sized(self, form: AcrossForm) -> AcrossForm:
        """Return the form: across nodes no call guesses how many rows there will be."""
        return form

    def send(self, form: AcrossForm, call: Call, payload: SendBuffers, num_tokens: int) -> Dispatched[Any]:
        """Make a plan and send rows along it.

        With counts on the host it waits for the device: for its own counts, since a bad index must be found before
        anything is sent; for those of its rail, in whose sizes rows cross; and for those of its node, in whose sizes
        memory is taken. Meanwhile the device writes the routing, and while rows cross it counts them and computes
        places.
        """
        rows, waits, tight, planner, steps = form.rows, form.waits, form.tight, self._planner, self._crossing.steps
        begun = planner.begin(form, call, payload, num_tokens)
        sizes, went, in_transit, counts, received, into = begun.sizes, None, None, None, None, None
        if sizes is not None:  # the routing is written while the host waits
            plan, routed = planner.write(form, begun, sizes)
        # Nothing has been sent yet: if there is no memory, the group is still whole.
        if waits:
            went = planner.wait(begun)
            num_out = went.num_out
        else:
            assert sizes is not None
            received = self._recv(form, call, plan, sizes.routing, None)
            num_out = sizes.routing.first_out[-1]
            into = self._context.empty((sizes.routing.first_in[-1] * rows.widths.pitch,), (1,), torch.uint8)
        out = self._context.empty((num_out * rows.widths.pitch,), (1,), torch.uint8)
        with self._breaking_off:  # peers wait for this rank
            if sizes is None:
                assert went is not None
                sizes = planner.sizes(form, begun, went)
                plan, routed = planner.write(form, begun, sizes)
            if went is not None:
                plan._num_sent = went.num_sent
            coming = self._crossing.routing(call, routed.routing, begun.split.words, opens=form.at_once)
            relay, swaps = sizes.routing, sizes.swaps
            self._pack_new(form, begun, plan, out)
            if swaps is not None and not tight:
                in_transit = self._begin_rows(rows, begun, relay, swaps, out, into)
            planner.relay(form, begun, plan, routed, coming)
            if went is None or not form.at_once:
                planner.notify(form, call, plan, routed)
        if went is not None and form.at_once:
            with self._waiting:
                relay = planner.wait_for_relay(begun, sizes, went)
            swaps = relay.swaps(steps, rows.chunks, rows.widths, back=False)
            with self._breaking_off:
                if not tight:
                    in_transit = self._begin_rows(rows, begun, relay, swaps, out)
                planner.notify(form, call, plan, routed)
        if waits or tight:
            with self._waiting:
                counts = cuda_plan.wait(self._context, call, form.geometry)
        if tight:
            with self._context.breaking_off(CapacityError):
                self._check_capacity(form, call)
        with self._breaking_off:
            if went is not None:
                relay = planner.counted_relay(relay)
                if rows.chunks.num > 1 and relay.most > rows.chunks.firsts[1]:  # ranks of this node pass on several
                    swaps = relay.swaps(steps, rows.chunks, rows.widths, back=False)
            assert swaps is not None
            in_transit = in_transit or self._begin_rows(rows, begun, relay, swaps, out, into)
            result, recv = received or self._recv(form, call, plan, relay, counts)
            self._move(rows, call, plan._along, swaps, in_transit, recv, routed)
            if rows.expand is not None or result.leaves_block:
                self._expand(rows, call, result, plan, plan._along)
        return result

    def _pack_new(self, form: AcrossForm, begun: Begun, plan: AcrossPlan, out: Tensor) -> None:
        """Make parcels of the rows for other nodes, if there are any."""
        if not out.shape[0]:
            return
        slots = plan._block.address + plan._layout.places + 4 * plan._relay_layout.slots
        goes = begun.split.words.mine + 4 * ROWS_WORD
        outgoing = OutgoingTokens(slots, plan._dst_counts.data_ptr(), goes, begun.num_tokens)
        _pack(form.rows, begun.call, outgoing, begun.payload, out.data_ptr())

    def _begin_rows(
        self, form: MoveForm, begun: Begun, relay: Relay, swaps: Sequence[Swap], out: Tensor, into: Tensor | None = None
    ) -> RowsInTransit:
        """Begin to send the rows that go to other nodes, and to receive theirs; ``into``: made here where it is None.

        How many come is known when others have sent their routing: a rank without memory for them breaks the group.
        """
        if into is None:
            into = self._context.empty((relay.first_in[-1] * form.widths.pitch,), (1,), torch.uint8)
        words, at = begun.split.words, into.data_ptr()
        transfers = self._crossing.rows(begun.call, swaps, words, out.data_ptr(), at, (out, into))
        return RowsInTransit(begun.payload, at, into, transfers, words)

    def _check_capacity(self, form: AcrossForm, call: Call) -> None:
        """Compare the rows of the fullest rank of each node with the capacity, so that all ranks raise or none."""
        space, verdicts = form.geometry.space, self._crossing.verdicts(call, self._context.pinned.most_received)
        most = max(verdicts)
        if most > space.given:
            of_masked = "an expert of " if form.geometry.layout == MASKED else ""
            raise CapacityError(
                f"dispatch: options.capacity: {of_masked}a rank on node {verdicts.index(most)} received {most} rows, "
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
        came_at = plan._recv_at = block.address
        layout, start, parts = plan._layout, plan._block.address, plan._relay_layout
        at = start + layout.places
        plan._along = RelayAddresses(
            relay,
            self._context.num_ranks,
            layout.columns,
            at,
            at + 4 * len(relay.came),
            at + 4 * parts.relayed,
            at + 4 * parts.slots,
            plan._dst_counts.data_ptr(),
            PlanAddresses(
                at + 4 * parts.places,
                0,  # calls inside the node have their own
                start + layout.src_counts,
                came_at + arrivals.row_idx,
                start + layout.expert_counts,
                layout.num_tokens,
                plan._num_sent,
                form.plan.num_local,
                form.plan.top_k,
            ),
            {},
            {},
        )
        result, (rows, scale, weights, *_) = self._recv_rows(form.rows, call, plan)
        if not geometry.bounded:
            self._allocator.expect_more(result._layout.num_bytes)
        came = block.offset
        return result, RecvOffsets(
            rows,
            scale,
            weights,
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
        return self.send_again(form, call, plan, along, SendBuffers(rows.data_ptr(), scale, address(weights), 0))

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
        self, form: MoveForm, call: Call, plan: Plan, along: RelayAddresses, payload: SendBuffers
    ) -> Dispatched[Any]:
        """Send rows along a plan, whose addresses are given, too."""
        relay, crossing, pitch = along.relay, self._crossing, form.widths.pitch
        swaps = along.swaps.get(form)
        if swaps is None:
            swaps = along.swaps[form] = relay.swaps(crossing.steps, form.chunks, form.widths, back=False)
        num_out, num_in = relay.first_out[-1], relay.first_in[-1]
        # Memory is taken before anything is sent: if there is none, the group is still whole.
        result, recv = self._recv_rows(form, call, plan)
        words, out_at = crossing.new_words(form.chunks.num, (num_out + num_in) * pitch)
        if not swaps[-1].whole:
            no_counts = crossing.no_counts(along.whole.src_counts)
            along = along._replace(no_counts=address(no_counts))
        with self._breaking_off:  # peers wait for this rank
            opening = crossing.announce(call, words, form.chunks, along.went, along.came, along.whole.src_counts)
            into_at = out_at + num_out * pitch
            if num_out:
                outgoing = OutgoingTokens(along.slots, along.dst_counts, along.went, along.whole.num_tokens)
                _pack(form, call, outgoing, payload, out_at)
            transfers = crossing.rows(call, swaps, words, out_at, into_at, opening=opening)
            in_transit = RowsInTransit(payload, into_at, words.memory, transfers, words)
            self._move(form, call, along, swaps, in_transit, recv, opening)
            if form.expand is not None or result.leaves_block:
                self._expand(form, call, result, plan, along)
        return result

    # ------------------------------------------------------------------ both

    def _recv_rows(self, form: MoveForm, call: Call, plan: Plan) -> tuple[LazyDispatched, RecvOffsets]:
        """Take the memory for received rows."""
        result, num_rows = object.__new__(LazyDispatched), plan.num_delivered
        result.plan, result._device, result._made = plan, self._context.device, {}
        layout = form.layouts.get(num_rows)
        if layout is None:
            layout = form.layouts[num_rows] = cuda_plan.row_layout(plan.options.layout, form.kind, num_rows)
        result._layout = layout
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
        swaps: Sequence[Swap],
        in_transit: RowsInTransit,
        recv: RecvOffsets,
        begun: Routed | Opening,
    ) -> None:
        """Move the rows of this rank inside its node, then those from each other node as soon as they are here.

        ``begun``: the routing of a dispatch, or the opening of a call along a plan.
        """
        relay, sms, src_counts, crossing = along.relay, form.sms.links, along.whole.src_counts, self._crossing
        routing, own = None, in_transit.own
        if isinstance(begun, Routed):
            routing = begun.routing
            ids = routing.ids + relay.node * relay.segment * routing.id_bytes
            own = SendBuffers(own.rows, own.scale, own.weights, ids)
        move(form.move, call, sms, recv, own, along.segments.get(relay.node) or along.segment(relay.node))
        opening = begun if isinstance(begun, Opening) else None  # a dispatch has compared calls before it counted
        if opening is not None and opening.transfer is not None:
            opening.transfer.join()
            crossing.confirm(call, opening)
            opening = None
        if not swaps[-1].whole and not along.no_counts:
            no_counts = crossing.no_counts(src_counts)
            along = along._replace(no_counts=address(no_counts))
        for swap in swaps:
            chunk = swap.recv
            transfer = in_transit.transfers.get((chunk.node, swap.number))
            if transfer is not None:
                transfer.join()
            if transfer is not None and (chunk.num or opening is not None):
                crossing.check(call, in_transit.words, src_counts, swap, opening)
                opening = None
            if swap.used:  # else no rank of this node has tokens in it
                payload = _passed_on(form, in_transit.rows, chunk, routing)
                move(form.pass_on, call, sms, recv, payload, along.part(swap, chunk))

    def _expand(self, form: MoveForm, call: Call, result: LazyDispatched, plan: Plan, along: RelayAddresses) -> None:
        """Lay out rows by expert, and leave the heap where it has no room."""
        block = result._block
        assert block is not None
        if form.expand is not None:
            expand(form.expand, call, form.sms.local, block, result._layout, along.whole, plan.num_delivered)
        if result.leaves_block:
            result.leave_block()


def _pack(form: MoveForm, call: Call, outgoing: OutgoingTokens, payload: SendBuffers, out_at: int) -> None:
    """Make parcels of the rows that go to other nodes."""
    slots, dst_counts, went, num_tokens = outgoing
    scale_at, row_stride, stride = NO_SCALE if payload.scale is None else scale_of(payload)
    form.pack.pack(
        call.alive, call.number, call.signature.words,
        payload.rows, scale_at, payload.weights, slots, dst_counts, went, out_at, row_stride, stride, num_tokens,
    )  # fmt: skip
    form.pack.launch(form.sms.local, call.stream)


def _passed_on(form: MoveForm, rows_at: int, chunk: Chunk, routing: CrossingRouting | None) -> SendBuffers:
    """Return a chunk that came from another node, to be passed on; ``routing``: of a dispatch."""
    at, widths, scales, weights, ids, tokens = rows_at + chunk.at, form.widths, None, 0, 0, 0
    if widths.scale:
        scales = Scales(at + chunk.num * widths.row, form.kind.scale_columns, 1)
    if widths.weights:
        weights = at + chunk.num_bytes - chunk.num * widths.weights
    if routing is not None:
        ids = routing.ids + (chunk.node * routing.relay.segment + chunk.first) * routing.id_bytes
        tokens = routing.tokens + 4 * (routing.relay.first_in[chunk.node] + chunk.first)
    return SendBuffers(at, scales, weights, ids, tokens)
