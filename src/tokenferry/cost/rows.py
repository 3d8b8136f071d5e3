"""The rows on each link: expected, from probabilities, and counted, from the routings of a call.

Rank (n, l) sends a token once to each other node m that it needs, to rank (m, l): the *relay*, which passes it on over
NVLink to the ranks of its node, as if the token were its own. Combine sends the same rows the opposite way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from tokenferry.cost.case import Case
from tokenferry.cost.reach import Reach
from tokenferry.errors import ConfigError, RoutingError
from tokenferry.topology import Topology, node_of_ranks

Experts = Tensor | Sequence[Sequence[int]]
"""The experts of the tokens of one rank, ``[T, K]``; -1: slot unused."""


@dataclass(frozen=True, slots=True)
class RankRows:
    """The rows of one dispatch on the links of one rank; integers if they were counted.

    Attributes:
        network_out: Rows to other nodes: one for each (own token, other node that it needs).
        network_in: Rows from other nodes, which this rank relays.
        own_out: Rows of own tokens to other ranks of the node, over NVLink.
        own_in: Rows of tokens of this node from its other ranks, over NVLink.
        relayed_out: Rows of tokens of other nodes that this rank passes on over NVLink.
        relayed_in: Rows of tokens of other nodes that other ranks of the node pass on to this rank.
        received: Rows that this rank's experts need: one for each token that has an expert here.
    """

    network_out: float = 0
    network_in: float = 0
    own_out: float = 0
    own_in: float = 0
    relayed_out: float = 0
    relayed_in: float = 0
    received: float = 0

    def reversed(self) -> RankRows:
        """Return the rows of the combine of the same tokens; ``received`` are then the rows that it returns."""
        return replace(
            self,
            network_out=self.network_in,
            network_in=self.network_out,
            own_out=self.own_in,
            own_in=self.own_out,
            relayed_out=self.relayed_in,
            relayed_in=self.relayed_out,
        )


def network_rows(topk_idx: Experts, num_experts: int, topology: Topology) -> tuple[int, ...]:
    """Count the rows that a rank sends to each node in one dispatch: one for each (token, other node). Pure.

    Args:
        topk_idx: The experts of the rank's tokens, ``[T, K]``, as a tensor or as lists.
        num_experts: E.
        topology: The nodes, as the rank sees them: `ExpertGroup.topology`.

    Returns:
        tuple[int, ...]: ``[N]`` rows; 0 for the own node.

    Raises:
        ConfigError: E is no multiple of R.
        RoutingError: an expert is outside of ``[-1, E)``.
    """
    node_of = node_of_ranks(topology.nodes)
    rows = [0] * topology.num_nodes
    for ranks in _ranks_of_tokens(topk_idx, num_experts, len(node_of)):
        for node in {node_of[rank] for rank in ranks} - {topology.node}:
            rows[node] += 1
    return tuple(rows)


def count_rows(topk_idx: Sequence[Experts], num_experts: int, nodes: Sequence[Sequence[int]]) -> tuple[RankRows, ...]:
    """Count the rows of one dispatch on the links of every rank. Pure.

    Args:
        topk_idx: ``[R]``: the experts of the tokens of each rank, ``[T, K]``; T may differ.
        num_experts: E.
        nodes: The ranks of each node, equally many: `Topology.nodes` or `Cluster.nodes`.

    Returns:
        tuple[RankRows, ...]: ``[R]``.

    Raises:
        ConfigError: E is no multiple of R, or there are not R routings.
        RoutingError: an expert is outside of ``[-1, E)``.
    """
    node_of = node_of_ranks(nodes)
    if len(topk_idx) != len(node_of):
        raise ConfigError(
            f"count_rows: topk_idx: expected one routing for each of {len(node_of)} ranks, got {len(topk_idx)}"
        )
    counts = [{field.name: 0 for field in fields(RankRows)} for _ in node_of]
    for source, experts in enumerate(topk_idx):
        home = node_of[source]
        local = nodes[home].index(source)
        for ranks in _ranks_of_tokens(experts, num_experts, len(node_of)):
            for node in {node_of[rank] for rank in ranks}:
                relay = nodes[node][local]
                if node != home:
                    counts[source]["network_out"] += 1
                    counts[relay]["network_in"] += 1
                kind = "own" if node == home else "relayed"
                for rank in (rank for rank in ranks if node_of[rank] == node):
                    counts[rank]["received"] += 1
                    if rank != relay:
                        counts[relay][f"{kind}_out"] += 1
                        counts[rank][f"{kind}_in"] += 1
    return tuple(RankRows(**count) for count in counts)


def expected_rows(case: Case, reach: Reach) -> tuple[RankRows, ...]:
    """Return the expected rows of one dispatch on the links of every rank, ``[R]``, if each passes M tokens. Pure."""
    tokens, nodes, per_node = case.shape.max_tokens, case.cluster.num_nodes, case.cluster.ranks_per_node
    all_nodes = sum(reach.nodes)
    rows = []
    for node in range(nodes):
        ranks = reach.ranks[node * per_node : (node + 1) * per_node]
        of_node = sum(ranks)
        for hit in ranks:
            own_out, own_in = tokens * (of_node - hit), tokens * (per_node - 1) * hit
            rows.append(
                RankRows(
                    network_out=tokens * (all_nodes - reach.nodes[node]),
                    network_in=tokens * (nodes - 1) * reach.nodes[node],
                    own_out=own_out,
                    own_in=own_in,
                    relayed_out=(nodes - 1) * own_out,
                    relayed_in=(nodes - 1) * own_in,
                    received=tokens * case.cluster.num_ranks * hit,
                )
            )
    return tuple(rows)


def busiest(rows: Sequence[RankRows]) -> RankRows:
    """Return the largest number of rows of each kind; they may be those of different ranks."""
    return _merged(rows, max)


def mean(rows: Sequence[RankRows]) -> RankRows:
    """Return the mean over the ranks of each number of rows."""
    return _merged(rows, lambda values: sum(values) / len(values))


def _merged(rows: Sequence[RankRows], merge: Callable[[list[float]], float]) -> RankRows:
    return RankRows(**{field.name: merge([getattr(each, field.name) for each in rows]) for field in fields(RankRows)})


def _ranks_of_tokens(topk_idx: Experts, num_experts: int, num_ranks: int) -> Iterator[set[int]]:
    """Yield the ranks that hold an expert of each token."""
    if num_experts % num_ranks:
        raise ConfigError(f"{num_experts} experts are no multiple of {num_ranks} ranks; change one of them")
    width = num_experts // num_ranks
    tokens: Sequence[Sequence[int]] = topk_idx.tolist() if isinstance(topk_idx, Tensor) else topk_idx
    for token, experts in enumerate(tokens):
        for expert in experts:
            if not -1 <= expert < num_experts:
                raise RoutingError(f"topk_idx: token {token} has expert {expert}; expected -1 .. {num_experts - 1}")
        yield {expert // width for expert in experts if expert >= 0}
