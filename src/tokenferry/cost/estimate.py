"""The whole estimate: both families of calls on one cluster, and over numbers of nodes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tokenferry.cost.calls import CallCost, decode_call, throughput_call
from tokenferry.cost.case import Case, Cluster, Links
from tokenferry.cost.deep_ep_v1 import LowLatency, low_latency
from tokenferry.cost.memory import Memory, decode_memory, throughput_memory
from tokenferry.cost.reach import Reach, reach_of
from tokenferry.cost.rows import RankRows, busiest, expected_rows, mean
from tokenferry.cost.sampling import Sampling
from tokenferry.errors import ConfigError

FamilyName = Literal["throughput", "decoding"]

MOST_OVERFLOWS = 1e-3
"""Expected overflows of a decode call from which on its slots are too few: one in a thousand calls."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family of calls.

    Attributes:
        name: Which one.
        tokens: T of each rank, and M.
        mean_rows: Rows of a dispatch, the mean over ranks.
        busiest_rows: The largest number of each kind on any rank.
        dispatch: Its cost.
        combine: Its cost.
        memory: Its memory.
    """

    name: FamilyName
    tokens: int
    mean_rows: RankRows
    busiest_rows: RankRows
    dispatch: CallCost
    combine: CallCost
    memory: Memory


@dataclass(frozen=True, slots=True)
class DecodeSizes:
    """The sizes of decode calls.

    Args:
        tokens: T of each rank, and M.
        slots: The most rows of a rank for each other node in one call, S; None: M, which is never too few.

    Raises:
        ConfigError: a number is out of range.
    """

    tokens: int = 128
    slots: int | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"DecodeSizes: tokens: expected a positive integer, got {self.tokens!r}")
        if self.slots is not None and not 1 <= self.slots <= self.tokens:
            raise ConfigError(f"DecodeSizes: slots: expected 1 .. {self.tokens} (tokens), got {self.slots!r}")

    @property
    def num_slots(self) -> int:
        """Return the slots of each other node."""
        return self.tokens if self.slots is None else self.slots


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the model says about a case.

    Attributes:
        case: Sizes of throughput calls, cluster and gate.
        links: Their rates.
        reach: How far tokens go.
        throughput: `dispatch` and `combine`.
        decoding: `decode_dispatch` and `decode_combine`.
        decode_slots: S, the most tokens of a rank for each other node in a decode call; see `sent_slots`.
        enough_slots: The least S with fewer than `MOST_OVERFLOWS`.
        overflows: Expected number of (rank, other node) in one decode call whose tokens exceed S.
        deep_ep_v1: The decode calls by DeepEP's V1 low-latency mode.
    """

    case: Case
    links: Links
    reach: Reach
    throughput: Family
    decoding: Family
    decode_slots: int
    enough_slots: int
    overflows: float
    deep_ep_v1: LowLatency


def estimate(case: Case, links: Links, decode: DecodeSizes, sampling: Sampling) -> Estimate:
    """Return the estimate of a case; deterministic.

    Args:
        case: Sizes of throughput calls, cluster and gate; decode calls differ in T and M only.
        links: Rates of the links.
        decode: Sizes of decode calls.
        sampling: How routings are drawn where the gate has no closed formula.
    """
    reach = reach_of(case, sampling)
    decode_case = replace(case, shape=replace(case.shape, max_tokens=decode.tokens))
    rows, decode_rows = expected_rows(case, reach), expected_rows(decode_case, reach)
    most, decode_most, slots = busiest(rows), busiest(decode_rows), decode.num_slots
    throughput = Family(
        "throughput",
        case.shape.max_tokens,
        mean(rows),
        most,
        throughput_call("dispatch", case, rows, links),
        throughput_call("combine", case, rows, links),
        throughput_memory(case, most),
    )
    decoding = Family(
        "decoding",
        decode.tokens,
        mean(decode_rows),
        decode_most,
        decode_call("dispatch", decode_case, decode_rows, links, slots),
        decode_call("combine", decode_case, decode_rows, links, slots),
        decode_memory(decode_case, decode_most, slots),
    )
    enough = enough_slots(case.cluster, reach, decode.tokens)
    overflows, v1 = expected_overflows(case.cluster, reach, decode), low_latency(decode_case, links)
    return Estimate(case, links, reach, throughput, decoding, slots, enough, overflows, v1)


def over_nodes(case: Case, links: Links, decode: DecodeSizes, sampling: Sampling) -> Iterator[Estimate]:
    """Yield estimates for 1, 2, 4, ... nodes, as far as they divide the experts, and for the nodes of the case."""
    per_node, most = case.cluster.ranks_per_node, case.cluster.num_nodes
    counts = {1 << power for power in range(most.bit_length())} | {most}
    for nodes in sorted(counts):
        if case.shape.num_experts % (nodes * per_node) == 0:
            yield estimate(replace(case, cluster=Cluster(nodes, per_node)), links, decode, sampling)


def expected_overflows(cluster: Cluster, reach: Reach, decode: DecodeSizes) -> float:
    """Return the mean number of pairs (rank, other node) that exceed the slots in a call of independent tokens. Pure.

    A node is needed by each of T tokens with its probability, so that the number is binomial.
    """
    pairs = cluster.num_ranks - cluster.ranks_per_node  # the ranks that may send to one node
    nodes = Counter(reach.nodes)
    return sum(pairs * count * _exceeds(decode.tokens, hit, decode.num_slots) for hit, count in nodes.items())


def enough_slots(cluster: Cluster, reach: Reach, tokens: int) -> int:
    """Return the fewest slots of a decode call with fewer than `MOST_OVERFLOWS` expected. Pure."""
    found = range(1, tokens)
    return 1 + bisect_left(
        found, True, key=lambda slots: expected_overflows(cluster, reach, DecodeSizes(tokens, slots)) < MOST_OVERFLOWS
    )


def as_json(found: Estimate) -> dict[str, Any]:
    """Return an estimate as plain dicts: fields are those of the dataclasses."""
    reach = found.reach
    plain = asdict(found)
    plain["reach"] = {
        "nodes_per_token": reach.nodes_per_token,
        "remote_nodes_per_token": reach.remote_nodes_per_token,
        "ranks_per_token": reach.ranks_per_token,
        "busiest_node": max(reach.nodes),
        "busiest_rank": max(reach.ranks),
        "sampled_tokens": reach.sampled_tokens,
    }
    for family, costs in (("throughput", found.throughput), ("decoding", found.decoding)):
        for cost in (costs.dispatch, costs.combine):
            times = plain[family][cost.call]["times"]
            times |= {"total_us": cost.times.total_us, "kept_us": cost.times.kept_us, "bound_by": cost.times.bound_by}
    return plain


def _exceeds(trials: int, probability: float, most: int) -> float:
    """Return the probability that a binomial number exceeds ``most``."""
    if probability in (0.0, 1.0):
        return float(probability == 1.0 and trials > most)
    total = 0.0
    for hits in range(most + 1, trials + 1):
        choices = math.lgamma(trials + 1) - math.lgamma(hits + 1) - math.lgamma(trials - hits + 1)
        total += math.exp(choices + hits * math.log(probability) + (trials - hits) * math.log1p(-probability))
    return total
