"""How far tokens go: the probability that a token uses a given node or rank, by a closed formula or by sampling."""

from __future__ import annotations

from dataclasses import dataclass

from tokenferry.cost.case import Case, Gate
from tokenferry.cost.sampling import Sampling, count_hits, sample_routing
from tokenferry.tuning import hit_probability


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a token of any rank goes.

    Attributes:
        nodes: ``[N]``: the probability that a token has an expert on each node.
        ranks: ``[R]``: the same for each rank.
        sampled_tokens: Tokens whose routing was drawn; 0: the probabilities are exact.
    """

    nodes: tuple[float, ...]
    ranks: tuple[float, ...]
    sampled_tokens: int = 0

    @property
    def nodes_per_token(self) -> float:
        """Return the expected number of distinct nodes of a token, the own one included."""
        return sum(self.nodes)

    @property
    def remote_nodes_per_token(self) -> float:
        """Return the same without the own node: the rows that a token sends over the network."""
        return self.nodes_per_token * (1 - 1 / len(self.nodes))

    @property
    def ranks_per_token(self) -> float:
        """Return the expected number of distinct ranks of a token."""
        return sum(self.ranks)


def reach_of(case: Case, sampling: Sampling) -> Reach:
    """Return the reach of a case: exact if every choice of K experts is equally likely, else sampled."""
    if case.gate.limited or case.gate.skew:
        return _sampled(case, sampling)
    return uniform_reach(case)


def uniform_reach(case: Case) -> Reach:
    """Return the exact reach of K distinct experts, all choices of which are equally likely.

    A node holds E / N experts, and a token misses all of them with probability ``C(E - E/N, K) / C(E, K)``.
    """
    num_experts, top_k = case.shape.num_experts, case.shape.top_k
    nodes, ranks = case.cluster.num_nodes, case.cluster.num_ranks
    return Reach(
        (hit_probability(num_experts, num_experts // nodes, top_k),) * nodes,
        (hit_probability(num_experts, num_experts // ranks, top_k),) * ranks,
    )


def _sampled(case: Case, sampling: Sampling) -> Reach:
    num_experts, cluster = case.shape.num_experts, case.cluster
    node_hits, rank_hits = [0] * cluster.num_nodes, [0] * cluster.num_ranks
    for experts in sample_routing(case.shape, case.gate, sampling):
        for hits in (node_hits, rank_hits):
            for place, count in enumerate(count_hits(experts, num_experts, len(hits))):
                hits[place] += count
    nodes = tuple(hits / sampling.num_tokens for hits in node_hits)
    ranks = tuple(hits / sampling.num_tokens for hits in rank_hits)
    if alike(case.gate, cluster.num_nodes):
        nodes = _averaged(nodes)
    if alike(case.gate, cluster.num_ranks):
        ranks = _averaged(ranks)
    return Reach(nodes, ranks, sampling.num_tokens)


def alike(gate: Gate, num_places: int) -> bool:
    """Return whether all nodes, or all ranks, are equally likely, so that sampled differences are chance.

    They are without skew, if groups consist of whole places, or places of whole groups.
    """
    return not gate.skew and (num_places % gate.num_groups == 0 or gate.num_groups % num_places == 0)


def _averaged(values: tuple[float, ...]) -> tuple[float, ...]:
    return (sum(values) / len(values),) * len(values)
