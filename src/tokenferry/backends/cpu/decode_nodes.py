"""Decode calls over two levels; see `tokenferry.backends.cpu.levels`.

A rank acts for the tokens that reach it along its rail as if they were its own: it passes their rows on inside its
node, and adds up what the node sends back for them. What it does for others needs messages of its peers, for which a
call with a hook does not wait. So it is postponed to the hook, or to the next call, whichever comes first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest, DecodeDispatchRequest, Encoding
from tokenferry.backends.cpu import routing
from tokenferry.backends.cpu.decode_rows import TokenSums, decoded_by_source, encoded, rows_for
from tokenferry.backends.cpu.exchange import Pending, Signature, counted
from tokenferry.backends.cpu.levels import Levels, TransferOptions, TwoLevelTransfer, distinct
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.backends.cpu.route import consecutive_slices, outgoing_of
from tokenferry.backends.tensors import drop_ranks, without_autocast
from tokenferry.errors import CapacityError, PlanError
from tokenferry.transports.base import Deadline


class NodeDispatch:
    """The rows of a dispatch; see `tokenferry.backends.cpu.decode.PendingDispatch`.

    A rank with more tokens for another node than there are slots sends no rows, but how many it had; so every rank of
    every node learns of it with the rows that it does not get.

    Args:
        levels: Starts the exchanges.
        signature: That of the call.
        payload: The rows of this rank.
        topk_idx: Their experts.
        request: The dispatch.

    Attributes:
        relayed: ``DecodePlan._table``.
    """

    def __init__(
        self, levels: Levels, signature: Signature, payload: Payload, topk_idx: Tensor, request: DecodeDispatchRequest
    ) -> None:
        shape, exchange = request.shape, levels.exchange
        self._levels, self._num_experts, self._slots = levels, shape.num_experts, shape.node_slots
        self._wait_ns = request.stats.wait_ns
        self.relayed = torch.full(
            (len(levels.nodes), shape.max_tokens, shape.top_k), -1, dtype=torch.int64, device="cpu"
        )
        token, counts = routing.destinations(topk_idx, shape.num_experts, exchange.num_ranks)
        tokens = list(torch.split(token, counts.tolist()))
        most = max(distinct(tokens, ranks).numel() for ranks in levels.nodes if ranks != levels.mine)
        overflow = most if shape.node_slots is not None and most > shape.node_slots else 0
        if overflow:
            tokens = [token[:0]] * exchange.num_ranks
        self._record(levels.node, topk_idx[distinct(tokens, levels.mine)])
        options = TransferOptions(tolerant=True, hooked=request.return_hook, note=overflow)
        self._move = TwoLevelTransfer(levels, signature, payload, tokens, options, Deadline(exchange.timeout_s))
        self.number = self._move.number
        exchange.postpone(signature.phase, self._pass_on)

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        return self._move.aborted

    @contextlib.contextmanager
    def receive(self, deadline: Deadline, wait_ns: Tensor | None) -> Iterator[list[ReceivedRows]]:
        """See `PendingDispatch.receive`."""
        with self._move.receive(deadline, wait_ns) as received:
            if not self._move.notes:
                yield received
        if self._move.notes:
            rank, most = min(self._move.notes.items())
            raise CapacityError(
                f"decode_dispatch: rank {rank} has {most} tokens for one other node, more than "
                f"node_slots={self._slots}; send fewer at once, or make the group with MoeShape(node_slots={most})"
            )

    @torch.inference_mode()  # counters may come from it
    @without_autocast
    def _pass_on(self, deadline: Deadline) -> None:
        self._move.pass_on(self._goes_to, deadline, self._wait_ns)

    def _goes_to(self, node: int, rows: Payload) -> Tensor:
        here = self._record(node, rows.metadata()["topk_idx"])
        num_ranks = self._levels.exchange.num_ranks
        return routing.hits(here, self._num_experts // num_ranks, num_ranks)[:, list(self._levels.mine)]

    def _record(self, node: int, topk_idx: Tensor) -> Tensor:
        """Note the experts of this node of some tokens from a node, and return them; the others are -1."""
        owner = topk_idx.long() // (self._num_experts // self._levels.exchange.num_ranks)
        mine = torch.tensor(self._levels.mine, dtype=torch.int64, device="cpu")
        here = torch.where(torch.isin(owner, mine), topk_idx.long(), -1)
        self.relayed[node, : len(here)] = here
        return here


class NodeCombine:
    """The rows of a combine; see `tokenferry.backends.cpu.decode.PendingCombine`.

    Rows travel unencoded inside a node. Its sums are rounded to their dtype, and encoded: those for this node, too, so
    that no result depends on the node of its token.

    Args:
        levels: Starts the exchanges.
        signature: That of the call, without the fields of the payload.
        request: The combine.

    Raises:
        PlanError: ranks were masked when the plan was made.
    """

    def __init__(self, levels: Levels, signature: Signature, request: DecodeCombineRequest) -> None:
        plan, exchange = request.plan, levels.exchange
        if plan._table is None:
            raise PlanError(
                "decode_combine: plan: was made while ranks were masked, and none is now; make a new one with "
                "decode_dispatch"
            )
        assert plan.topk_weights is not None
        self._levels, self._signature, self._request = levels, signature, request
        self._relayed, self._weights = plan._table, plan.topk_weights
        self._tokens = self._tokens_by_node()
        deadline = Deadline(exchange.timeout_s)
        self._weights_across = self._send_weights(deadline)
        sources = [list(ranks) for ranks in zip(*levels.nodes, strict=True)]
        outgoing = rows_for(request, levels.by_rank(levels.mine, sources, []), Encoding.same, exchange.allocator)
        self._rows = outgoing.payload
        here = Signature(signature.kind, {**signature.fields, **outgoing.payload.fields})
        hooked = request.return_hook
        self._here = levels.start_here(here, None, outgoing, deadline, copy_own=hooked, tolerant=True, hooked=hooked)
        self._sums: tuple[Payload, Pending] | None = None
        exchange.postpone(signature.phase, self._add_up)

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        return self._here.aborted

    def receive(self, out: Tensor, deadline: Deadline) -> None:
        """See `PendingCombine.receive`."""
        assert self._sums is not None
        levels, request, (payload, pending) = self._levels, self._request, self._sums
        received, tokens = [ReceivedRows(0, [])] * len(levels.nodes), list(self._tokens)
        with pending.receive_each(tolerant=True, deadline=deadline) as take:
            for node in [*levels.others, levels.node]:
                rank = levels.rail[node]
                with counted(request.stats.wait_ns, levels.nodes[node] if node != levels.node else []):
                    received[node] = take(rank)
                if pending.lacks(rank):  # it may have sent its sums before
                    received[node], tokens[node] = ReceivedRows(0, []), tokens[node][:0]
                pending.check_count(rank, received[node].num_rows, tokens[node].numel())
            allocator = levels.exchange.allocator
            by_node = decoded_by_source(payload, received, request.encoding, allocator)
            routing.reduce_rows(out, tokens, by_node, allocator)

    @torch.inference_mode()  # rows and counters may come from it
    @without_autocast
    def _add_up(self, deadline: Deadline) -> None:
        """Add up the rows of this node for the tokens that this rank has passed on, and send the sums back."""
        levels, request, exchange = self._levels, self._request, self._levels.exchange
        used = (self._relayed >= 0).any(2)
        counts: list[int] = used.sum(1).tolist()
        weights = self._receive_weights(counts, deadline)
        num_experts = request.plan.num_experts
        with self._here.receive(request.stats.wait_ns, tolerant=True, deadline=deadline) as received:
            absent = frozenset(src for src in levels.mine if self._here.lacks(src))
            received = [ReceivedRows(0, []) if src in absent else one for src, one in enumerate(received)]
            topk_idx = drop_ranks(self._relayed[used], absent, num_experts // exchange.num_ranks)
            sums = TokenSums(topk_idx, weights, num_experts, exchange.num_ranks, fast=request.fast)
            self._here.check_counts(received, sums.expected)
            total = torch.empty(sum(counts), request.y.shape[-1], dtype=request.y.dtype, device="cpu")
            sums.write(total, self._rows, received, Encoding.same, exchange.allocator)
        payload = encoded(total, request.encoding)
        rows = levels.by_rank(levels.rail, consecutive_slices(counts), slice(0, 0))
        outgoing = Outgoing(payload, rows, levels.by_rank(levels.rail, counts, 0))
        signature = Signature(self._signature.kind, {**self._signature.fields, **payload.fields})
        self._sums = payload, levels.start_across(signature, outgoing, deadline, hooked=request.return_hook)

    def _tokens_by_node(self) -> Sequence[Tensor]:
        """Return the tokens of this rank that have experts on each node."""
        plan, num_ranks = self._request.plan, self._levels.exchange.num_ranks
        goes_to = routing.hits(plan.topk_idx.long(), plan.num_experts // num_ranks, num_ranks)
        return [goes_to[:, list(ranks)].any(1).nonzero()[:, 0] for ranks in self._levels.nodes]

    def _send_weights(self, deadline: Deadline) -> Pending:
        """Send each other node the weights of the tokens that it has rows of, if it is to apply them.

        They are those of now: the dispatch may have had others, or none. For fast sums the message is empty, and sent
        all the same: as every call begins with an exchange between nodes, ranks notice at once if they make different
        ones.
        """
        levels, payload = self._levels, Payload(self._weights)
        none = self._tokens[0][:0]
        unsent = self._request.fast
        tokens = [none if unsent or node == levels.node else each for node, each in enumerate(self._tokens)]
        outgoing = outgoing_of(payload, levels.by_rank(levels.rail, tokens, none))
        signature = Signature(self._signature.kind, {**self._signature.fields, **payload.fields})
        return levels.start_across(signature, outgoing, deadline, "weights", hooked=self._request.return_hook)

    def _receive_weights(self, counts: Sequence[int], deadline: Deadline) -> Tensor:
        """Return ``[rows, K]``: the weights of the tokens that this rank has passed on, by node; fast: undefined."""
        levels, stats, fast = self._levels, self._request.stats, self._request.fast
        weights = torch.zeros(sum(counts), self._weights.shape[1], dtype=torch.float32, device="cpu")
        places = consecutive_slices(counts)
        weights[places[levels.node]] = self._weights[self._tokens[levels.node]]
        with self._weights_across.receive_each(tolerant=True, deadline=deadline) as take:
            for node in levels.others:
                rank = levels.rail[node]
                with counted(stats.wait_ns, levels.nodes[node]):
                    source = take(rank)
                if self._weights_across.lacks(rank):
                    continue
                self._weights_across.check_count(rank, source.num_rows, 0 if fast else counts[node])
                if not fast:
                    weights[places[node]] = source.sections[0].view(torch.float32)
        return weights
