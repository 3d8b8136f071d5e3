"""Decode combines across nodes: each node adds up its rows of a token, and the token's rank adds up the nodes' sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import Encoding
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
from tokenferry.backends.cuda.buffers import section_ends
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.decode import PlanParts
from tokenferry.backends.cuda.decode_forms import CombineKind, new_combine_form
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.cuda.signature import Signature
from tokenferry.backends.cuda.workspace import Workspace
from tokenferry.kernels.decode_combine.spec import packets_of_chunk
from tokenferry.kernels.decode_words import CHUNK_COLUMNS, RECEIVE, SEND
from tokenferry.topology import Topology
from tokenferry.types import MoeShape


def encoded_bytes(columns: int, item_bytes: int, encoding: Encoding) -> int:
    """Return the bytes of a row as it crosses."""
    if encoding is Encoding.same:
        return columns * item_bytes
    return -(-columns // CHUNK_COLUMNS) * packets_of_chunk(item_bytes, encoding) * 16


class SumKind(NamedTuple):
    """What a form of combines follows from.

    Attributes:
        table_words: Words of `DecodePlan._table`.
        num_experts: E of the plan.
        top_k: Its K.
        rows: Shape of the experts' rows.
        dtype: Their dtype.
        fast: Whether a rank adds up its rows of a token before it sends them.
        encoding: Format of sums that cross.
    """

    table_words: int
    num_experts: int
    top_k: int
    rows: tuple[int, ...]
    dtype: torch.dtype
    fast: bool
    encoding: Encoding


class SumMemory(NamedTuple):
    """Where the parts of the memory of a combine lie, in bytes from its beginning.

    Attributes:
        words: What ranks send each other besides rows.
        pending: What the kernel that sends leaves for the one that receives: two int32.
        weights: ``[tokens, K]``: those of all tokens that this rank acts for; undefined for fast sums.
        weights_out: Those for other nodes; nothing for fast sums.
        came: What comes from other nodes for this rank's tokens.
        sums: ``[tokens, H]``: the sums of this node; behind them the same, encoded, if they are.
    """

    words: RailWords
    pending: int
    weights: int
    weights_out: int
    came: int
    sums: int


@dataclass(frozen=True, slots=True, eq=False)
class DecodeSumForm:
    """What all decode combines of the same sizes, dtypes and options share.

    Attributes:
        signature: Signature of the calls.
        workspace: Number of the workspace for rows under way inside the node.
        members: A bit for each rank of the node with which it was made.
        kernel: The kernel of one node.
        sizes: How many tokens cross.
        seen: Sizes that the kernels of one node see.
        columns: H.
        dtype: dtype of the rows.
        exact: Whether weights cross.
        sum_bytes: Bytes of the sum of a token.
        row_bytes: Bytes of it as it crosses.
        encode: Kernel that encodes sums; None: they cross as they are.
        add_up: Kernel that adds up the sums of all nodes.
        memory: Where the parts of the memory of a call lie.
    """

    signature: Signature
    workspace: int
    members: int
    kernel: LaunchTemplate
    sizes: RailSizes
    seen: MoeShape
    columns: int
    dtype: torch.dtype
    exact: bool
    sum_bytes: int
    row_bytes: int
    encode: LaunchTemplate | None
    add_up: LaunchTemplate
    memory: SumMemory


@dataclass(slots=True, eq=False)
class SumsUnderWay:
    """A combine.

    Attributes:
        y: The experts' rows, at a multiple of 16 bytes.
        plan: What is read of its plan.
        tokens: Tokens that this rank acts for.
        memory: What it takes besides; see `SumMemory`.
        at: Address of that.
        crossing: Address of what crosses: sums of this node, encoded or not, those for other nodes first.
        out: ``[T, H]``, at a multiple of 16 bytes.
        copy_to: ``[T, H]`` to which the sums are copied, or None.
        hooked: Whether the caller receives with a hook.
        trace: Where kernels write time stamps, or None.
        transfer: The exchange of weights.
    """

    y: Tensor
    plan: PlanParts
    tokens: int
    memory: Tensor
    at: int
    crossing: int
    out: Tensor
    copy_to: Tensor | None
    hooked: bool
    trace: Tensor | None = None
    transfer: Transfer | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return all of its tensors."""
        return (
            self.y, self.plan.topk_weights, self.memory, self.out, self.copy_to, self.trace, *self.plan.kept
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
        self._zero = torch.zeros(1, dtype=torch.int64, device=context.device)
        self._no_counts = self._zero.data_ptr()

    def form(
        self, of: SumKind, sizes: RailSizes, seen: MoeShape, signature: Signature, workspace: Workspace
    ) -> DecodeSumForm:
        """Return the form of combines whose rows inside the node are under way in a workspace."""
        context, encoding, dtype, columns = self._context, of.encoding, of.dtype, of.rows[2]
        kind = CombineKind(seen, dtype, of.fast, Encoding.same, torch.int32)
        inside = new_combine_form(context, signature, workspace, kind)
        if context.mask_late:
            p = inside.kernel.params
            p.timeout_ns = int(patience.ANSWERS_INSIDE * p.timeout_ns)
        encode = None
        if encoding is Encoding.same:
            add_up = sum_template(context, self._topology, dtype, columns, sizes.top_k, skips=True)
        else:
            encode = encode_template(context, dtype, encoding)
            add_up = sum_encoded_template(context, self._topology, dtype, encoding)
        row_bytes, words = encoded_bytes(columns, dtype.itemsize, encoding), RailWords.of(sizes.num_nodes)
        return DecodeSumForm(
            signature,
            inside.workspace,
            inside.members,
            inside.kernel,
            sizes,
            seen,
            columns,
            dtype,
            not of.fast,
            columns * dtype.itemsize,
            row_bytes,
            encode,
            add_up,
            SumMemory(
                words,
                *section_ends(
                    words.num_bytes,
                    8,
                    4 * sizes.most * sizes.top_k,
                    0 if of.fast else 4 * sizes.num_relayed * sizes.top_k,
                    sizes.num_relayed * row_bytes,
                ),
            ),
        )

    def new(
        self,
        form: DecodeSumForm,
        y: Tensor,
        plan: PlanParts,
        out: Tensor | None,
        copy_to: Tensor | None,
        *,
        return_hook: bool,
    ) -> SumsUnderWay:
        """Take the memory for a combine; ``out``: aligned, or None for a new tensor."""
        empty, tokens, columns = self._context.empty, form.sizes.num_relayed + plan.num_tokens, form.columns
        crossing = end = form.memory.sums + tokens * form.sum_bytes
        if form.encode is None:
            crossing = form.memory.sums
        else:
            end += tokens * form.row_bytes
        memory = empty((end,), (1,), torch.uint8)
        if out is None:
            out = empty((plan.num_tokens, columns), (columns, 1), form.dtype)
        at = memory.data_ptr()
        return SumsUnderWay(y, plan, tokens, memory, at, at + crossing, out, copy_to, return_hook)

    def send(self, form: DecodeSumForm, call: Call, sums: SumsUnderWay) -> None:
        """Send what is this rank's own: weights for other nodes, and rows inside the node.

        Rows travel while the weights cross; without weights one kernel sends and receives them, if there is no hook.
        """
        sizes, parts, at, table = form.sizes, form.memory, sums.at, sums.plan.table
        words, num_weights = parts.words, sizes.segment * sizes.top_k
        self._open.pack(
            call.alive, call.number, call.signature.words,
            at + words.mine, at + words.came, at + words.states, table + 4 * sizes.number, table + 4 * sizes.slots,
            sums.plan.topk_weights.data_ptr() if form.exact else 0,
            at + parts.weights + 4 * sizes.num_relayed * sizes.top_k, at + parts.weights_out if form.exact else 0,
            sums.plan.num_tokens, sizes.top_k,
        )  # fmt: skip
        self._open.launch(self._num_blocks if form.exact else 1, call.stream)
        if form.exact:
            messages = Messages(
                at + words.mine, at + words.came, at + parts.weights_out, at + parts.weights, 4 * num_weights, 0,
                table + 4 * sizes.number,
            )  # fmt: skip
            sums.transfer = self._rails.exchange(call, messages, sums.memory, patience.WEIGHTS_ACROSS)
        if form.exact or sums.hooked:
            self._inside(form, call, sums, SEND)

    def receive(self, form: DecodeSumForm, call: Call, sums: SumsUnderWay) -> None:
        """Add up what the node sends for the tokens that this rank acts for, exchange the sums, and add these up."""
        parts, at, mine, came = form.memory, sums.at, 0, 0
        words = parts.words
        if sums.transfer is not None:
            since = self._rails.join(call, sums.transfer, at + words.since)
            self._check_words(form, call, sums, since, headers=at + words.came, num_states=0)
        else:  # headers come with the sums
            mine, came = at + words.mine, at + words.came
        self._inside(form, call, sums, RECEIVE if form.exact or sums.hooked else SEND | RECEIVE)
        if form.encode is not None:
            form.encode.pack(
                call.alive, call.number, call.signature.words,
                at + parts.sums, sums.crossing, sums.tokens, form.columns,
            )  # fmt: skip
            form.encode.launch(self._num_blocks, call.stream)
        body_bytes = form.sizes.segment * form.row_bytes
        epoch = sums.plan.table + 4 * form.sizes.number
        messages = Messages(mine, came, sums.crossing, at + parts.came, body_bytes, at + words.states, epoch)
        transfer = self._rails.exchange(call, messages, sums.memory, patience.SUMS_ACROSS)
        since = self._rails.join(call, transfer, at + words.since)
        self._check_words(form, call, sums, since, headers=came, num_states=form.sizes.num_nodes)
        self._add_up(form, call, sums)

    def _inside(self, form: DecodeSumForm, call: Call, sums: SumsUnderWay, phases: int) -> None:
        """Launch the kernel of one node."""
        parts, plan, at = form.memory, sums.plan, sums.at
        form.kernel.pack(
            call.wait_ns, call.alive, call.number, call.signature.words,
            sums.y.data_ptr(), at + parts.sums, plan.table + 4 * form.sizes.ids, at + parts.weights, plan.row_weights,
            plan.table, at + parts.pending if form.exact or sums.hooked else 0, self._context.pinned.masked_address,
            address(sums.trace), sums.tokens, phases,
        )  # fmt: skip
        form.kernel.launch(self._num_blocks, call.stream)

    def _check_words(
        self, form: DecodeSumForm, call: Call, sums: SumsUnderWay, since: int, *, headers: int, num_states: int
    ) -> None:
        """Launch what makes later kernels no-ops if a rail peer made another call, or sent undefined data or none."""
        self._check.pack(
            call.wait_ns, call.alive, call.number, call.signature.words,
            headers, sums.plan.table + 4 * form.sizes.number, since, 0, 0, sums.at + form.memory.words.states,
            self._no_counts, num_states, 0, 1, int(call.skips_masked),
        )  # fmt: skip
        self._check.launch(1, call.stream)

    def _add_up(self, form: DecodeSumForm, call: Call, sums: SumsUnderWay) -> None:
        """Add up the sums of all nodes."""
        sizes, parts, num_tokens, out = form.sizes, form.memory, sums.plan.num_tokens, sums.out
        slots, own = sums.plan.table + 4 * sizes.slots, sums.crossing + sizes.num_relayed * form.row_bytes
        head = (call.alive, call.number, call.signature.words)
        came, add_up = sums.at + parts.came, form.add_up
        if num_tokens and form.encode is not None:
            add_up.pack(*head, slots, own, came, out.data_ptr(), num_tokens, form.columns)
        elif num_tokens:
            add_up.pack(*head, slots, self._no_counts, own, came, 0, 0, 0, 0, out.data_ptr(), 0, num_tokens)
        if num_tokens:
            add_up.launch(self._num_blocks, call.stream)
        if sums.copy_to is not None:
            with torch.inference_mode():  # the tensor may come from it
                sums.copy_to.copy_(out)
