"""Decode calls across nodes: fixed capacity, no waiting host, so that a CUDA graph can capture them.

A token crosses once for each other node that it goes to, to the rail peer there, which acts for it as for its own
tokens: it passes the row on inside its node, and adds up what the node sends back. What crosses has the same size in
every call: a segment of slots for each node, used or not.

A call with a hook sends what is this rank's own, and returns. What a rank does for others has to wait for other nodes;
it is left to the hook, or to the beginning of the next call, whichever comes first, so that all ranks make their
exchanges in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, Encoding, no_hook
from tokenferry.backends.cuda import patience
from tokenferry.backends.cuda.across.decode_forms import (
    AcrossDispatchForm,
    dispatch_signature,
    new_across_dispatch,
    rail_sizes,
    sizes_of,
)
from tokenferry.backends.cuda.across.decode_sums import DecodeSumForm, NodeSums, SumKind
from tokenferry.backends.cuda.across.messages import MessageRails, Messages
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.channel import PendingRecv
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.decode import Decoding, PlanParts, check_limits, parts_of, prepared_choices
from tokenferry.backends.cuda.decode_forms import (
    CombineKind,
    DecodeDispatchForm,
    DispatchKind,
    LazyDecodeDispatched,
    LazyDecodePlan,
)
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspace, Workspaces
from tokenferry.backends.tensors import drop_ranks, may_write_to
from tokenferry.kernels.decode_words import RECEIVE, SEND
from tokenferry.memory.empty import part_of
from tokenferry.topology import Topology
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodeStats, Quantized, Routing

_MAX_FORMS = 256


@dataclass(slots=True, eq=False)
class _RowsUnderWay:
    """A dispatch.

    Attributes:
        plan: Its plan.
        x: The rows of this rank.
        data: Where rows arrive.
        scale: Where their scales do, or None.
        weights: Weights of this rank's tokens, or None.
        memory: What it takes besides; see `RecordMemory`.
        stats: Counters.
        trace: Where kernels write time stamps, or None.
        transfer: The exchange.
    """

    plan: LazyDecodePlan
    x: Tensor
    data: Tensor
    scale: Tensor | None
    weights: Tensor | None
    memory: Tensor
    stats: DecodeStats
    trace: Tensor | None
    transfer: Transfer | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all of its tensors."""
        return (
            self.plan._words, self.plan.topk_idx, self.x, self.data, self.scale, self.weights, self.memory, self.trace,
            self.stats.received, self.stats.wait_ns,
        )  # fmt: skip


class AcrossDecoder(Decoding):
    """Decode calls of one rank, across nodes.

    Args:
        context: Context of this rank, in its node.
        allocator: Allocator of blocks of the heap.
        topology: The nodes.
        rails: What carries messages to other nodes.
        key: Key of the group, which its plans carry.
        explain: Raises an error of a hook, or one that names the ranks at fault.
    """

    def __init__(
        self,
        context: Context,
        allocator: SymmetricAllocator,
        topology: Topology,
        rails: MessageRails,
        key: str,
        explain: Callable[[Exception], NoReturn],
    ) -> None:
        super().__init__(context, allocator, key)
        self.workspaces = Workspaces(context, allocator, topology.num_nodes, rails.nodes_without)
        self._topology = topology
        self._first_rank = topology.nodes[topology.node][0]
        self._breaking_off = context.breaking_off()
        self._rails = rails
        self._explain = explain
        self._sums = NodeSums(context, topology, rails)
        self._across: BoundedDict[DispatchKind, AcrossDispatchForm] = BoundedDict(_MAX_FORMS)
        self._sum_forms: BoundedDict[SumKind, DecodeSumForm] = BoundedDict(_MAX_FORMS)

    @property
    def caught_up(self) -> bool:
        """Whether `catch_up` would do nothing."""
        return self._channels[0].caught_up

    def catch_up(self, phase: str) -> None:
        """Receive the earlier call whose hook has not been called yet, before another call begins.

        Raises:
            ArgumentError: a CUDA graph is being captured, and the hook belongs to a call outside of it.
        """
        channel = self._channels[0]
        if not channel.caught_up:
            channel.receive_all(phase, capturing=self._context.order_after_calls()[1] != 0)

    def waits_of(self, stats: DecodeStats) -> int:
        """See `Decoding.waits_of`; kernels wait for the ranks of this node, from its first on."""
        return 0 if stats.wait_ns is None else stats.wait_ns.data_ptr() + 8 * self._first_rank

    def without_masked(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        """See `Decoding.without_masked`; ranks that this one does not reach are left out, too."""
        num_local = num_experts // self._topology.num_ranks
        return drop_ranks(topk_idx, self._rails.unreachable(), num_local).contiguous()

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """Send rows, and receive rows, or return a hook that receives them."""
        context, shape, routing = self._context, request.shape, request.routing
        x, topk_idx, weights = aligned(request.x), routing.topk_idx, routing.topk_weights
        topk_idx = self.without_masked(topk_idx, shape.num_experts)
        weights = None if weights is None else weights.contiguous()
        kind = DispatchKind(shape, x.dtype, request.quantize, topk_idx.dtype, weights is not None)
        form = self._across.get(kind)
        if form is None:
            check_limits(shape)
            signature = dispatch_signature(kind)
            seen = rail_sizes(shape, self._topology).shape(shape.num_experts, shape.hidden)
        else:
            signature, seen = form.signature, form.seen
        call = self._begin(signature, request.stats)
        workspace = self.workspaces.fitting(call, seen, x.element_size())
        if form is None or form.workspace != workspace.number:
            form = new_across_dispatch(context, self._key, self._topology, workspace, kind)
            if context.mask_late:
                p = form.inside.kernel.params
                p.timeout_ns = int(patience.ROWS_INSIDE * p.timeout_ns)
            self._rails.check(signature.phase, form.body_bytes)
            self._across[kind] = form
        routed = Routing(topk_idx, weights)
        return self.send(form, call, x, routed, routing.topk_weights, request.stats, return_hook=request.return_hook)

    def known_dispatch(self, kind: DispatchKind) -> AcrossDispatchForm | None:
        """See `Decoding.known_dispatch`."""
        form = self._across.get(kind)
        return form if form is not None and form.workspace == self.workspaces.number else None

    def send(
        self,
        form: AcrossDispatchForm,
        call: Call,
        x: Tensor,
        routing: Routing,
        weights_of_plan: Tensor | None,
        stats: DecodeStats,
        *,
        return_hook: bool,
    ) -> DecodeDispatched[Any]:
        """See `Decoding.send`."""
        inside, empty, index = form.inside, self._context.empty, routing.topk_idx
        result, plan = object.__new__(LazyDecodeDispatched), object.__new__(LazyDecodePlan)
        plan._form, plan._words, plan._made, plan._call_number = inside, empty(*inside.words), {}, 0
        plan._pending = None  # the next call, which a combine is, receives
        plan.num_tokens, plan.topk_idx, plan.topk_weights = index.shape[0], index, weights_of_plan
        # Memory is taken before anything is sent: if there is none, the group is still whole.
        if return_hook:
            x = x.clone()  # it is the caller's again before the hook reads it
        data, scale = empty(*inside.rows), None if inside.scale is None else empty(*inside.scale)
        memory = empty((form.memory.num_bytes,), (1,), torch.uint8)
        result.x = data if scale is None else Quantized(data, scale)
        result.plan, result.hook = plan, no_hook
        rows = _RowsUnderWay(plan, x, data, scale, routing.topk_weights, memory, stats, self.trace)
        with self._breaking_off:  # peers wait for this rank
            self._send_across(form, call, rows)
            if return_hook:
                result.hook = self._hook(call, lambda at: self._pass_on(form, at, rows), rows.tensors())
            else:
                self._pass_on(form, call, rows)
        return result

    def _send_across(self, form: AcrossDispatchForm, call: Call, rows: _RowsUnderWay) -> None:
        """Begin to exchange rows with other nodes."""
        sizes, plan, parts, at = form.sizes, rows.plan, form.memory, rows.memory.data_ptr()
        words, own = parts.words, 4 * sizes.num_relayed * sizes.top_k
        table = plan._words.data_ptr() + 4 * form.inside.layout.table
        form.pack.pack(
            call.alive, call.number, call.signature.words,
            rows.x.data_ptr(), plan.topk_idx.data_ptr(), address(rows.weights), at + parts.sent,
            table + 4 * sizes.slots, table + 4 * sizes.number, table + 4 * sizes.ids + own,
            0 if rows.weights is None else at + parts.weights + own,
            at + words.mine, at + words.came, at + words.states, at + words.overflows, 0, plan.num_tokens,
        )  # fmt: skip
        form.pack.launch(self.num_blocks, call.stream)
        messages = Messages(
            at + words.mine, at + words.came, at + parts.sent, at + parts.came, form.body_bytes, at + words.states, 0
        )
        rows.transfer = self._rails.exchange(call, messages, rows.memory, patience.ROWS_ACROSS)

    def _pass_on(self, form: AcrossDispatchForm, call: Call, rows: _RowsUnderWay) -> None:
        """Pass rows on inside the node when they have come from other nodes, and receive rows."""
        assert rows.transfer is not None
        inside, sizes, plan, parts, at = form.inside, form.sizes, rows.plan, form.memory, rows.memory.data_ptr()
        words, layout = parts.words, inside.layout
        since = self._rails.join(call, rows.transfer, at + words.since)
        start, num_tokens = plan._words.data_ptr(), sizes.num_relayed + plan.num_tokens
        table = start + 4 * layout.table
        head = (call.wait_ns, call.alive, call.number, call.signature.words)
        ids, came, overflows = table + 4 * sizes.ids, at + parts.came, at + words.overflows
        weights = 0 if rows.weights is None else at + parts.weights
        form.unpack.pack(
            *head, at + words.came, at + words.states, came, ids, weights, overflows, 0, since, sizes.num_nodes
        )
        form.unpack.launch(self.num_blocks, call.stream)
        choices = None
        if 2 * num_tokens * sizes.top_k > inside.kept_bytes:
            routing = part_of(plan._words, layout.table + sizes.ids, (num_tokens, sizes.top_k), (sizes.top_k, 1))
            choices = prepared_choices(routing, inside.shape.num_experts // sizes.num_nodes, inside.kept_bytes)
        inside.kernel.pack(
            *head, rows.x.data_ptr(), ids, weights, address(choices),
            rows.data.data_ptr(), address(rows.scale), start + 4 * layout.expert_counts, address(rows.stats.received),
            start + 4 * layout.src_token, start + 4 * layout.src_range,
            start + 4 * layout.row_weights if inside.weighted else 0, table,
            self._context.pinned.masked_address, address(rows.trace), num_tokens, SEND | RECEIVE, came, overflows,
        )  # fmt: skip
        inside.kernel.launch(self.num_blocks, call.stream)

    # ------------------------------------------------------------------ combine

    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """Send rows back, and receive and add up, or return a hook that does."""
        plan, y, out = request.plan, aligned(request.y), request.out
        assert plan._table is not None
        assert plan.topk_weights is not None
        of = SumKind(
            plan._table.numel(), plan.num_experts, plan.topk_idx.shape[1], y.shape, y.dtype, request.fast,
            request.encoding,
        )  # fmt: skip
        form = self._sum_forms.get(of)
        if form is None:
            sizes = sizes_of(plan, self._topology, y.shape[1] // self._topology.num_ranks)
            seen = sizes.shape(plan.num_experts, y.shape[2])
            signature = CombineKind(seen, y.dtype, request.fast, request.encoding, torch.int32).signature()
        else:
            sizes, seen, signature = form.sizes, form.seen, form.signature
        call = self._begin(signature, request.stats)
        workspace = self.workspaces.fitting(call, seen, y.element_size())
        if form is None or form.workspace != workspace.number:
            form = self._sums.form(of, sizes, seen, signature, workspace)
            self._rails.check(signature.phase, sizes.segment * max(form.row_bytes, 4 * sizes.top_k))
            self._sum_forms[of] = form
        if out is not None and (out.data_ptr() % 16 or not may_write_to(out, y)):
            out = None
        parts = parts_of(plan, plan.topk_weights.contiguous(), request.stats.wait_ns)
        copy_to = None if request.out is out else request.out
        return self.send_back(form, call, y, parts, out, copy_to, return_hook=request.return_hook)

    def known_combine(
        self, of: DecodeDispatchForm, y: Tensor, topk_dtype: torch.dtype, encoding: Encoding, *, fast: bool
    ) -> DecodeSumForm | None:
        """See `Decoding.known_combine`."""
        del topk_dtype  # the kernels see the routing that `decode_unpack` has written
        shape = of.shape
        kind = SumKind(of.layout.table_words, shape.num_experts, shape.top_k, y.shape, y.dtype, fast, encoding)
        form = self._sum_forms.get(kind)
        return form if form is not None and form.workspace == self.workspaces.number else None

    def send_back(
        self,
        form: DecodeSumForm,
        call: Call,
        y: Tensor,
        plan: PlanParts,
        out: Tensor | None,
        copy_to: Tensor | None,
        *,
        return_hook: bool,
    ) -> DecodeCombined:
        """See `Decoding.send_back`."""
        # Memory is taken before anything is sent: if there is none, the group is still whole.
        sums = self._sums.new(form, y, plan, out, copy_to, return_hook=return_hook)
        done = sums.out if copy_to is None else copy_to
        sums.trace = self.trace
        with self._breaking_off:  # peers wait for this rank
            self._sums.send(form, call, sums)
            if not return_hook:
                self._sums.receive(form, call, sums)
                return DecodeCombined(done, no_hook)
            hook = self._hook(call, lambda at: self._sums.receive(form, at, sums), sums.tensors())
        return DecodeCombined(done, hook)

    # ------------------------------------------------------------------ both

    def _begin(self, signature: Signature, stats: DecodeStats) -> Call:
        """Begin a call."""
        self.catch_up(signature.phase)
        return self._rails.begin(signature, self.waits_of(stats))

    def _hook(
        self, call: Call, receive: Callable[[Call], None], tensors: tuple[Tensor | None, ...]
    ) -> Callable[[], None]:
        """Return a hook that does the rest of a call."""
        channel = self._channels[0]

        def launch(at: Call, _kept: Workspace | None = self.workspaces.now) -> None:
            with self._breaking_off:  # peers wait for this rank
                receive(at)

        pending = PendingRecv(call, launch, tensors)
        channel.sent(pending)

        def hook() -> None:
            try:
                channel.receive(pending)
            except Exception as error:  # noqa: BLE001 - raised again
                self._explain(error)

        return hook
