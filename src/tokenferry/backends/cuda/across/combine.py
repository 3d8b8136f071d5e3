"""Combine across nodes: each node adds up its rows of a token, and the token's rank adds up the sums of the nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cuda.across.contents import Opening
from tokenferry.backends.cuda.across.crossing import Crossing, Transfers
from tokenferry.backends.cuda.across.forms import beside_nccl, cap_sms
from tokenferry.backends.cuda.across.launch import sum_template
from tokenferry.backends.cuda.across.parcels import Chunks, RowWidths, Swap
from tokenferry.backends.cuda.across.relay import RelayAddresses, relay_addresses
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.combine import CombineForm, Combiner, Source, Sums, delivered, direct_out
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.signature import Signature
from tokenferry.topology import Topology
from tokenferry.types import Combined, Plan

_MAX_FORMS = 256


@dataclass(frozen=True, slots=True, eq=False)
class AcrossCombineForm:
    """What all combines across nodes of the same layout, sizes, dtype and ``num_sms`` share.

    Attributes:
        signature: Signature of the calls.
        inside: The form of the combines of this node.
        sum: Kernel that adds up the sums of all nodes.
        chunks: In which chunks sums cross.
        num_sms: SMs of ``sum``.
        widths: Bytes of what crosses.
    """

    signature: Signature
    inside: CombineForm
    sum: LaunchTemplate
    chunks: Chunks
    num_sms: int
    widths: RowWidths


class PartialSums(NamedTuple):
    """The sums of each node for the tokens of this rank, and where their totals go.

    Attributes:
        own: Address of those of the own node.
        own_weights: Address of its sums of weights; 0: there are none.
        others: Where the parcels of the others begin.
        biases: With what the sums start.
        out: Where they go.
        weights_out: Where the sums of weights go; None: there are none.
    """

    own: int
    own_weights: int
    others: int
    biases: tuple[Tensor, ...]
    out: Tensor
    weights_out: Tensor | None


class AcrossCombiner:
    """Combine calls of one rank, across nodes.

    Args:
        context: Context of this rank, in its node.
        allocator: Allocator of blocks of the heap.
        topology: The nodes.
        crossing: Exchanges with other nodes.
    """

    def __init__(self, context: Context, allocator: SymmetricAllocator, topology: Topology, crossing: Crossing) -> None:
        self._context = context
        self._allocator = allocator
        self._topology = topology
        self._num_nodes = topology.num_nodes
        self._crossing = crossing
        self._inside = Combiner(context, allocator)
        self._breaking_off = context.breaking_off()
        self._forms: BoundedDict[tuple[CombineForm, int | None], AcrossCombineForm] = BoundedDict(_MAX_FORMS)

    def combine(self, request: CombineRequest) -> Combined:
        """Add up the rows of each of this rank's tokens."""
        y, plan, weights = request.y, request.plan, request.topk_weights
        along = relay_addresses(plan, self._topology)
        form = self.form(plan, along, y, weighted=weights is not None, num_sms=request.num_sms)
        call = self._crossing.begin(form.signature)
        done = self.send(form, call, y, along, weights, request.biases, direct_out(request))
        return delivered(request, done)

    def form(
        self, plan: Plan, along: RelayAddresses, y: Tensor, *, weighted: bool, num_sms: int | None
    ) -> AcrossCombineForm:
        """Return the form of a combine of rows ``y``."""
        context, topology = self._context, self._topology
        inside = self._inside.form(plan, along.whole, y, weighted=weighted, num_sms=cap_sms(context, num_sms))
        key = (inside, num_sms)
        found = self._forms.get(key)
        if found is None:
            row_bytes = inside.columns * inside.dtype.itemsize
            widths = RowWidths.new(row_bytes, 0, 4 * inside.top_k if weighted else 0)
            chunks = self._crossing.chunks(row_bytes, back=True)
            template = sum_template(context, topology, inside.dtype, inside.columns, inside.top_k)
            p = template.params
            p.chunks, p.cut_node, p.pitch = chunks.num, chunks.source, widths.pitch
            p.chunk_first[:] = chunks.table
            sms = num_sms or context.num_sms
            if chunks.num > 1 and self._num_nodes == 2:  # one crosses while another is added up
                sms = beside_nccl(context, sms)
            found = self._forms[key] = AcrossCombineForm(inside.signature, inside, template, chunks, sms, widths)
        return found

    def send(
        self,
        form: AcrossCombineForm,
        call: Call,
        y: Tensor,
        along: RelayAddresses,
        weights: Tensor | None,
        biases: tuple[Tensor, ...],
        out: Tensor | None,
    ) -> Combined:
        """Add up the rows of each of this rank's tokens; ``out``: where to, or None for a new tensor."""
        inside, crossing, relay, src_counts = form.inside, self._crossing, along.relay, along.whole.src_counts
        swaps, pitch = along.swaps.get(form), form.widths.pitch
        if swaps is None:
            swaps = along.swaps[form] = relay.swaps(crossing.steps, form.chunks, form.widths, back=True)
        num_tokens, num_in, num_out = along.whole.num_tokens, relay.first_in[-1], relay.first_out[-1]
        # Memory is taken before anything is sent: if there is none, the group is still whole.
        source = self._inside.source(inside, call, y, weights, along.whole, shared=True)
        words, sums_at = crossing.new_words(form.chunks.num, (num_in + num_out + num_tokens) * pitch)
        others = sums_at + num_in * pitch
        own = others + num_out * pitch
        own_weights = 0 if weights is None else own + num_tokens * form.widths.row
        empty, weights_out = self._context.empty, None
        if biases:
            biases = tuple(map(aligned, biases))
        if out is None:
            out = empty((num_tokens, inside.columns), (inside.columns, 1), inside.dtype)
        if weights is not None:
            weights_out = empty((num_tokens, inside.top_k), (inside.top_k, 1), torch.float32)
        if not swaps[0].whole:
            no_counts = crossing.no_counts(src_counts)
            along = along._replace(no_counts=no_counts.data_ptr())
        with self._breaking_off:  # peers wait for this rank
            # Sums go back where tokens came from.
            opening = crossing.announce(call, words, form.chunks, along.came, along.went, src_counts)
            transfers = self._send_sums(form, call, along, source, swaps, opening, sums_at)
            here = along.segments.get(relay.node) or along.segment(relay.node)
            self._inside.add_up(inside, call, source, here, Sums(own, weights_out=own_weights))
            partial_sums = PartialSums(own, own_weights, others, biases, out, weights_out)
            self._collect(form, call, along, opening, transfers, partial_sums)
        return Combined(out, weights_out)

    def _send_sums(
        self,
        form: AcrossCombineForm,
        call: Call,
        along: RelayAddresses,
        source: Source,
        swaps: Sequence[Swap],
        opening: Opening,
        sums_at: int,
    ) -> Transfers:
        """Add up the rows of tokens of other nodes, and exchange the sums, which lie from ``sums_at`` on."""
        crossing, inside, words = self._crossing, form.inside, opening.words
        transfers: Transfers = {}
        first: Opening | None = opening
        others, weight_bytes = sums_at + along.relay.first_in[-1] * form.widths.pitch, form.widths.weights
        for swap in swaps:
            chunk = swap.send
            if swap.used:  # else no rank of this node has tokens in it
                at = sums_at + chunk.at
                weights_at = at + chunk.num_bytes - chunk.num * weight_bytes if weight_bytes else 0
                part = along.part(swap, chunk)
                self._inside.add_up(inside, call, source, part, Sums(at, weights_out=weights_at))
            transfers |= crossing.rows(call, (swap,), words, sums_at, others, opening=first)
            first = None
        return transfers

    def _collect(
        self,
        form: AcrossCombineForm,
        call: Call,
        along: RelayAddresses,
        opening: Opening,
        transfers: Transfers,
        partial_sums: PartialSums,
    ) -> None:
        """Let the stream wait for all sums, check them, and add them up.

        The headers are checked first: sums of another call may never come. Nodes send one after the other. If the last
        one sends chunks, those tokens are added up meanwhile whose sums are there: the place of a token among those for
        a node is at most its own number, so that all tokens below the first one of the next chunk are complete.
        """
        crossing, done, left = self._crossing, 0, len(transfers)
        unconfirmed: Opening | None = opening
        if opening.transfer is not None:
            opening.transfer.join()
            crossing.confirm(call, opening)
            unconfirmed = None
        last, _ = next(reversed(transfers), (0, 0))
        for (node, number), transfer in transfers.items():
            transfer.join()
            left -= 1
            if left and unconfirmed is not None:
                crossing.confirm(call, opening)
                unconfirmed = None
            if left and node == last:
                ready = form.chunks.firsts[number + 1]
                self._add_up(form, call, along, partial_sums, range(done, min(ready, along.whole.num_tokens)))
                done = ready
        crossing.check(call, opening.words, opening.src_counts, opening=unconfirmed)
        self._add_up(form, call, along, partial_sums, range(done, along.whole.num_tokens))

    def _add_up(
        self, form: AcrossCombineForm, call: Call, along: RelayAddresses, partial_sums: PartialSums, tokens: range
    ) -> None:
        """Add up the sums of all nodes, and the biases, for some tokens."""
        if not tokens:
            return
        own, own_weights, others, biases, out, weights_out = partial_sums
        at, weights_at = tokens.start * form.widths.row, tokens.start * form.widths.weights
        form.sum.pack(
            call.alive, call.number, call.signature.words,
            along.slots + 4 * tokens.start * self._num_nodes, along.dst_counts, own, others, own_weights,
            along.went,
            biases[0].data_ptr() + at if biases else 0, biases[1].data_ptr() + at if len(biases) > 1 else 0,
            out.data_ptr() + at, 0 if weights_out is None else weights_out.data_ptr() + weights_at, len(tokens),
        )  # fmt: skip
        form.sum.launch(form.num_sms, call.stream)
