"""The exchanges of calls over two levels: between the ranks of a rail, and between those of a node.

Over two levels a row crosses the network once for each node, however many ranks of that node it goes to: from rank l of
its node to rank l of the other one, which passes it on inside its node. Sums return the same way: a rank passes its
rows to the rank of its node that is a rail peer of their source, which adds up those of the whole node and sends one
row.

All ranks make the exchanges of a call in the same order, so that their numbers agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tokenferry.backends.cpu.exchange import Exchange, Pending, Signature, counted
from tokenferry.backends.cpu.payload import Outgoing, Payload, ReceivedRows
from tokenferry.backends.cpu.route import outgoing_of
from tokenferry.topology import Topology
from tokenferry.transports.base import Deadline
from tokenferry.types import Plan

_T = TypeVar("_T")


class Levels:
    """Starts the exchanges of calls over two levels.

    Args:
        exchange: Reaches all ranks.
        topology: The nodes.

    Attributes:
        exchange: As given.
        nodes: The ranks of each node.
        node: The node of this rank.
        mine: Its ranks.
        rail: By node, the rank of this rail: this rank, or its rail peer there.
        others: The other nodes, in the order in which to pass on their rows.
    """

    def __init__(self, exchange: Exchange, topology: Topology) -> None:
        everyone = frozenset(range(exchange.num_ranks))
        self.exchange = exchange
        self.nodes = topology.nodes
        self.node = topology.node
        self.mine = topology.nodes[topology.node]
        self.rail = topology.rail
        # Each begins with the node behind its own: if all began with node 0, its rows would always come first.
        self.others = [(topology.node + step) % topology.num_nodes for step in range(1, topology.num_nodes)]
        self._not_here = everyone - frozenset(self.mine)
        self._not_on_rail = everyone - frozenset(self.rail)

    def start_across(
        self, signature: Signature, outgoing: Outgoing, deadline: Deadline, what: str = "", *, hooked: bool = False
    ) -> Pending:
        """Send rows to the ranks of this rail; ``what`` names them in errors, if the call sends several things.

        Ranks that were masked since the call began are sent their rows, too: both sides count the messages of a process
        group, and may have masked each other at another point of the call.
        """
        leg = f"between nodes, {what}" if what else "between nodes"
        signature = Signature(signature.kind, signature.fields, leg)
        return self.exchange.start(signature, outgoing, skip=self._not_on_rail, hooked=hooked, deadline=deadline)

    def start_here(
        self,
        signature: Signature,
        node: int | None,
        outgoing: Outgoing,
        deadline: Deadline,
        *,
        copy_own: bool,
        tolerant: bool = False,
        hooked: bool = False,
    ) -> Pending:
        """Send rows to the ranks of this node: those that come from, or go to, one node, or None: all.

        A ``tolerant`` call leaves out those that were masked since it began.
        """
        leg = "within a node" if node is None else f"within a node, rows of node {node}"
        signature = Signature(signature.kind, signature.fields, leg)
        skip = self._not_here | self.exchange.masked if tolerant else self._not_here
        return self.exchange.start(signature, outgoing, skip=skip, copy_own=copy_own, hooked=hooked, deadline=deadline)

    def by_rank(self, ranks: Sequence[int], values: Sequence[_T], nothing: _T) -> list[_T]:
        """Return, by rank, the values of some ranks, and ``nothing`` for the others."""
        by_rank = [nothing] * self.exchange.num_ranks
        for rank, value in zip(ranks, values, strict=True):
            by_rank[rank] = value
        return by_rank


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How rows move over two levels.

    Attributes:
        tolerant: Whether masked ranks are left out; see also `Pending.receive`.
        hooked: Whether the rows are received after the call has returned: their source may be overwritten before.
        note: See `Outgoing`.
    """

    tolerant: bool = False
    hooked: bool = False
    note: int = 0


class TwoLevelTransfer:
    """The rows of a dispatch on their way over two levels; all ranks call `pass_on`, then `receive`.

    Args:
        levels: Starts the exchanges.
        signature: That of the call.
        payload: The rows of this rank.
        tokens: By destination rank, its tokens.
        options: How they move.
        deadline: That of the call.

    Attributes:
        relay: By node, ``[rows, ranks a node]`` bool: which ranks of this node get each row that comes from there, or
            from this rank. Those of other nodes are known once `pass_on` has returned.
        notes: By rank, the note of each that has sent one; complete once `receive` yields.
    """

    def __init__(
        self,
        levels: Levels,
        signature: Signature,
        payload: Payload,
        tokens: Sequence[Tensor],
        options: TransferOptions,
        deadline: Deadline,
    ) -> None:
        mine, rail = levels.mine, levels.rail
        self._none, here = tokens[0][:0], [tokens[rank] for rank in mine]
        self.relay = {levels.node: members(distinct(tokens, mine), here)}
        self.notes: dict[int, int] = {}
        self._levels, self._signature, self._payload, self._options = levels, signature, payload, options
        crossing = [self._none if ranks == mine else distinct(tokens, ranks) for ranks in levels.nodes]
        outgoing = outgoing_of(payload, levels.by_rank(rail, crossing, self._none), options.note)
        hooked, tolerant = options.hooked, options.tolerant
        self._across = levels.start_across(signature, outgoing, deadline, hooked=hooked)
        outgoing = outgoing_of(payload, levels.by_rank(mine, here, self._none), options.note)
        own = levels.start_here(
            signature, levels.node, outgoing, deadline, copy_own=hooked, tolerant=tolerant, hooked=hooked
        )
        self._legs = {levels.node: own}

    @property
    def number(self) -> int:
        """The number of the call, the same on all ranks."""
        return self._across.number

    @property
    def aborted(self) -> bool:
        """See `Pending.aborted`."""
        return self._across.aborted

    def pass_on(
        self, goes_to: Callable[[int, Payload], Tensor], deadline: Deadline, wait_ns: Tensor | None = None
    ) -> None:
        """Wait for the rows of other nodes, and pass them on inside this one.

        Args:
            goes_to: Returns, for a node and the rows from there that this rank passes on, ``relay``.
            deadline: When to give up.
            wait_ns: ``[R]`` int64; the nanoseconds waited for each rank are added.
        """
        levels, options = self._levels, self._options
        with self._across.receive_each(tolerant=options.tolerant, deadline=deadline) as take:
            for node in levels.others:
                src = levels.rail[node]
                with counted(wait_ns, [src]):
                    source = take(src)
                rows = self._payload.arrived(source)
                self.relay[node] = goes_to(node, rows)
                self._across.check_count(src, rows.num_rows, len(self.relay[node]))
                outgoing = outgoing_of(
                    rows, levels.by_rank(levels.mine, columns(self.relay[node]), self._none), source.note
                )
                # What has come from another node lies in a message, which ends before the rows are read.
                self._legs[node] = levels.start_here(
                    self._signature,
                    node,
                    outgoing,
                    deadline,
                    copy_own=True,
                    tolerant=options.tolerant,
                    hooked=options.hooked,
                )

    @contextlib.contextmanager
    def receive(
        self, deadline: Deadline, wait_ns: Tensor | None = None, plan: Plan | None = None
    ) -> Iterator[list[ReceivedRows]]:
        """Wait for all rows; yields them by source rank, to be read inside the ``with`` block.

        Args:
            deadline: When to give up.
            wait_ns: ``[R]`` int64; the nanoseconds waited for the rows of each rank are added.
            plan: The plan that says how many rows come, if there is one.
        """
        levels, options = self._levels, self._options
        arrived = [ReceivedRows(0, [])] * levels.exchange.num_ranks
        with contextlib.ExitStack() as stack:
            for node, sources in enumerate(levels.nodes):
                leg = self._legs[node]
                receiving = leg.receive_each(tolerant=options.tolerant, deadline=deadline)
                take = stack.enter_context(receiving)
                for src, rank in zip(sources, levels.mine, strict=True):
                    # Rows that this rank has passed on itself were waited for then.
                    with counted(wait_ns, [] if rank == levels.exchange.rank else [src]):
                        arrived[src] = take(rank)
                    if arrived[src].note:
                        self.notes[src] = arrived[src].note
                    if plan is not None:
                        leg.check_count(rank, arrived[src].num_rows, int(plan.src_counts[src]))
            yield arrived


def distinct(by_rank: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Return the tokens that go to any of ``ranks``, ascending."""
    tokens: Tensor = torch.unique(torch.cat([by_rank[rank] for rank in ranks]))
    return tokens


def members(tokens: Tensor, subsets: Sequence[Tensor]) -> Tensor:
    """Return ``[tokens, subsets]`` bool: whether each token is in each subset."""
    return torch.stack([torch.isin(tokens, subset) for subset in subsets], dim=1)


def columns(membership: Tensor) -> list[Tensor]:
    """Return, for each subset, the positions of its members."""
    return [column.nonzero()[:, 0] for column in membership.unbind(1)]
