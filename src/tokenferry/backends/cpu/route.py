"""How rows of dispatch and combine get from rank to rank of the CPU backend: the protocol of all ways, and `Direct`.

`tokenferry.backends.cpu.two_levels` has the way over several nodes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenferry.backends.cpu.exchange import Exchange, Signature
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.types import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Arrived:
    """The rows that a dispatch brought.

    Attributes:
        rows: By source rank.
        relay: ``Plan._places``.
    """

    rows: list[ReceivedRows]
    relay: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Addends:
    """What a combine adds up.

    Attributes:
        payload: Reads the rows.
        rows: By source: a rank, or with several nodes a node.
        tokens: By source, the tokens of its rows, ascending.
    """

    payload: Payload
    rows: list[ReceivedRows]
    tokens: Sequence[Tensor]


class Route(Protocol):
    """A way of rows between ranks. All methods are collective, and yield rows to be read in their ``with`` block."""

    def dispatch(
        self, signature: Signature, payload: Payload, tokens: Sequence[Tensor], experts_per_rank: int
    ) -> contextlib.AbstractContextManager[Arrived]:
        """Send each rank its ``tokens``, with the experts of each in ``topk_idx``."""
        ...

    def redispatch(
        self, signature: Signature, payload: Payload, plan: Plan
    ) -> contextlib.AbstractContextManager[Arrived]:
        """Send each rank its rows, along a plan."""
        ...

    def combine(
        self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype
    ) -> contextlib.AbstractContextManager[Addends]:
        """Send the received rows back to their sources; sums on the way are rounded to ``dtype``."""
        ...


class Direct:
    """Every rank sends to every other one; see `Route`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @contextlib.contextmanager
    def dispatch(
        self, signature: Signature, payload: Payload, tokens: Sequence[Tensor], experts_per_rank: int
    ) -> Iterator[Arrived]:
        """See `Route.dispatch`."""
        with self._exchange.start(signature, outgoing_of(payload, tokens)).receive() as received:
            yield Arrived(received, torch.empty(0, 0, dtype=torch.int32, device="cpu"))

    @contextlib.contextmanager
    def redispatch(self, signature: Signature, payload: Payload, plan: Plan) -> Iterator[Arrived]:
        """See `Route.redispatch`."""
        pending = self._exchange.start(signature, outgoing_of(payload, tokens_by_rank(plan)))
        with pending.receive() as received:
            pending.check_counts(received, plan.src_counts.tolist())
            yield Arrived(received, torch.empty(0, 0, dtype=torch.int32, device="cpu"))

    @contextlib.contextmanager
    def combine(self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype) -> Iterator[Addends]:
        """See `Route.combine`."""
        counts = plan.src_counts.tolist()
        pending = self._exchange.start(signature, Outgoing(payload, consecutive_slices(counts), counts))
        with pending.receive() as received:
            tokens = tokens_by_rank(plan)
            pending.check_counts(received, [each.numel() for each in tokens])
            yield Addends(payload, received, tokens)


def outgoing_of(payload: Payload, rows: Sequence[Tensor], note: int = 0) -> Outgoing:
    """Return rows of a payload by destination rank, and the note that goes along."""
    return Outgoing(payload, rows, [each.numel() for each in rows], note)


def consecutive_slices(counts: Sequence[int]) -> list[slice]:
    """Return the slices of so many rows each that follow one another."""
    ends = list(itertools.accumulate(counts))
    return [slice(end - num, end) for end, num in zip(ends, counts, strict=True)]


def tokens_by_rank(plan: Plan) -> Sequence[Tensor]:
    """Return, by destination rank, the tokens sent there, ascending."""
    counts = plan.dst_counts.tolist()
    return torch.split(plan.dst_token[: sum(counts)], counts)
