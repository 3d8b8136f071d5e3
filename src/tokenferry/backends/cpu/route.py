"""The ways that rows take between ranks of the CPU backend: direct, or over two levels, with several nodes.

Over two levels a row crosses the network once for each node, however many ranks of that node it goes to: from rank l of
its node to rank l of the other one, which passes it on inside its node. Sums go home the same way: a rank passes its
rows to the rank of its node that is across from their source, which adds up those of the whole node and sends one row.

All exchanges of a call share one deadline, and one numbering: every rank makes as many exchanges as there are nodes,
and one more.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tokenferry.backends.cpu import routing
from tokenferry.backends.cpu.exchange import Exchange, Pending, Signature
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.topology import Topology
from tokenferry.transports.base import Deadline
from tokenferry.types import Plan

_T = TypeVar("_T")


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
        self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype, *, copy_own: bool
    ) -> contextlib.AbstractContextManager[Addends]:
        """Send the received rows home; sums on the way are rounded to ``dtype``."""
        ...


def make_route(exchange: Exchange, topology: Topology) -> Route:
    """Return the way for the nodes of a group."""
    return Direct(exchange) if topology.num_nodes == 1 else TwoLevels(exchange, topology)


class Direct:
    """Every rank sends to every other one; see `Route`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    @contextlib.contextmanager
    def dispatch(
        self, signature: Signature, payload: Payload, tokens: Sequence[Tensor], experts_per_rank: int
    ) -> Iterator[Arrived]:
        """See `Route.dispatch`."""
        with self._exchange.start(signature, _outgoing(payload, tokens)).receive() as received:
            yield Arrived(received, torch.empty(0, 0, dtype=torch.int32, device="cpu"))

    @contextlib.contextmanager
    def redispatch(self, signature: Signature, payload: Payload, plan: Plan) -> Iterator[Arrived]:
        """See `Route.redispatch`."""
        pending = self._exchange.start(signature, _outgoing(payload, _tokens_by_rank(plan)))
        with pending.receive() as received:
            pending.check_counts(received, plan.src_counts.tolist())
            yield Arrived(received, torch.empty(0, 0, dtype=torch.int32, device="cpu"))

    @contextlib.contextmanager
    def combine(
        self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype, *, copy_own: bool
    ) -> Iterator[Addends]:
        """See `Route.combine`."""
        counts = plan.src_counts.tolist()
        pending = self._exchange.start(signature, Outgoing(payload, _consecutive(counts), counts), copy_own=copy_own)
        with pending.receive() as received:
            tokens = _tokens_by_rank(plan)
            pending.check_counts(received, [each.numel() for each in tokens])
            yield Addends(payload, received, tokens)


class TwoLevels:
    """A row crosses to each node once, and its rank there passes it on; see `Route`.

    Args:
        exchange: Reaches all ranks.
        topology: The nodes.
    """

    def __init__(self, exchange: Exchange, topology: Topology) -> None:
        everyone = frozenset(range(exchange.num_ranks))
        self._exchange = exchange
        self._nodes = topology.nodes
        self._node = topology.node
        self._mine = topology.nodes[topology.node]
        self._rail = topology.rail
        self._not_here = everyone - frozenset(self._mine)
        self._not_on_rail = everyone - frozenset(self._rail)
        # Each begins with the node behind its own: if all began with node 0, its rows would always come first.
        self._others = [(topology.node + step) % topology.num_nodes for step in range(1, topology.num_nodes)]

    def dispatch(
        self, signature: Signature, payload: Payload, tokens: Sequence[Tensor], experts_per_rank: int
    ) -> contextlib.AbstractContextManager[Arrived]:
        """See `Route.dispatch`."""
        mine = list(self._mine)

        def goes_to(_node: int, rows: Payload) -> Tensor:
            experts = rows.metadata()["topk_idx"].long()
            return routing.hits(experts, experts_per_rank, self._exchange.num_ranks)[:, mine]

        return self._move(signature, payload, tokens, goes_to, None)

    def redispatch(
        self, signature: Signature, payload: Payload, plan: Plan
    ) -> contextlib.AbstractContextManager[Arrived]:
        """See `Route.redispatch`."""
        relay = self._relay(plan)
        return self._move(signature, payload, _tokens_by_rank(plan), lambda node, _rows: relay[node], plan)

    @contextlib.contextmanager
    def combine(
        self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype, *, copy_own: bool
    ) -> Iterator[Addends]:
        """See `Route.combine`. Rows are never copied: when the result is written, their sums have been made."""
        deadline = Deadline(self._exchange.timeout_s)
        total = self._sum_here(signature, payload, plan, dtype, deadline)
        tokens = [_distinct(_tokens_by_rank(plan), ranks) for ranks in self._nodes]
        fields = {**signature.fields, **total.fields}
        counts = [len(goes_to) for goes_to in self._relay(plan)]
        rows = self._by_rank(self._rail, _consecutive(counts), slice(0, 0))  # a rail need not be ascending
        outgoing = Outgoing(total, rows, self._by_rank(self._rail, counts, 0))
        pending = self._start_across(Signature(signature.kind, fields), outgoing, deadline)
        with pending.receive(deadline=deadline) as received:
            pending.check_counts(received, self._by_rank(self._rail, [each.numel() for each in tokens], 0))
            yield Addends(total, [received[rank] for rank in self._rail], tokens)

    @contextlib.contextmanager
    def _move(
        self,
        signature: Signature,
        payload: Payload,
        tokens: Sequence[Tensor],
        goes_to: Callable[[int, Payload], Tensor],
        plan: Plan | None,
    ) -> Iterator[Arrived]:
        """Send each rank its rows.

        Args:
            signature: That of the call.
            payload: The rows of this rank.
            tokens: By destination rank, its tokens.
            goes_to: Returns, for a node and the rows from there that this rank passes on, ``[rows, ranks a node]``
                bool: which ranks of this node get each row.
            plan: The plan that says how many rows come, if there is one.
        """
        deadline = Deadline(self._exchange.timeout_s)
        none, here = tokens[0][:0], [tokens[rank] for rank in self._mine]
        relay = {self._node: _members(_distinct(tokens, self._mine), here)}
        crossing = [none if ranks == self._mine else _distinct(tokens, ranks) for ranks in self._nodes]
        outgoing = _outgoing(payload, self._by_rank(self._rail, crossing, none))
        across = self._start_across(signature, outgoing, deadline)
        outgoing = _outgoing(payload, self._by_rank(self._mine, here, none))
        legs = {self._node: self._start_here(signature, self._node, outgoing, deadline)}
        with across.receive_each(deadline=deadline) as take:
            for node in self._others:
                src = self._rail[node]
                rows = payload.arrived(take(src))
                relay[node] = goes_to(node, rows)
                across.check_count(src, rows.num_rows, len(relay[node]))
                outgoing = _outgoing(rows, self._by_rank(self._mine, _columns(relay[node]), none))
                legs[node] = self._start_here(signature, node, outgoing, deadline)
        with contextlib.ExitStack() as stack:
            arrived = [ReceivedRows(0, [])] * self._exchange.num_ranks
            for node, sources in enumerate(self._nodes):
                received = stack.enter_context(legs[node].receive(deadline=deadline))
                for src, rank in zip(sources, self._mine, strict=True):
                    if plan is not None:
                        legs[node].check_count(rank, received[rank].num_rows, int(plan.src_counts[src]))
                    arrived[src] = received[rank]
            yield Arrived(arrived, _joined([relay[node] for node in range(len(self._nodes))]))

    def _sum_here(
        self, signature: Signature, payload: Payload, plan: Plan, dtype: torch.dtype, deadline: Deadline
    ) -> Payload:
        """Return, by node, the sums over the ranks of this node for the tokens that this rank has passed on."""
        counts = plan.src_counts.tolist()
        slices = _consecutive(counts)
        legs = {}
        for node in [*self._others, self._node]:
            sources = self._nodes[node]
            rows = self._by_rank(self._mine, [slices[src] for src in sources], slice(0, 0))
            outgoing = Outgoing(payload, rows, self._by_rank(self._mine, [counts[src] for src in sources], 0))
            legs[node] = self._start_here(signature, node, outgoing, deadline)
        sums: list[Tensor] = []
        weights: list[Tensor] = []
        for node, goes_to in enumerate(self._relay(plan)):
            tokens = _columns(goes_to)
            with legs[node].receive(deadline=deadline) as received:
                here = [received[rank] for rank in self._mine]
                for rank, source, expected in zip(self._mine, here, tokens, strict=True):
                    legs[node].check_count(rank, source.num_rows, expected.numel())
                sums.append(self._sum(len(goes_to), dtype, tokens, [payload.view_rows(source) for source in here]))
                if payload.has("weights"):
                    of_rank = [payload.gather_metadata([source])["weights"] for source in here]
                    weights.append(self._sum(len(goes_to), torch.float32, tokens, of_rank))
        return Payload(torch.cat(sums), weights=torch.cat(weights) if weights else None)

    def _sum(self, num: int, dtype: torch.dtype, tokens: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """Return ``[num, width]``: for each token the sum of its rows of all sources, in source order."""
        out = torch.empty(num, rows[0].shape[1], dtype=dtype, device="cpu")
        routing.reduce_rows(out, tokens, rows, self._exchange.allocator)
        return out

    def _start_across(self, signature: Signature, outgoing: Outgoing, deadline: Deadline) -> Pending:
        """Send rows to the ranks of this rail."""
        signature = Signature(signature.kind, signature.fields, "between nodes")
        return self._exchange.start(signature, outgoing, skip=self._not_on_rail, deadline=deadline)

    def _start_here(self, signature: Signature, node: int, outgoing: Outgoing, deadline: Deadline) -> Pending:
        """Send rows that come from, or go to, one node to the ranks of this one."""
        signature = Signature(signature.kind, signature.fields, f"within a node, rows of node {node}")
        # What has come from another node lies in a message, which ends before the rows are read.
        copy_own = node != self._node
        return self._exchange.start(signature, outgoing, skip=self._not_here, copy_own=copy_own, deadline=deadline)

    def _relay(self, plan: Plan) -> Sequence[Tensor]:
        """Return, by node, ``[rows, ranks a node]`` bool: which ranks of this node got each row passed on."""
        counts = torch.bincount(plan._places[:, 0], minlength=len(self._nodes))
        return torch.split(plan._places[:, 1:] > 0, counts.tolist())

    def _by_rank(self, ranks: Sequence[int], values: Sequence[_T], nothing: _T) -> list[_T]:
        """Return, by rank, the values of some ranks, and ``nothing`` for the others."""
        by_rank = [nothing] * self._exchange.num_ranks
        for rank, value in zip(ranks, values, strict=True):
            by_rank[rank] = value
        return by_rank


def _outgoing(payload: Payload, rows: Sequence[Tensor]) -> Outgoing:
    return Outgoing(payload, rows, [each.numel() for each in rows])


def _consecutive(counts: Sequence[int]) -> list[slice]:
    """Return the slices of so many rows each that follow one another."""
    ends = list(itertools.accumulate(counts))
    return [slice(end - num, end) for end, num in zip(ends, counts, strict=True)]


def _tokens_by_rank(plan: Plan) -> Sequence[Tensor]:
    """Return, by destination rank, the tokens sent there, ascending."""
    counts = plan.dst_counts.tolist()
    return torch.split(plan.dst_token[: sum(counts)], counts)


def _distinct(by_rank: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Return the tokens that go to any of ``ranks``, ascending."""
    distinct: Tensor = torch.unique(torch.cat([by_rank[rank] for rank in ranks]))
    return distinct


def _members(tokens: Tensor, subsets: Sequence[Tensor]) -> Tensor:
    """Return ``[tokens, subsets]`` bool: whether each token is in each subset."""
    return torch.stack([torch.isin(tokens, subset) for subset in subsets], dim=1)


def _joined(relay: Sequence[Tensor]) -> Tensor:
    """Return ``Plan._places``: the nodes and the ranks of all rows that a rank passed on."""
    counts = torch.tensor([len(each) for each in relay], dtype=torch.int64, device="cpu")
    nodes = torch.repeat_interleave(torch.arange(len(relay), dtype=torch.int32, device="cpu"), counts)
    return torch.cat([nodes[:, None], torch.cat(list(relay)).int()], dim=1)


def _columns(members: Tensor) -> list[Tensor]:
    """Return, for each subset, the positions of its members."""
    return [column.nonzero()[:, 0] for column in members.unbind(1)]
