"""Decode calls across nodes: fixed capacity, no waiting host, so that a CUDA graph can capture them.

A token crosses once for each other node that it goes to, to the rank across there, which acts for it as for its own
tokens: it passes the row on inside its node, and adds up what the node sends back. What crosses has the same size in
every call: a segment of slots for each node, used or not.

A call with a hook sends what is this rank's own, and returns. What a rank does for others has to wait for other nodes;
it is left to the hook, or to the beginning of the next call, whichever comes first, so that all ranks make their
exchanges in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, Encoding, no_hook
from tokenferry.backends.cuda import patience
from tokenferry.backends.cuda.across.decode_forms import (
    AcrossCombineForm,
    AcrossDispatchForm,
    dispatch_signature,
    new_across_dispatch,
    rail_sizes,
    sizes_of,
)
from tokenferry.backends.cuda.across.decode_sums import NodeSums, SumsUnderWay, encoded_bytes
from tokenferry.backends.cuda.across.messages import MessageRails, Messages
from tokenferry.backends.cuda.across.rail_words import RailWords
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.channel import PendingRecv
from tokenferry.backends.cuda.context import Call, Context
from tokenferry.backends.cuda.decode import Decoder, check_limits, prepared_choices
from tokenferry.backends.cuda.decode_forms import CombineKind, DispatchKind, LazyDecodePlan, new_combine_form
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspace, Workspaces
from tokenferry.backends.tensors import drop_ranks
from tokenferry.kernels.decode_words import RECEIVE, SEND
from tokenferry.memory.empty import part_of
from tokenferry.topology import Topology
from tokenferry.types import DecodeCombined, DecodeDispatched, DecodeStats, Quantized

_MAX_FORMS = 256


@dataclass(slots=True, eq=False)
class _RowsUnderWay:
    """The tensors of a dispatch.

    Attributes:
        plan: Its plan.
        x: The rows of this rank.
        result: Where rows arrive.
        weights: Weights of this rank's tokens, or None.
        ids: ``[tokens, K]`` int32: experts on this node of all tokens that this rank acts for.
        weights_here: Their weights, or None.
        sent: Records for other nodes.
        came: Records from them.
        words: What ranks tell each other besides.
        stats: Counters.
        trace: Where kernels write time stamps, or None.
        transfer: The exchange.
    """

    plan: LazyDecodePlan
    x: Tensor
    result: Tensor | Quantized
    weights: Tensor | None
    ids: Tensor
    weights_here: Tensor | None
    sent: Tensor
    came: Tensor
    words: RailWords
    stats: DecodeStats
    trace: Tensor | None
    transfer: Transfer | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all of them."""
        data, scale = (
            (self.result.data, self.result.scale) if isinstance(self.result, Quantized) else (self.result, None)
        )
        return (
            self.plan._words, self.plan.topk_idx, self.x, data, scale, self.weights, self.weights_here, self.sent,
            self.came, self.trace, self.words.memory, self.stats.received, self.stats.wait_ns,
        )  # fmt: skip


class AcrossDecoder(Decoder):
    """Decode calls of one rank, across nodes.

    Args:
        context: Context of this rank, in its node.
        allocator: Allocator of blocks of the heap.
        topology: The nodes.
        rails: What carries messages to other nodes.
        key: Key of the group, which its plans carry.
        explained: Makes a context in which errors name the ranks at fault, for hooks.
    """

    def __init__(
        self,
        context: Context,
        allocator: SymmetricAllocator,
        topology: Topology,
        rails: MessageRails,
        key: str,
        explained: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(context, allocator, key)
        self.workspaces = Workspaces(context, allocator, topology.num_nodes)
        self._topology = topology
        self._first_rank = topology.nodes[topology.node][0]
        self._breaking_off = context.breaking_off()
        self._rails = rails
        self._explained = explained
        self._sums = NodeSums(context, topology, rails)
        self._across: BoundedDict[DispatchKind, AcrossDispatchForm] = BoundedDict(_MAX_FORMS)
        self._sum_forms: BoundedDict[tuple[Any, ...], AcrossCombineForm] = BoundedDict(_MAX_FORMS)

    @property
    def caught_up(self) -> bool:
        """Whether `catch_up` would do nothing."""
        return self._channels[0].idle

    def catch_up(self, phase: str) -> None:
        """Receive the earlier call whose hook has not been called yet, before another call begins.

        Raises:
            ArgumentError: a CUDA graph is being captured, and the hook belongs to a call outside of it.
        """
        channel = self._channels[0]
        if not channel.idle:
            channel.receive_all(phase, capturing=self._context.order_after_calls()[1] != 0)

    # ------------------------------------------------------------------ dispatch

    def dispatch(self, request: DecodeDispatchRequest) -> DecodeDispatched[Tensor | Quantized]:
        """Send rows, and receive rows, or return a hook that receives them."""
        context, shape, routing = self._context, request.shape, request.routing
        x, topk_idx = aligned(request.x), routing.topk_idx
        if self._rails.can_mask:
            num_local = shape.num_experts // self._topology.num_ranks
            topk_idx = drop_ranks(topk_idx, self._rails.unreachable(), num_local)
        topk_idx = topk_idx.contiguous()
        kind = DispatchKind(shape, x.dtype, request.quantize, topk_idx.dtype, routing.topk_weights is not None)
        form = self._across.get(kind)
        if form is None:
            check_limits(shape, self._topology.num_ranks)
            sizes = rail_sizes(shape, self._topology)
            signature, seen = dispatch_signature(kind), sizes.shape(shape.num_experts, shape.hidden)
        else:
            sizes, signature, seen = form.sizes, form.inside.signature, form.seen
        call = self._begin(signature, request.stats)
        workspace = self.workspaces.fitting(call, seen, x.element_size())
        if form is None or form.inside.workspace != workspace.number:
            form = self._across[kind] = new_across_dispatch(context, self._key, self._topology, workspace, kind)
            if context.mask_late:
                p = form.inside.kernel.params
                p.timeout_ns = int(patience.ROWS_INSIDE * p.timeout_ns)
        plan = object.__new__(LazyDecodePlan)
        plan._form, plan._words, plan._made, plan._call_number = form.inside, context.empty(*form.inside.words), {}, 0
        plan.num_tokens, plan.topk_idx, plan.topk_weights = topk_idx.shape[0], topk_idx, routing.topk_weights
        self._rails.check(signature.phase, sizes.segment * form.record_bytes)
        with self._breaking_off:  # peers wait for this rank
            x = x.clone() if request.return_hook else x  # it is the caller's again before the hook reads it
            rows = self._new_rows(form, plan, x, request.stats)
            self._send_across(form, call, rows)
            if not request.return_hook:
                self._pass_on(form, call, rows)
                return DecodeDispatched(rows.result, plan.expert_counts, plan, no_hook)
            hook = self._hook(call, lambda at: self._pass_on(form, at, rows), rows.tensors())
        return DecodeDispatched(rows.result, plan.expert_counts, plan, hook)

    def _new_rows(self, form: AcrossDispatchForm, plan: LazyDecodePlan, x: Tensor, stats: DecodeStats) -> _RowsUnderWay:
        """Take the memory for a dispatch."""
        sizes, empty = form.sizes, self._context.empty
        weights = None if plan.topk_weights is None else plan.topk_weights.contiguous()
        tokens, K = sizes.num_relayed + plan.num_tokens, sizes.top_k
        weights_here = None if weights is None else empty((tokens, K), (K, 1), torch.float32)
        # Records for other nodes, then those from them.
        both = (sizes.num_relayed, form.record_bytes), (form.record_bytes, 1), torch.uint8
        sent, came = empty(*both), empty(*both)
        data, scale = empty(*form.inside.rows), form.inside.scale
        result = data if scale is None else Quantized(data, empty(*scale))
        ids = part_of(plan._words, form.inside.layout.table + sizes.ids, (tokens, K), (K, 1))
        words = RailWords(sizes.num_nodes, empty)
        return _RowsUnderWay(plan, x, result, weights, ids, weights_here, sent, came, words, stats, self.trace)

    def _send_across(self, form: AcrossDispatchForm, call: Call, rows: _RowsUnderWay) -> None:
        """Begin to exchange rows with other nodes."""
        sizes, plan, words = form.sizes, rows.plan, rows.words
        own, ids = 4 * sizes.num_relayed * sizes.top_k, rows.ids.data_ptr()
        form.pack.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            rows.x.data_ptr(), plan.topk_idx.data_ptr(), address(rows.weights), rows.sent.data_ptr(),
            ids + 4 * (sizes.slots - sizes.ids), ids + 4 * (sizes.number - sizes.ids), ids + own,
            0 if rows.weights_here is None else rows.weights_here.data_ptr() + own,
            words.mine.address, words.came.address, words.states.address, words.overflows, 0,
            plan.num_tokens,
        )  # fmt: skip
        form.pack.launch(self.num_blocks, call.stream)
        rows.transfer = self._rails.exchange(
            call,
            Messages(words.mine, sizes.segments(rows.sent)),
            Messages(words.came, sizes.segments(rows.came), words.states),
            words.memory,
            rows.sent,
            rows.came,
            patience=patience.ROWS_ACROSS,
        )

    def _pass_on(self, form: AcrossDispatchForm, at: Call, rows: _RowsUnderWay) -> None:
        """Pass rows on inside the node when they have come from other nodes, and receive rows."""
        assert rows.transfer is not None
        since = self._rails.join(at, rows.transfer, rows.words.since)
        plan, words, layout, shape = rows.plan, rows.words, form.inside.layout, form.inside.shape
        head = (at.alive, at.number, at.signature.words, 0, 0, 0, 0, 0, 0)
        ids, came, weights = rows.ids.data_ptr(), rows.came.data_ptr(), address(rows.weights_here)
        form.unpack.pack(
            at.wait_ns, *head, words.came.address, words.states.address, came, ids, weights, words.overflows, 0, since,
            form.sizes.num_nodes,
        )  # fmt: skip
        form.unpack.launch(self.num_blocks, at.stream)
        choices = prepared_choices(rows.ids, shape.num_experts // form.sizes.num_nodes, form.inside.kept_bytes)
        result = rows.result
        data, scale = (result.data, result.scale) if isinstance(result, Quantized) else (result, None)
        start = plan._words.data_ptr()
        form.inside.kernel.pack(
            at.wait_ns, *head, rows.x.data_ptr(), ids, weights, address(choices),
            data.data_ptr(), address(scale), start + 4 * layout.expert_counts, address(rows.stats.received),
            start + 4 * layout.src_token, start + 4 * layout.src_range,
            start + 4 * layout.row_weights if form.inside.weighted else 0, start + 4 * layout.table,
            self._context.pinned.masked_address, address(rows.trace), rows.ids.shape[0], SEND | RECEIVE,
            came, words.overflows,
        )  # fmt: skip
        form.inside.kernel.launch(self.num_blocks, at.stream)

    # ------------------------------------------------------------------ combine

    def combine(self, request: DecodeCombineRequest) -> DecodeCombined:
        """Send rows back, and receive and add up, or return a hook that does."""
        plan, y = request.plan, aligned(request.y)
        table = plan._table
        assert table is not None
        key = (
            table.shape, plan.topk_idx.shape[1], plan.num_experts, y.shape, y.dtype, request.fast, request.encoding
        )  # fmt: skip
        form = self._sum_forms.get(key)
        if form is None:
            sizes = sizes_of(plan, self._topology, y.shape[1] // self._topology.num_ranks)
            seen = sizes.shape(plan.num_experts, y.shape[2])
            kind = CombineKind(seen, y.dtype, request.fast, request.encoding, torch.int32)
            signature = kind.signature()
        else:
            sizes, seen, kind, signature = form.sizes, form.seen, form.kind, form.inside.signature
        call = self._begin(signature, request.stats)
        workspace = self.workspaces.fitting(call, seen, y.element_size())
        if form is None or form.inside.workspace != workspace.number:
            unencoded = kind._replace(encoding=Encoding.same)
            inside = new_combine_form(self._context, signature, workspace, unencoded)
            if self._context.mask_late:
                p = inside.kernel.params
                p.timeout_ns = int(patience.ANSWERS_INSIDE * p.timeout_ns)
            row_bytes = encoded_bytes(y.shape[2], y.element_size(), request.encoding)
            form = self._sum_forms[key] = AcrossCombineForm(inside, sizes, seen, kind, row_bytes)
        self._rails.check(signature.phase, sizes.segment * max(form.row_bytes, 4 * sizes.top_k))
        with self._breaking_off:
            sums = SumsUnderWay.new(sizes, request, y, form.row_bytes, self._context.empty)
            sums.trace = self.trace
            self._sums.send(form.inside, call, sums)
            if not request.return_hook:
                self._sums.receive(form.inside, call, sums)
                return DecodeCombined(sums.done, no_hook)
            inside = form.inside
            hook = self._hook(call, lambda at: self._sums.receive(inside, at, sums), sums.tensors())
        return DecodeCombined(sums.done, hook)

    # ------------------------------------------------------------------ both

    def _begin(self, signature: Signature, stats: DecodeStats) -> Call:
        """Begin a call; its kernels count the time that they wait for ranks from the first of this node on."""
        self.catch_up(signature.phase)
        wait_ns = 0 if stats.wait_ns is None else stats.wait_ns.data_ptr() + 8 * self._first_rank
        return self._rails.begin(signature, wait_ns)

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
            with torch.inference_mode(False), torch.no_grad(), self._explained():
                channel.receive(pending)

        return hook
