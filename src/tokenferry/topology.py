"""The nodes of a group: which ranks share a node, and which ranks of different nodes form a rail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenferry.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes of a group, as one rank sees them.

    A node is a set of ranks that reach each other's memory (NVLink; on CPUs shared memory). With several nodes, a token
    crosses the network once for each node that it goes to: from its rank to the rank with the same local index there.
    Ranks with the same local index form a *rail*; the other ranks of its rail are the *rail peers* of a rank.

    Attributes:
        rank: This rank.
        nodes: The ranks of each node, ascending; nodes are in the order of their first ranks and equally large.
        found: How these nodes were found, in words.
    """

    rank: int
    nodes: tuple[tuple[int, ...], ...]
    found: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len({len(ranks) for ranks in self.nodes}) != 1:
            sizes = ", ".join(str(len(ranks)) for ranks in self.nodes)
            raise ConfigError(f"Topology: nodes: expected nodes of equally many ranks, got {sizes}")
        if not any(self.rank in ranks for ranks in self.nodes):
            raise ConfigError(f"Topology: rank: rank {self.rank} is on none of the nodes")

    @property
    def num_ranks(self) -> int:
        """The number of ranks of all nodes, R."""
        return self.num_nodes * self.ranks_per_node

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.nodes)

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks of each node."""
        return len(self.nodes[0])

    @property
    def node(self) -> int:
        """The node of this rank."""
        return self.node_of(self.rank)

    @property
    def local_rank(self) -> int:
        """The position of this rank in its node."""
        return self.nodes[self.node].index(self.rank)

    @property
    def rail(self) -> tuple[int, ...]:
        """By node, the rank there with the local index of this one."""
        local_rank = self.local_rank
        return tuple(ranks[local_rank] for ranks in self.nodes)

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        return next(node for node, ranks in enumerate(self.nodes) if rank in ranks)

    def __str__(self) -> str:
        nodes, ranks = self.num_nodes, self.ranks_per_node
        return f"{nodes} node{'s' * (nodes != 1)} of {ranks} rank{'s' * (ranks != 1)}"


def consecutive(num_ranks: int, ranks_per_node: int) -> tuple[tuple[int, ...], ...]:
    """Return nodes of consecutive ranks; a group that is smaller than a node is one.

    Raises:
        ConfigError: ``ranks_per_node`` does not divide R.
    """
    ranks_per_node = min(ranks_per_node, num_ranks)
    if num_ranks % ranks_per_node:
        raise ConfigError(
            f"ExpertGroup: ranks_per_node={ranks_per_node} does not divide the group's {num_ranks} ranks; all nodes "
            "have equally many"
        )
    return tuple(tuple(range(first, first + ranks_per_node)) for first in range(0, num_ranks, ranks_per_node))


def by_place(places: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks at each place, such as a host, ascending, in the order of their first ranks.

    Args:
        places: By rank, the name of the place where it is.
    """
    return tuple(tuple(rank for rank, there in enumerate(places) if there == place) for place in dict.fromkeys(places))


def node_of_ranks(nodes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the node of each rank."""
    node_of = {rank: node for node, ranks in enumerate(nodes) for rank in ranks}
    return tuple(node_of[rank] for rank in range(len(node_of)))


def most_nodes(nodes: Sequence[Sequence[int]], num_experts: int, top_k: int, num_groups: int, top_groups: int) -> int:
    """Return the most nodes that a token can go to if it may use the experts of only some groups.

    Exact if nodes are consecutive ranks. Of other nodes it may be more than any choice of experts reaches, never less.

    Args:
        nodes: The ranks of each node: `Topology.nodes`.
        num_experts: E, a multiple of R.
        top_k: K, experts of a token.
        num_groups: Groups of neighbouring experts, as `tokenferry.nn.GroupLimit` has them; 1 without a limit.
        top_groups: Groups whose experts a token may use.

    Raises:
        ConfigError: ``num_groups`` does not divide E.
    """
    if num_experts % num_groups:
        raise ConfigError(f"GroupLimit: num_groups={num_groups} does not divide E={num_experts}; use a divisor of E")
    node_of = node_of_ranks(nodes)
    width, per_rank = num_experts // num_groups, num_experts // len(node_of)
    spans = (
        frozenset(node_of[first // per_rank : (first + width - 1) // per_rank + 1])
        for first in range(0, num_experts, width)
    )
    groups = list(dict.fromkeys(spans))  # a second group on the same nodes adds none
    # By the last group of a choice: the nodes of the best choice. Of consecutive nodes, a group shares with earlier
    # groups only what it shares with the one before it in the choice.
    most = [len(group) for group in groups]
    for _ in range(min(top_groups, top_k) - 1):
        most = [
            max([most[i], *(most[before] + len(group - groups[before]) for before in range(i))])
            for i, group in enumerate(groups)
        ]
    return min(max(most), len(nodes), top_k)
