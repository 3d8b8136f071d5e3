"""Decode calls in which every rank sends to every other one: those of one node, and those with masked ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from tokenferry.backends.base import DecodeCombineRequest
from tokenferry.backends.cpu.decode_rows import TokenSums, rows_for
from tokenferry.backends.cpu.exchange import Exchange, Signature
from tokenferry.backends.cpu.payload import Payload, ReceivedRows
from tokenferry.backends.cpu.route import outgoing_of
from tokenferry.backends.tensors import drop_ranks
from tokenferry.transports.base import Deadline


class DirectDispatch:
    """The rows of a dispatch; see `tokenferry.backends.cpu.decode.PendingDispatch`.

    Args:
        exchange: Sends them.
        signature: That of the call.
        payload: The rows of this rank.
        tokens: By destination rank, its tokens.
        hooked: Whether the rows are received after the call has returned.
    """

    relayed = None

    def __init__(
        self, exchange: Exchange, signature: Signature, payload: Payload, tokens: Sequence[Tensor], *, hooked: bool
    ) -> None:
        skip = frozenset(exchange.masked)
        self._pending = exchange.start(
            signature, outgoing_of(payload, tokens), skip=skip, copy_own=hooked, hooked=hooked
        )
        self.number = self._pending.number

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        return self._pending.aborted

    @contextlib.contextmanager
    def receive(self, deadline: Deadline, wait_ns: Tensor | None) -> Iterator[list[ReceivedRows]]:
        """See `PendingDispatch.receive`."""
        with self._pending.receive(wait_ns, tolerant=True, deadline=deadline) as received:
            yield received


class DirectCombine:
    """The rows of a combine; see `tokenferry.backends.cpu.decode.PendingCombine`.

    Args:
        exchange: Sends them.
        signature: That of the call, without the fields of the payload.
        request: The combine.
    """

    def __init__(self, exchange: Exchange, signature: Signature, request: DecodeCombineRequest) -> None:
        self._exchange, self._request, skip = exchange, request, frozenset(exchange.masked)
        sources = [[] if rank in skip else [rank] for rank in range(exchange.num_ranks)]
        outgoing = rows_for(request, sources, request.encoding, exchange.allocator)
        self._payload = outgoing.payload
        signature = Signature(signature.kind, {**signature.fields, **outgoing.payload.fields})
        hooked = request.return_hook
        self._pending = exchange.start(signature, outgoing, skip=skip, copy_own=hooked, hooked=hooked)

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        return self._pending.aborted

    def receive(self, out: Tensor, deadline: Deadline) -> None:
        """See `PendingCombine.receive`."""
        request = self._request
        with self._pending.receive(request.stats.wait_ns, tolerant=True, deadline=deadline) as received:
            absent = frozenset(src for src in range(len(received)) if self._pending.lacks(src))
            # The rows of a rank that is masked by now do not count, even if they have arrived.
            received = [ReceivedRows(0, []) if src in absent else one for src, one in enumerate(received)]
            plan, num_ranks = request.plan, self._exchange.num_ranks
            assert plan.topk_weights is not None
            topk_idx = drop_ranks(plan.topk_idx, absent, plan.num_experts // num_ranks)
            sums = TokenSums(topk_idx, plan.topk_weights, plan.num_experts, num_ranks, fast=request.fast)
            self._pending.check_counts(received, sums.expected)
            sums.write(out, self._payload, received, request.encoding, self._exchange.allocator)
