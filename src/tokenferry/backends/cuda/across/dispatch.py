"""Dispatch and redispatch across nodes.

A row crosses the network once for each other node that it goes to, to the rank across there, which passes it on. So on
each rank the kernels of one node see, behind each other, the tokens of all ranks of its rail that go to this node: one
segment for each node. Rows of this node are moved while those of others are on their way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across.crossing import Crossing, Opening, RowTensors, States, empty_rows
from tokenferry.backends.cuda.across.forms import AcrossForm, MoveForm, MoveSizes, new_across_form, new_again_form
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.across.relay import (
    AcrossPlan,
    Chunk,
    Relay,
    RelayAddresses,
    fixed_relay,
    make_relay,
    relay_addresses,
    relay_layout,
)
from tokenferry.backends.cuda.across.split import Split, SplitCounts, Splitter
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, section_ends
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.dispatch import payload_of
from tokenferry.backends.cuda.forms import Payload, RecvOffsets, expand, move, row_kind, scale_of
from tokenferry.backends.cuda.launch import RowKind, address
from tokenferry.backends.cuda.plan import Counts
from tokenferry.backends.cuda.results import Arrivals, LazyDispatched, PlanForm, PlanLayout
from tokenferry.errors import ArgumentError, CapacityError
from tokenferry.kernels.codes import EXPERTS, MASKED, UNIT_TOKENS
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.topology import Topology
from tokenferry.types import Dispatched, DispatchOptions, Layout, MoeShape, Plan, Quantized

_MAX_FORMS = 256
_NONE_ARRIVED = Arrivals(0, 0, 0, 0, 0)


class Routed(NamedTuple):
    """The routing of all tokens that a rank passes on, its own included.

    Attributes:
        ids: ``[N * segment, K]``: their experts on this node; -1 in the padding of segments.
        tokens: Numbers of the tokens from other nodes, on the ranks that they come from.
        table: ``[units, E + R]`` int32 of the kernels of one node.
        bases: Likewise.
    """

    ids: Tensor
    tokens: Tensor
    table: Tensor
    bases: Tensor


class Passing(NamedTuple):
    """Rows on their way between nodes.

    Attributes:
        own: What this rank sends inside its node.
        rows: Rows from other nodes, when their exchange has ended.
        transfers: The exchanges, by the node that rows come from: one for each chunk.
        opening: What the ranks across from this one say.
        states: Their states when they sent rows.
        sent: Keeps what is being sent.
    """

    own: Payload
    rows: RowTensors
    transfers: dict[int, list[Transfer]]
    opening: Opening
    states: Tensor
    sent: RowTensors


class _Crossed(NamedTuple):
    """How many tokens cross in a dispatch.

    Attributes:
        num_tokens: Tokens of this rank, T.
        came: By node, tokens from the rank across there; empty if counts stay on the device.
        went: Tokens for each node, and rows for all ranks; None if counts stay on the device.
    """

    num_tokens: int
    came: tuple[int, ...]
    went: SplitCounts | None


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
        self._splitter = Splitter(context, topology)
        self._forms: BoundedDict[tuple[Any, ...], AcrossForm] = BoundedDict(_MAX_FORMS)
        self._again: BoundedDict[MoveSizes, MoveForm] = BoundedDict(_MAX_FORMS)

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Make a plan and send rows along it."""
        index, weights = request.routing.topk_idx, request.routing.topk_weights
        rows, scale = payload_of(request.x)
        kind = row_kind(rows, scale, weighted=weights is not None, topk_idx=index, top_k=index.shape[1])
        form = self._form(request.shape, request.options, kind, request.num_sms)
        call = self._crossing.begin(form.rows.signature)
        tight = form.geometry.space.tight
        if call.capturing and (form.waits or tight):
            raise ArgumentError(
                "dispatch: options: across nodes the host waits for the device, which a CUDA graph cannot capture; use "
                'DispatchOptions(counts="device") without a capacity'
            )
        payload = Payload(rows.data_ptr(), scale, address(weights), index.data_ptr())
        split = self._splitter.split(form.split, call, index, form.rows.sms.local)
        went = self._splitter.wait(call) if form.waits else None
        with self._context.breaking_off():  # peers wait for this rank
            opening = self._crossing.open(call, split.headers)
            came = self._crossing.counts(call, opening, index.shape[0]) if form.waits else ()
            plan = self._new_plan(form, call, split, _Crossed(index.shape[0], came, went))
            at = relay_addresses(plan, self._topology)
            routed, coming = self._route(form, call, split, plan, payload)
            passing = None if tight else self._send_rows(form.rows, call, at, payload, opening)
            if not form.waits:
                self._crossing.confirm(call, opening, split.dst_counts.data_ptr())
            coming.join()
            self._notify(form, call, plan, routed)
        counts = cuda_plan.wait(self._context, call, form.geometry) if form.waits or tight else None
        if tight:
            with self._context.breaking_off(CapacityError):
                self._check_capacity(form, call)
        with self._context.breaking_off():
            passing = passing or self._send_rows(form.rows, call, at, payload, opening)
            result, recv = self._recv(form, call, plan, counts)
            self._assign(form, call, plan, routed)
            no_counts = self._crossing.no_counts(plan)
            at = relay_addresses(plan, self._topology)._replace(no_counts=no_counts.data_ptr())
            self._move(form.rows, call, at, passing, recv, routed)
            self._expand(form.rows, call, at, result, plan)
        return result

    def _form(self, shape: MoeShape, options: DispatchOptions, kind: RowKind, num_sms: int | None) -> AcrossForm:
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
            found = new_across_form(self._context, self._topology, plan, shape, kind, num_sms)
            self._forms[key] = found
        return found

    def _new_plan(self, form: AcrossForm, call: Call, split: Split, crossed: _Crossed) -> AcrossPlan:
        """Take the memory for a plan of so many tokens."""
        plan, geometry, node = object.__new__(AcrossPlan), form.geometry, self._topology.node
        num_tokens, counts = crossed.num_tokens, crossed.went
        if counts is None:
            relay = fixed_relay(node, self._topology.num_nodes, geometry.shape.max_tokens, num_tokens)
            num_sent = num_tokens * geometry.space.sent
        else:
            went = (num_tokens if m == node else num for m, num in enumerate(counts.went))
            relay, num_sent = make_relay(node, crossed.came, tuple(went), 0), counts.num_sent  # `most`: not known yet
        plan._form, plan._dst_counts, plan._relay, plan._made = form.plan, split.dst_counts, relay, {}
        columns = num_columns(self._context.num_ranks, form.plan.top_k, by_expert=geometry.by_expert)
        plan._relay_layout = relay_layout(relay, num_tokens, self._context.num_ranks, columns)
        num_offsets = geometry.num_local + 1 if geometry.layout == EXPERTS else 0
        src_at, counts_at, offsets_at, places_at, end = section_ends(
            8 * num_sent,
            8 * form.plan.num_ranks,
            4 * geometry.num_local,
            4 * num_offsets,
            4 * plan._relay_layout.num_words,
        )
        plan._layout = PlanLayout(
            num_tokens, num_sent, columns, 0, 0, src_at, counts_at, offsets_at, places_at, 0, 0, end
        )
        plan._num_sent, plan._recv_at, plan._arrivals = num_sent, 0, _NONE_ARRIVED
        plan._block = self._allocator.call_block(call, end)
        if counts is None:  # a CUDA graph cannot capture a copy from the host
            header = plan._places[: 2 * relay.num_nodes + 1, 0]
            header.fill_(geometry.shape.max_tokens)[: 2 * relay.num_nodes][node :: relay.num_nodes].fill_(num_tokens)
        return plan

    def _route(
        self, form: AcrossForm, call: Call, split: Split, plan: AcrossPlan, payload: Payload
    ) -> tuple[Routed, Transfer]:
        """Write the routing for each node, and begin to exchange it."""
        relay, device, K = plan._relay, self._context.device, form.plan.top_k
        num_nodes, num_in, num_out = relay.num_nodes, relay.first_in[-1], relay.first_out[-1]
        ids = torch.full((num_nodes * relay.segment, K), -1, dtype=form.plan.topk_dtype, device=device)
        ids_out = torch.empty(num_out, K, dtype=form.plan.topk_dtype, device=device)
        if not form.waits:  # more rows are sent than have a token
            ids_out.fill_(-1)
        tokens_out = torch.empty(num_out, dtype=torch.int32, device=device)
        tokens_in = torch.empty(num_in, dtype=torch.int32, device=device)
        columns = form.geometry.shape.num_experts // num_nodes + self._context.num_ranks
        table = torch.empty(num_units(len(ids)), columns, dtype=torch.int32, device=device)
        bases = torch.empty(num_nodes * (columns + self._context.num_ranks), dtype=torch.int32, device=device)
        num_tokens = plan.num_tokens
        if num_tokens:
            start = plan._block.address
            form.rails.pack(
                0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
                payload.topk_idx, split.table.data_ptr(), split.bases.data_ptr(), split.dst_counts.data_ptr(),
                start + plan._layout.places + 4 * plan._relay_layout.slots,
                ids[relay.node * relay.segment :].data_ptr(), ids_out.data_ptr(), tokens_out.data_ptr(),
                start + plan._layout.dst_token, num_tokens,
            )  # fmt: skip
            form.rails.launch(min(num_units(num_tokens), form.rows.sms.local), call.stream)
        coming = self._crossing.routing(call, relay, (ids_out, tokens_out), (ids, tokens_in))
        return Routed(ids, tokens_in, table, bases), coming

    def _notify(self, form: AcrossForm, call: Call, plan: AcrossPlan, routed: Routed) -> None:
        """Count the rows of all segments inside the node, and exchange the counts there."""
        layout, start, notify = plan._layout, plan._block.address, form.notify
        notify.params.segment_units = plan._relay.segment // UNIT_TOKENS
        notify.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            routed.ids.data_ptr(), routed.table.data_ptr(), routed.bases.data_ptr(), self._relayed(plan),
            start + layout.src_counts, start + layout.expert_counts,
            start + layout.expert_offsets if form.geometry.layout == EXPERTS else 0, len(routed.ids),
        )  # fmt: skip
        notify.launch(min(num_units(len(routed.ids)), form.rows.sms.links), call.stream)

    def _assign(self, form: AcrossForm, call: Call, plan: AcrossPlan, routed: Routed) -> None:
        """Compute the places of the rows of all segments."""
        assign, places = form.assign, plan._layout.places + 4 * plan._relay_layout.places
        assign.params.segment_units = plan._relay.segment // UNIT_TOKENS
        assign.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            routed.ids.data_ptr(), routed.table.data_ptr(), routed.bases.data_ptr(), self._relayed(plan),
            plan._block.address + places, 0, len(routed.ids),
        )  # fmt: skip
        assign.launch(min(num_units(len(routed.ids)), form.rows.sms.links), call.stream)

    def _relayed(self, plan: AcrossPlan) -> int:
        return plan._block.address + plan._layout.places + 4 * plan._relay_layout.relayed

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
        self, form: AcrossForm, call: Call, plan: AcrossPlan, counts: Counts | None
    ) -> tuple[LazyDispatched, RecvOffsets]:
        """Take the memory for what a dispatch receives."""
        geometry, kind, allocator = form.geometry, form.rows.kind, self._allocator
        assert kind.topk_dtype is not None
        if form.waits and counts is not None:
            plan._relay = relay = replace(plan._relay, most=UNIT_TOKENS * self._context.pinned.most_units)
            sizes = torch.tensor((*relay.came, *relay.went, relay.most), dtype=torch.int32, device="cpu")
            plan._places[: len(sizes), 0].copy_(sizes)
            plan._num_rows = plan.num_received = counts.received
            plan.num_delivered, plan._counted = counts.delivered, counts.experts
        else:
            plan._num_rows, plan.num_delivered = geometry.space.received, geometry.most_delivered
            plan.num_received = plan._counted = None
        plan._arrivals = arrivals = cuda_plan.arrivals(geometry, plan._num_rows, kind.top_k, kind.topk_dtype)
        plan._recv_block = allocator.call_block(call, arrivals.num_bytes)
        plan._recv_at = plan._recv_block.address
        result, recv = self._recv_rows(plan, kind, call)
        came = plan._recv_block.offset
        return result, recv._replace(
            topk_idx=(came + arrivals.topk_idx) // OFFSET_BYTES,
            src_token=(came + arrivals.src_token) // OFFSET_BYTES,
            row_idx=(came + arrivals.row_idx) // OFFSET_BYTES,
        )

    # ------------------------------------------------------------------ redispatch

    def redispatch(self, request: RedispatchRequest) -> Dispatched[Tensor | Quantized]:
        """Send rows along an existing plan."""
        plan, weights = request.plan, request.topk_weights
        rows, scale = payload_of(request.x)
        at = relay_addresses(plan, self._topology)
        kind = row_kind(rows, scale, weighted=weights is not None, topk_idx=None, top_k=at.whole.top_k)
        num_local = at.whole.num_local
        capacity = plan.num_delivered // num_local if plan.options.layout is Layout.MASKED else 0
        sizes = MoveSizes(request.shape, plan.options, kind, num_local, capacity, request.num_sms)
        form = self._again.get(sizes)
        if form is None:
            form = self._again[sizes] = new_again_form(self._context, self._topology, sizes)
        call = self._crossing.begin(form.signature)
        with self._context.breaking_off():
            opening = self._crossing.open_along(call, at.went, at.came)
            passing = self._send_rows(form, call, at, Payload(rows.data_ptr(), scale, address(weights), 0), opening)
            result, recv = self._recv_rows(plan, kind, call)
            no_counts = self._crossing.no_counts(plan)
            at = at._replace(no_counts=no_counts.data_ptr())
            self._move(form, call, at, passing, recv, None)
            self._expand(form, call, at, result, plan)
        return result

    # ------------------------------------------------------------------ both

    def _send_rows(self, form: MoveForm, call: Call, at: RelayAddresses, payload: Payload, opening: Opening) -> Passing:
        """Begin to send the rows that go to other nodes."""
        relay, kind, device = at.relay, form.kind, self._context.device
        out = empty_rows(kind, relay.first_out[-1], device)
        if relay.first_out[-1]:
            scale_at, row_stride, stride = scale_of(payload)
            form.pack.pack(
                0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
                payload.rows, scale_at, payload.weights, at.slots, at.dst_counts,
                out.rows.data_ptr(), address(out.scale), address(out.weights), row_stride, stride, at.whole.num_tokens,
            )  # fmt: skip
            form.pack.launch(form.sms.local, call.stream)
        into = empty_rows(kind, relay.first_in[-1], device)
        states = self._crossing.new_states(relay.came, self._crossing.chunks(kind.row_bytes))
        return Passing(payload, into, self._crossing.rows(call, relay, out, into, states), opening, states, out)

    def _recv_rows(self, plan: Plan, kind: RowKind, call: Call) -> tuple[LazyDispatched, RecvOffsets]:
        """Take the memory for received rows."""
        result = object.__new__(LazyDispatched)
        result.plan, result._device, result._made = plan, self._context.device, {}
        result._layout = layout = cuda_plan.row_layout(plan.options.layout, kind, plan.num_delivered)
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
        at: RelayAddresses,
        passing: Passing,
        recv: RecvOffsets,
        routed: Routed | None,
    ) -> None:
        """Move the rows of this rank inside its node, then those from each other node as soon as they are here."""
        relay, node, sms = at.relay, at.relay.node, form.sms.links
        ids = 0 if routed is None else routed.ids[node * relay.segment :].data_ptr()
        move(form.move, call, sms, recv, passing.own._replace(topk_idx=ids), at.segment(node))
        if routed is None:  # a dispatch has done this before it waited for the routing
            self._crossing.confirm(call, passing.opening, at.whole.src_counts)
        for source, transfers in passing.transfers.items():
            chunks = self._crossing.chunks(form.kind.row_bytes)
            used = chunks.used(relay.most)
            for i, (chunk, transfer) in enumerate(zip(chunks.split(relay.came[source]), transfers, strict=True)):
                transfer.join()
                if chunk.num:
                    states = States.of_chunk(passing.states, source, i)
                    self._crossing.check(call, passing.opening, states, at.whole.src_counts)
                if i >= used:  # no rank of this node has tokens in it
                    continue
                payload = _payload_from(relay, source, chunk, passing.rows, routed)
                plan = at.segment(source) if chunks.num == 1 else at.chunk(source, chunk)
                move(form.pass_on, call, sms, recv, payload, plan)

    def _expand(self, form: MoveForm, call: Call, at: RelayAddresses, result: LazyDispatched, plan: Plan) -> None:
        """Lay out rows by expert, and leave the heap where it has no room."""
        block = result._block
        assert block is not None
        if form.expand is not None:
            expand(form.expand, call, form.sms.local, block, result._layout, at.whole, plan.num_delivered)
        if result.leaves_block:
            result.leave_block()


def _payload_from(relay: Relay, node: int, chunk: Chunk, rows: RowTensors, routed: Routed | None) -> Payload:
    """Return a chunk of what came from a node, to be passed on."""
    ids = tokens = 0
    if routed is not None:
        ids = routed.ids[node * relay.segment + chunk.first :].data_ptr()
        tokens = chunk.of(relay.part_in(routed.tokens, node)).data_ptr()
    scale = None if rows.scale is None else chunk.of(relay.part_in(rows.scale, node))
    weights = None if rows.weights is None else chunk.of(relay.part_in(rows.weights, node))
    return Payload(chunk.of(relay.part_in(rows.rows, node)).data_ptr(), scale, address(weights), ids, tokens)
