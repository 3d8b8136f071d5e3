"""Combine across nodes: each node adds up its rows of a token, and the token's rank adds up the sums of the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cuda.across.contents import RowMemory, RowWidths, Sums, Words
from tokenferry.backends.cuda.across.crossing import Crossing
from tokenferry.backends.cuda.across.forms import cap_sms
from tokenferry.backends.cuda.across.launch import sum_template
from tokenferry.backends.cuda.across.rails import Parcel, Transfer
from tokenferry.backends.cuda.across.relay import NO_TOKENS, Chunks, RelayAddresses, relay_addresses
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.combine import CombineForm, Combiner, delivered, direct_out
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.launch import address
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


class Result(NamedTuple):
    """What becomes of the sums.

    Attributes:
        out: Where they go; None: to a new tensor.
        biases: With what they start.
    """

    out: Tensor | None
    biases: tuple[Tensor, ...]


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
        self._crossing = crossing
        self._inside = Combiner(context, allocator)
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
            found = self._forms[key] = AcrossCombineForm(
                inside.signature,
                inside,
                sum_template(context, topology, inside.dtype, inside.columns, inside.top_k),
                self._crossing.chunks(row_bytes),
                num_sms or context.num_sms,
                RowWidths(row_bytes, 0, 4 * inside.top_k if weighted else 0),
            )
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
        with self._context.breaking_off():  # peers wait for this rank
            words = crossing.new_words(call, relay.went, form.chunks)
            # Sums go back where tokens came from.
            opening = crossing.open_along(call, words, along.came, along.went)
            rows, weights = self._inside.in_window(inside, call, y, weights, along.whole)
            home = RowMemory.empty(self._context, form.widths, relay.first_out[-1])
            transfers = self._send_sums(form, call, along, Combined(rows, weights), home, words)
            own = self._inside.send(inside, call, rows, along.segment(relay.node), weights, (), None)
            crossing.confirm(call, opening, src_counts)
            for transfer in transfers:
                transfer.join()
            crossing.check(call, words.all_states(), src_counts)
            return self._add_up(form, call, along, own, home, Result(out, biases))

    def _send_sums(
        self, form: AcrossCombineForm, call: Call, along: RelayAddresses, y: Combined, home: RowMemory, words: Words
    ) -> list[Transfer]:
        """Add up the rows of tokens of other nodes, ``y``, and exchange the sums."""
        crossing, relay, chunks, transfers = self._crossing, along.relay, form.chunks, []
        used = chunks.used(relay.most)
        if used > 1:
            no_counts = crossing.no_counts(along.whole.src_counts)
            along = along._replace(no_counts=no_counts.data_ptr())
        for to, source in crossing.steps:
            goes, comes = chunks.cut(relay.came[to]), chunks.cut(relay.went[source])
            for i in range(max(used, len(goes), len(comes))):
                go, come = goes[i] if i < len(goes) else NO_TOKENS, comes[i] if i < len(comes) else NO_TOKENS
                done: list[Tensor] = []
                if i < used:  # else no rank of this node has tokens in it
                    at = along.segment(to) if used == 1 else along.chunk(to, go)
                    sums = self._inside.send(form.inside, call, y.x, at, y.topk_weights, (), None)
                    done = [sums.x] if sums.topk_weights is None else [sums.x, sums.topk_weights]
                send = Sums(to, go.num, [Parcel.of(each) for each in done])
                recv = Sums(source, come.num, home.parcels(relay.first_out[source] + come.first, come.num))
                state = words.state(source, i)
                transfers.append(crossing.sums(call, send, recv, state, done, home.memory, words.memory))
        return transfers

    def _add_up(
        self, form: AcrossCombineForm, call: Call, along: RelayAddresses, own: Combined, home: RowMemory, result: Result
    ) -> Combined:
        """Add up the sums of all nodes, and the biases."""
        out, biases, empty = result.out, [aligned(bias) for bias in result.biases], self._context.empty
        num_tokens, columns = own.x.shape
        if out is None:
            out = empty((num_tokens, columns), (columns, 1), form.inside.dtype)
        weights_out = None
        if own.topk_weights is not None:
            weights_out = empty((num_tokens, form.inside.top_k), (form.inside.top_k, 1), torch.float32)
        if num_tokens:
            form.sum.pack(
                0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
                along.slots, along.dst_counts, own.x.data_ptr(), home.rows, address(own.topk_weights),
                home.weights, biases[0].data_ptr() if biases else 0,
                biases[1].data_ptr() if len(biases) > 1 else 0, out.data_ptr(), address(weights_out), num_tokens,
            )  # fmt: skip
            form.sum.launch(form.num_sms, call.stream)
        return Combined(out, weights_out)
