"""Dispatch and redispatch across nodes.

A row crosses the network once for each other node that it goes to, to the rank across there, which passes it on. So on
each rank the kernels of one node see, behind each other, the tokens of all ranks of its rail that go to this node: one
segment for each node. Rows of this node are moved while those of others are on their way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import DispatchRequest, RedispatchRequest
from tokenferry.backends.cuda import plan as cuda_plan
from tokenferry.backends.cuda.across.crossing import Crossing, Opening, RowMemory, States
from tokenferry.backends.cuda.across.forms import AcrossForm, MoveForm, MoveSizes, new_across_form, new_again_form
from tokenferry.backends.cuda.across.rails import Rows, Transfer
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
from tokenferry.backends.cuda.forms import Payload, RecvOffsets, Scales, expand, move, row_kind, scale_of
from tokenferry.backends.cuda.launch import RowKind, address
from tokenferry.backends.cuda.plan import Counts
from tokenferry.backends.cuda.results import Arrivals, LazyDispatched, PlanForm, PlanLayout
from tokenferry.errors import ArgumentError, CapacityError
from tokenferry.kernels.codes import EXPERTS, MASKED, UNIT_TOKENS
from tokenferry.kernels.control_block import OFFSET_BYTES
from tokenferry.kernels.dispatch_assign.spec import num_columns
from tokenferry.kernels.dispatch_notify.spec import num_units
from tokenferry.memory.tensor import tensor_at
from tokenferry.topology import Topology
from tokenferry.types import Dispatched, DispatchOptions, Layout, MoeShape, Plan, Quantized

_MAX_FORMS = 256
_NONE_ARRIVED = Arrivals(0, 0, 0, 0, 0)


class Routed(NamedTuple):
    """The routing of all tokens that a rank passes on, its own included.

    Attributes:
        memory: Holds all of it.
        ids: ``[num, K]``: their experts on this node; -1 in the padding of segments.
        num: N * segment.
        tokens: Numbers of the tokens from other nodes, on the ranks that they come from.
        table: Address of ``[units, E + R]`` int32 of the kernels of one node.
        bases: Likewise.
    """

    memory: Tensor
    ids: Rows
    num: int
    tokens: Rows
    table: int
    bases: int


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
    rows: RowMemory
    transfers: dict[int, list[Transfer]]
    opening: Opening
    states: Tensor
    sent: RowMemory


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
            opening = self._crossing.open(call, split.headers, split.memory)
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
            self._move(form.rows, call, plan, passing, recv, routed)
            self._expand(form.rows, call, result, plan)
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
        relay, num_ranks, num_tokens = plan._relay, self._context.num_ranks, plan.num_tokens
        num_nodes, num_in, num_out = relay.num_nodes, relay.first_in[-1], relay.first_out[-1]
        num, id_bytes = num_nodes * relay.segment, form.plan.top_k * form.plan.topk_dtype.itemsize
        columns = form.geometry.shape.num_experts // num_nodes + num_ranks
        ids_out_at, tokens_out_at, tokens_in_at, table_at, bases_at, end = section_ends(
            num * id_bytes, num_out * id_bytes, 4 * num_out, 4 * num_in,
            4 * num_units(num) * columns, 4 * num_nodes * (columns + num_ranks),
        )  # fmt: skip
        memory = self._context.empty((end,), (1,), torch.uint8)
        # All bytes of -1 are 255. Where no host waits, more rows are sent than have a token.
        memory[: ids_out_at if form.waits else tokens_out_at].fill_(255)
        at = memory.data_ptr()
        ids, ids_out, tokens_out = Rows(at, id_bytes), Rows(at + ids_out_at, id_bytes), Rows(at + tokens_out_at, 4)
        tokens_in = Rows(at + tokens_in_at, 4)
        if num_tokens:
            start = plan._block.address
            form.rails.pack(
                0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
                payload.topk_idx, split.table, split.bases, split.dst_counts.data_ptr(),
                start + plan._layout.places + 4 * plan._relay_layout.slots,
                ids.at(relay.node * relay.segment), ids_out.address, tokens_out.address,
                start + plan._layout.dst_token, num_tokens,
            )  # fmt: skip
            form.rails.launch(min(num_units(num_tokens), form.rows.sms.local), call.stream)
        coming = self._crossing.routing(call, relay, (ids_out, tokens_out), (ids, tokens_in), memory)
        return Routed(memory, ids, num, tokens_in, at + table_at, at + bases_at), coming

    def _notify(self, form: AcrossForm, call: Call, plan: AcrossPlan, routed: Routed) -> None:
        """Count the rows of all segments inside the node, and exchange the counts there."""
        layout, start, notify = plan._layout, plan._block.address, form.notify
        notify.params.segment_units = plan._relay.segment // UNIT_TOKENS
        notify.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            routed.ids.address, routed.table, routed.bases, self._relayed(plan),
            start + layout.src_counts, start + layout.expert_counts,
            start + layout.expert_offsets if form.geometry.layout == EXPERTS else 0, routed.num,
        )  # fmt: skip
        notify.launch(min(num_units(routed.num), form.rows.sms.links), call.stream)

    def _assign(self, form: AcrossForm, call: Call, plan: AcrossPlan, routed: Routed) -> None:
        """Compute the places of the rows of all segments."""
        assign, places = form.assign, plan._layout.places + 4 * plan._relay_layout.places
        assign.params.segment_units = plan._relay.segment // UNIT_TOKENS
        assign.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            routed.ids.address, routed.table, routed.bases, self._relayed(plan),
            plan._block.address + places, 0, routed.num,
        )  # fmt: skip
        assign.launch(min(num_units(routed.num), form.rows.sms.links), call.stream)

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
            plan._relay = relay = plan._relay._replace(most=UNIT_TOKENS * self._context.pinned.most_units)
            sizes = torch.tensor((*relay.came, *relay.went, relay.most), dtype=torch.int32, device="cpu")
            at = plan._block.address + plan._layout.places
            tensor_at(at, (len(sizes),), torch.int32, self._context.device, plan._block).copy_(sizes)
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
            self._move(form, call, plan, passing, recv, None)
            self._expand(form, call, result, plan)
        return result

    # ------------------------------------------------------------------ both

    def _send_rows(self, form: MoveForm, call: Call, at: RelayAddresses, payload: Payload, opening: Opening) -> Passing:
        """Begin to send the rows that go to other nodes."""
        relay, kind, context = at.relay, form.kind, self._context
        out = RowMemory.empty(context, kind, relay.first_out[-1])
        if relay.first_out[-1]:
            scale_at, row_stride, stride = scale_of(payload)
            form.pack.pack(
                0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
                payload.rows, scale_at, payload.weights, at.slots, at.dst_counts,
                out.rows.address, out.scale.address if out.scale else 0, out.weights.address if out.weights else 0,
                row_stride, stride, at.whole.num_tokens,
            )  # fmt: skip
            form.pack.launch(form.sms.local, call.stream)
        into = RowMemory.empty(context, kind, relay.first_in[-1])
        states = self._crossing.new_states(call, relay.came, self._crossing.chunks(kind.row_bytes))
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
        plan: Plan,
        passing: Passing,
        recv: RecvOffsets,
        routed: Routed | None,
    ) -> None:
        """Move the rows of this rank inside its node, then those from each other node as soon as they are here."""
        at = relay_addresses(plan, self._topology)
        relay, node, sms = at.relay, at.relay.node, form.sms.links
        ids = 0 if routed is None else routed.ids.at(node * relay.segment)
        move(form.move, call, sms, recv, passing.own._replace(topk_idx=ids), at.segment(node))
        if routed is None:  # a dispatch has done this before it waited for the routing
            self._crossing.confirm(call, passing.opening, at.whole.src_counts)
        chunks = self._crossing.chunks(form.kind.row_bytes)
        used = chunks.used(relay.most)
        no_counts = self._crossing.no_counts(plan) if used > 1 else None
        at = at._replace(no_counts=address(no_counts))
        for source, transfers in passing.transfers.items():
            for i in range(max(used, len(transfers))):
                chunk = chunks.chunk(relay.came[source], i)
                if i < len(transfers):
                    transfers[i].join()
                if chunk.num:
                    states = States.of_chunk(passing.states, source, i)
                    self._crossing.check(call, passing.opening, states, at.whole.src_counts)
                if i >= used:  # no rank of this node has tokens in it
                    continue
                part = at.segment(source) if used == 1 else at.chunk(source, chunk)
                move(form.pass_on, call, sms, recv, _payload_from(relay, source, chunk, passing.rows, routed), part)

    def _expand(self, form: MoveForm, call: Call, result: LazyDispatched, plan: Plan) -> None:
        """Lay out rows by expert, and leave the heap where it has no room."""
        block = result._block
        assert block is not None
        if form.expand is not None:
            whole = relay_addresses(plan, self._topology).whole
            expand(form.expand, call, form.sms.local, block, result._layout, whole, plan.num_delivered)
        if result.leaves_block:
            result.leave_block()


def _payload_from(relay: Relay, node: int, chunk: Chunk, rows: RowMemory, routed: Routed | None) -> Payload:
    """Return a chunk of what came from a node, to be passed on."""
    first, ids, tokens = relay.first_in[node] + chunk.first, 0, 0
    if routed is not None:
        ids, tokens = routed.ids.at(node * relay.segment + chunk.first), routed.tokens.at(first)
    scale, weights = rows.scale, rows.weights
    scales = None if scale is None else Scales(scale.at(first), rows.scales, 1)
    return Payload(rows.rows.at(first), scales, 0 if weights is None else weights.at(first), ids, tokens)
