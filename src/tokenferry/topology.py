"""Which ranks of a group share a node, and which ranks of other nodes are across from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenferry.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes of a group, as one rank sees them.

    A node is a set of ranks that reach each other's memory (NVLink; on CPUs shared memory). With several nodes, a token
    crosses the network once for each node that it goes to: from its rank to the rank with the same local index there.
    Ranks with the same local index form a *rail*.

    Attributes:
        rank: This rank.
        nodes: The ranks of each node, ascending; nodes are in the order of their first ranks and equally large.
    """

    rank: int
    nodes: tuple[tuple[int, ...], ...]

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
    """Return nodes of consecutive ranks.

    Raises:
        ConfigError: ``ranks_per_node`` does not divide R.
    """
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
