"""Decode combines across nodes: each node adds up its rows of a token, and the token's rank adds up the nodes' sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, Encoding
from tokenferry.backends.cuda import patience
from tokenferry.backends.cuda.across.decode_forms import RailSizes
from tokenferry.backends.cuda.across.launch import (
    check_template,
    encode_template,
    open_decode_template,
    sum_encoded_template,
    sum_template,
)
from tokenferry.backends.cuda.across.messages import MessageRails, Messages
from tokenferry.backends.cuda.across.rail_words import RailWords
from tokenferry.backends.cuda.across.rails import Transfer
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.decode_forms import DecodeCombineForm
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.tensors import overlap
from tokenferry.kernels.decode_combine.spec import packets_of_chunk
from tokenferry.kernels.decode_words import CHUNK_COLUMNS, RECEIVE, SEND
from tokenferry.memory.empty import Empty
from tokenferry.topology import Topology

_MAX_FORMS = 64


def encoded_bytes(columns: int, item_bytes: int, encoding: Encoding) -> int:
    """Return the bytes of a row as it crosses."""
    if encoding is Encoding.same:
        return columns * item_bytes
    return -(-columns // CHUNK_COLUMNS) * packets_of_chunk(item_bytes, encoding) * 16


@dataclass(slots=True, eq=False)
class SumsUnderWay:
    """The tensors of a combine.

    Attributes:
        sizes: How many tokens cross.
        request: The combine.
        y: The experts' rows, at a multiple of 16 bytes.
        row_weights: `DecodePlan.row_weights`, or None.
        weights: Weights of this rank's tokens.
        weights_here: ``[tokens, K]``: those of all tokens that this rank acts for; undefined for fast sums.
        weights_out: Those for other nodes; None for fast sums.
        sums: ``[tokens, H]``: the sums of this node.
        packets: The same, encoded; None: they are not.
        parts: What comes from other nodes for this rank's tokens.
        table: Address of `DecodePlan._table`.
        words: What ranks tell each other besides.
        pending: What the kernel that sends leaves for the one that receives.
        out: ``[T, H]``, aligned.
        done: Where the caller wants the result; `out` or another tensor.
        trace: Where kernels write time stamps, or None.
        transfer: The exchange of weights.
    """

    sizes: RailSizes
    request: DecodeCombineRequest
    y: Tensor
    row_weights: Tensor | None
    weights: Tensor
    weights_here: Tensor
    weights_out: Tensor | None
    sums: Tensor
    packets: Tensor | None
    parts: Tensor
    table: int
    words: RailWords
    pending: Tensor
    out: Tensor
    done: Tensor
    trace: Tensor | None = None
    transfer: Transfer | None = None

    @classmethod
    def new(
        cls, sizes: RailSizes, request: DecodeCombineRequest, y: Tensor, row_bytes: int, empty: Empty
    ) -> SumsUnderWay:
        """Take the memory for a combine; ``row_bytes``: of a row that crosses; ``empty``: makes tensors."""
        plan, weights_out, packets = request.plan, None, None
        assert plan.topk_weights is not None
        relayed, H, K = sizes.num_relayed, y.shape[2], sizes.top_k
        tokens = relayed + plan.num_tokens
        if not request.fast:
            weights_out = empty((relayed, K), (K, 1), torch.float32)
        sums = empty((tokens, H), (H, 1), y.dtype)
        if request.encoding is Encoding.same:
            parts = empty((relayed, H), (H, 1), y.dtype)
        else:
            packets = empty((tokens, row_bytes), (row_bytes, 1), torch.uint8)
            parts = empty((relayed, row_bytes), (row_bytes, 1), torch.uint8)
        out = request.out
        if out is None or out.data_ptr() % 16 or overlap(out, y):
            out = empty((plan.num_tokens, H), (H, 1), y.dtype)
        return cls(
            sizes,
            request,
            y,
            plan.row_weights,
            plan.topk_weights.contiguous(),
            empty((tokens, K), (K, 1), torch.float32),
            weights_out,
            sums,
            packets,
            parts,
            address(plan._table),
            RailWords(sizes.num_nodes, empty),
            empty((2,), (1,), torch.int32),
            out,
            out if request.out is None else request.out,
        )

    @property
    def crossing(self) -> Tensor:
        """What crosses: sums of this node, encoded or not, those for other nodes first."""
        return self.sums if self.packets is None else self.packets

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all of them."""
        return (
            self.request.plan._table, self.request.stats.wait_ns, self.y, self.row_weights, self.weights,
            self.weights_here, self.weights_out, self.sums, self.packets, self.parts, self.words.memory, self.pending,
            self.out, self.done, self.trace,
        )  # fmt: skip


class NodeSums:
    """Combines of one rank.

    Args:
        context: Context of this rank, in its node.
        topology: The nodes.
        rails: What carries messages to other nodes.
    """

    def __init__(self, context: Context, topology: Topology, rails: MessageRails) -> None:
        self._context = context
        self._topology = topology
        self._rails = rails
        self._num_blocks = max(2, context.num_sms)
        self._open = open_decode_template(context, topology)
        self._check = check_template(context, topology)
        self._templates: BoundedDict[tuple[Any, ...], LaunchTemplate] = BoundedDict(_MAX_FORMS)
        self._no_counts = torch.zeros(1, dtype=torch.int64, device=context.device)

    def send(self, form: DecodeCombineForm, call: Call, it: SumsUnderWay) -> None:
        """Send what is this rank's own: weights for other nodes, and rows inside the node.

        Rows travel while the weights cross; without weights one kernel sends and receives them, if there is no hook.
        """
        sizes, words, weights_out = it.sizes, it.words, it.weights_out
        exact = weights_out is not None
        self._open.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            words.mine.address, words.came.address, words.states.address,
            it.table + 4 * sizes.number, it.table + 4 * sizes.slots,
            it.weights.data_ptr() if exact else 0,
            it.weights_here.data_ptr() + 4 * sizes.num_relayed * sizes.top_k, address(weights_out),
            it.request.plan.num_tokens, sizes.top_k,
        )  # fmt: skip
        self._open.launch(self._num_blocks if exact else 1, call.stream)
        if weights_out is not None:
            it.transfer = self._rails.exchange(
                call,
                Messages(words.mine, sizes.segments(weights_out)),
                Messages(words.came, sizes.segments(it.weights_here)),
                words.memory,
                weights_out,
                it.weights_here,
                patience=patience.WEIGHTS_ACROSS,
            )
        if self._sends_first(it):
            self._inside(form, call, it, SEND)

    def receive(self, form: DecodeCombineForm, at: Call, it: SumsUnderWay) -> None:
        """Add up what the node sends for the tokens that this rank acts for, exchange the sums, and add these up."""
        sizes, words = it.sizes, it.words
        headers = it.transfer is None  # they come with the sums
        if it.transfer is not None:
            since = self._rails.join(at, it.transfer, words.since)
            self._check_words(at, it, since, headers=True, states=False)
        self._inside(form, at, it, RECEIVE if self._sends_first(it) else SEND | RECEIVE)
        if it.packets is not None:
            self._encode(at, it, it.packets)
        transfer = self._rails.exchange(
            at,
            Messages(words.mine if headers else None, sizes.segments(it.crossing)),
            Messages(words.came if headers else None, sizes.segments(it.parts), words.states),
            words.memory,
            it.crossing,
            it.parts,
            patience=patience.SUMS_ACROSS,
        )
        since = self._rails.join(at, transfer, words.since)
        self._check_words(at, it, since, headers=headers, states=True)
        self._add_up(at, it)

    def _sends_first(self, it: SumsUnderWay) -> bool:
        return it.transfer is not None or it.request.return_hook

    def _inside(self, form: DecodeCombineForm, at: Call, it: SumsUnderWay, phases: int) -> None:
        """Launch the kernel of one node."""
        pending = it.pending.data_ptr() if self._sends_first(it) else 0
        form.kernel.pack(
            at.wait_ns, at.alive, at.number, at.signature.words, 0, 0, 0, 0, 0, 0,
            it.y.data_ptr(), it.sums.data_ptr(), it.table + 4 * it.sizes.ids, it.weights_here.data_ptr(),
            address(it.row_weights), it.table, pending, self._context.pinned.masked_address, address(it.trace),
            len(it.sums), phases,
        )  # fmt: skip
        form.kernel.launch(self._num_blocks, at.stream)

    def _check_words(self, at: Call, it: SumsUnderWay, since: int, *, headers: bool, states: bool) -> None:
        """Launch what makes later kernels no-ops if a rank across made another call, or sent undefined data or none."""
        self._check.pack(
            at.wait_ns, at.alive, at.number, at.signature.words, 0, 0, 0, 0, 0, 0,
            it.words.came.address if headers else 0, it.table + 4 * it.sizes.number, since,
            0, 0, it.words.states.address,
            self._no_counts.data_ptr(), it.sizes.num_nodes if states else 0, 0, 1,
            int(at.skips_masked),
        )  # fmt: skip
        self._check.launch(1, at.stream)

    def _encode(self, at: Call, it: SumsUnderWay, packets: Tensor) -> None:
        key = ("encode", it.sums.dtype, it.request.encoding)
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = encode_template(self._context, it.sums.dtype, it.request.encoding)
        template.pack(
            0, at.alive, at.number, at.signature.words, 0, 0, 0, 0, 0, 0,
            it.sums.data_ptr(), packets.data_ptr(), *it.sums.shape,
        )  # fmt: skip
        template.launch(self._num_blocks, at.stream)

    def _add_up(self, at: Call, it: SumsUnderWay) -> None:
        """Add up the sums of all nodes."""
        num_tokens, columns = it.out.shape
        slots, rows = it.table + 4 * it.sizes.slots, it.crossing
        own = rows.data_ptr() + it.sizes.num_relayed * rows.stride(0) * rows.element_size()
        head = (0, at.alive, at.number, at.signature.words, 0, 0, 0, 0, 0, 0)
        key = (it.out.dtype, columns, it.request.encoding)
        template = self._templates.get(key)
        if it.packets is not None:
            if template is None:
                template = self._templates[key] = sum_encoded_template(
                    self._context, self._topology, it.out.dtype, it.request.encoding
                )
            template.pack(*head, slots, own, it.parts.data_ptr(), it.out.data_ptr(), num_tokens, columns)
        else:
            if template is None:
                template = self._templates[key] = sum_template(
                    self._context, self._topology, it.out.dtype, columns, it.sizes.top_k, skips=True
                )
            parts = it.parts.data_ptr()
            template.pack(
                *head, slots, self._no_counts.data_ptr(), own, parts, 0, 0, 0, 0, it.out.data_ptr(), 0, num_tokens
            )
        if num_tokens:
            template.launch(self._num_blocks, at.stream)
        if it.done is not it.out:
            with torch.inference_mode():  # `done` may come from it
                it.done.copy_(it.out)
