"""Combine across nodes: each node adds up its rows of a token, and the token's rank adds up the sums of the nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenferry.backends.base import CombineRequest
from tokenferry.backends.cuda.across.crossing import Crossing, States, Sums
from tokenferry.backends.cuda.across.forms import cap_sms
from tokenferry.backends.cuda.across.launch import sum_template
from tokenferry.backends.cuda.across.rails import Parcel, Rows
from tokenferry.backends.cuda.across.relay import RelayAddresses, relay_addresses
from tokenferry.backends.cuda.bounded import BoundedDict
from tokenferry.backends.cuda.buffers import SymmetricAllocator, aligned
from tokenferry.backends.cuda.combine import Combiner
from tokenferry.backends.cuda.context import Call, Context, LaunchTemplate
from tokenferry.backends.cuda.launch import address
from tokenferry.backends.tensors import overlap
from tokenferry.topology import Topology
from tokenferry.types import Combined

_MAX_FORMS = 256


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
        self._sums: BoundedDict[tuple[Any, ...], LaunchTemplate] = BoundedDict(_MAX_FORMS)

    def combine(self, request: CombineRequest) -> Combined:
        """Add up the rows of each of this rank's tokens."""
        y, plan, weights = request.y, request.plan, request.topk_weights
        at = relay_addresses(plan, self._topology)
        num_sms = cap_sms(self._context, request.num_sms)
        form = self._inside.form(plan, at.whole, y, weighted=weights is not None, num_sms=num_sms)
        call = self._crossing.begin(form.signature)
        with self._context.breaking_off():  # peers wait for this rank
            opening = self._crossing.open_along(call, at.came, at.went)  # sums go back where tokens came from
            rows, weights = self._inside.in_window(form, call, y, weights, at.whole)
            relay, K = at.relay, form.top_k
            parts = torch.empty(relay.first_out[-1], form.columns, dtype=y.dtype, device=y.device)
            parts_weights = None
            if weights is not None:
                parts_weights = torch.empty(len(parts), K, dtype=torch.float32, device=y.device)
            home, transfers = Combined(parts, parts_weights), []
            chunks = self._crossing.chunks(parts.shape[1] * parts.element_size())
            used = chunks.used(relay.most)
            states = self._crossing.new_states(call, relay.went, chunks)
            no_counts = self._crossing.no_counts(plan) if used > 1 else None
            at = at._replace(no_counts=address(no_counts))
            into = [Rows.of(each) for each in _present(home)]
            for to, source in self._crossing.steps:
                came, went = relay.came[to], relay.went[source]
                for i in range(max(used, chunks.count(came), chunks.count(went))):
                    go, comes = chunks.chunk(came, i), chunks.chunk(went, i)
                    done: list[Tensor] = []
                    if i < used:  # else no rank of this node has tokens in it
                        plan_at = at.segment(to) if used == 1 else at.chunk(to, go)
                        done = _present(self._inside.send(form, call, rows, plan_at, weights, (), None))
                    send = Sums(to, go.num, [Parcel.of(each) for each in done])
                    first = relay.first_out[source] + comes.first
                    recv = Sums(source, comes.num, [each.part(first, comes.num) for each in into])
                    state = States.of_chunk(states, source, i)
                    transfers.append(self._crossing.sums(call, send, recv, state, done, parts, parts_weights, states))
            own = self._inside.send(form, call, rows, at.segment(relay.node), weights, (), None)
            self._crossing.confirm(call, opening, at.whole.src_counts)
            for transfer in transfers:
                transfer.join()
            self._crossing.check(call, opening, States.of(states), at.whole.src_counts)
            out = request.out
            if out is None or out.data_ptr() % 16 or overlap(out, y):
                out = torch.empty_like(own.x)
            return self._add_up(request, call, at, own, home, out)

    def _add_up(
        self, request: CombineRequest, call: Call, at: RelayAddresses, own: Combined, parts: Combined, out: Tensor
    ) -> Combined:
        """Add up the sums of all nodes, and the biases; ``out``: aligned memory for the result."""
        num_tokens, columns = own.x.shape
        key = (out.dtype, columns, at.whole.top_k)
        template = self._sums.get(key)
        if template is None:
            template = self._sums[key] = sum_template(self._context, self._topology, *key)
        biases = [aligned(bias) for bias in request.biases]
        weights_out = None if own.topk_weights is None else torch.empty_like(own.topk_weights)
        template.pack(
            0, call.alive, call.number, call.signature.words, 0, 0, 0, 0, 0, 0,
            at.slots, at.dst_counts, own.x.data_ptr(), parts.x.data_ptr(), address(own.topk_weights),
            address(parts.topk_weights), biases[0].data_ptr() if biases else 0,
            biases[1].data_ptr() if len(biases) > 1 else 0, out.data_ptr(), address(weights_out), num_tokens,
        )  # fmt: skip
        if num_tokens:
            template.launch(request.num_sms or self._context.num_sms, call.stream)
        if request.out is not None and request.out is not out:
            with torch.inference_mode():  # `out` may come from it
                request.out.copy_(out)
            out = request.out
        return Combined(out, weights_out)


def _present(sums: Combined) -> list[Tensor]:
    return [each for each in (sums.x, sums.topk_weights) if each is not None]
