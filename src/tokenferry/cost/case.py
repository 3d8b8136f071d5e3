"""The inputs of the model: the nodes, their links, the gate that chooses experts, and the sizes of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tokenferry.errors import ConfigError
from tokenferry.topology import consecutive, most_nodes
from tokenferry.types import MoeShape

RowKind = Literal["fp8", "bf16"]
"""The rows of a dispatch; combine always returns bfloat16 rows."""

Placement = Literal["shuffled", "sorted"]
"""Where popular experts are: anywhere, or on the first ranks, which is the worst case."""

FP8_COLUMNS = 128
"""Columns of an FP8 row that share one float32 scale."""

MAX_RANKS = 2048


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes with equally many ranks: rank ``n * P + l`` is rank l of node n.

    Args:
        num_nodes: N.
        ranks_per_node: P, the ranks that reach each other over NVLink.

    Raises:
        ConfigError: a number is not positive, or there are more than `MAX_RANKS` ranks.
    """

    num_nodes: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"Cluster: {name}: expected a positive integer, got {value!r}")
        if self.num_ranks > MAX_RANKS:
            raise ConfigError(
                f"Cluster: {self.num_nodes} nodes of {self.ranks_per_node} ranks are {self.num_ranks} ranks; "
                f"the model covers up to {MAX_RANKS}"
            )

    @property
    def num_ranks(self) -> int:
        """Return R, the ranks of all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Return the ranks of each node."""
        return consecutive(self.num_ranks, self.ranks_per_node)


_LEAST_GBS = 1e-6
"""With less, times would be no numbers any more."""


@dataclass(frozen=True, slots=True)
class Links:
    """The rates of the links, in each direction at the same time.

    Args:
        network_gbs: 10^9 bytes a second that a rank sends to other nodes, and receives from them.
        nvlink_gbs: The same between ranks of one node.
        network_us: Microseconds of a grouped exchange of a rail beyond its bytes.

    Raises:
        ConfigError: a rate is not positive, or ``network_us`` is negative.
    """

    network_gbs: float
    nvlink_gbs: float
    network_us: float = 10.0

    def __post_init__(self) -> None:
        for name in ("network_gbs", "nvlink_gbs"):
            if not _LEAST_GBS <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"Links: {name}: expected a rate of at least {_LEAST_GBS}, got {getattr(self, name)!r}"
                )
        if not 0 <= self.network_us < float("inf"):
            raise ConfigError(f"Links: network_us: expected 0 or more microseconds, got {self.network_us!r}")


@dataclass(frozen=True, slots=True)
class Gate:
    """How tokens choose their experts; the default: every choice of K experts is equally likely.

    Args:
        num_groups: G groups of neighbouring experts.
        top_groups: Groups that a token may use, as `tokenferry.nn.GroupLimit` has it.
        skew: s: the expert at place i of the order of popularity is preferred with a weight of ``1 / i ** s`` (Zipf).
        placement: Where popular experts are.

    Raises:
        ConfigError: a number is out of range.
    """

    num_groups: int = 1
    top_groups: int = 1
    skew: float = 0.0
    placement: Placement = "shuffled"

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ConfigError(f"Gate: num_groups: expected a positive integer, got {self.num_groups!r}")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(f"Gate: top_groups: expected 1 .. {self.num_groups}, got {self.top_groups!r}")
        if not 0 <= self.skew < float("inf"):
            raise ConfigError(f"Gate: skew: expected 0 or more, got {self.skew!r}")
        if self.placement not in ("shuffled", "sorted"):
            raise ConfigError(f'Gate: placement: expected "shuffled" or "sorted", got {self.placement!r}')

    def __str__(self) -> str:
        words = [f"{self.top_groups} of {self.num_groups} groups"] if self.limited else []
        words += [f"popularity 1 / i^{self.skew:g}, {self.placement}"] if self.skew else []
        return ", ".join(words) or "uniform"

    @property
    def limited(self) -> bool:
        """Whether some groups are closed to a token."""
        return self.top_groups < self.num_groups


@dataclass(frozen=True, slots=True)
class Case:
    """The calls that the model describes: every rank of the cluster passes M tokens.

    Args:
        cluster: The ranks.
        shape: E, K, H and M; ``max_nodes`` bounds the rows that cross, None: the most nodes that the gate chooses.
        gate: How tokens choose their experts.
        rows: The rows of a dispatch.

    Raises:
        ConfigError: the sizes do not fit each other; the message names both.
    """

    cluster: Cluster
    shape: MoeShape
    gate: Gate = Gate()
    rows: RowKind = "fp8"

    def __post_init__(self) -> None:
        shape, gate, ranks = self.shape, self.gate, self.cluster.num_ranks
        if shape.num_experts % ranks:
            raise ConfigError(f"Case: {shape.num_experts} experts are no multiple of {ranks} ranks; change one of them")
        if shape.top_k > shape.num_experts:
            raise ConfigError(f"Case: top_k={shape.top_k} exceeds {shape.num_experts} experts; choose at most as many")
        if shape.num_experts % gate.num_groups:
            raise ConfigError(
                f"Case: {gate.num_groups} groups do not divide {shape.num_experts} experts; use a divisor"
            )
        open_experts = gate.top_groups * (shape.num_experts // gate.num_groups)
        if shape.top_k > open_experts:
            raise ConfigError(
                f"Case: top_k={shape.top_k} exceeds {open_experts}, the experts of {gate.top_groups} of "
                f"{gate.num_groups} groups; allow more groups"
            )
        if shape.max_nodes is not None and self.most_nodes > shape.max_nodes:
            raise ConfigError(
                f"Case: the gate ({gate}) may choose experts on {self.most_nodes} nodes, more than the "
                f"max_nodes={shape.max_nodes} of the shape; change one of them"
            )
        if self.rows not in ("fp8", "bf16"):
            raise ConfigError(f'Case: rows: expected "fp8" or "bf16", got {self.rows!r}')
        if self.rows == "fp8" and shape.hidden % FP8_COLUMNS:
            raise ConfigError(
                f"Case: hidden={shape.hidden} is no multiple of {FP8_COLUMNS}, the columns of one FP8 scale; "
                'use rows="bf16"'
            )

    @property
    def dispatch_row_bytes(self) -> int:
        """Return the bytes of a row of a dispatch, with its scales."""
        hidden = self.shape.hidden
        return 2 * hidden if self.rows == "bf16" else hidden + 4 * (hidden // FP8_COLUMNS)

    @property
    def dispatch_data_bytes(self) -> int:
        """Return the bytes of a row of a dispatch, without its scales."""
        return self.shape.hidden * (2 if self.rows == "bf16" else 1)

    @property
    def combine_row_bytes(self) -> int:
        """Return the bytes of a row of a combine."""
        return 2 * self.shape.hidden

    @property
    def most_nodes(self) -> int:
        """Return the most nodes that one token may go to: limited by N, by K and by the groups."""
        shape, gate = self.shape, self.gate
        return most_nodes(self.cluster.nodes, shape.num_experts, shape.top_k, gate.num_groups, gate.top_groups)

    @property
    def most_remote_nodes(self) -> int:
        """Return the most other nodes that one token may go to."""
        return min(self.cluster.num_nodes - 1, self.most_nodes)

    @property
    def group_shape(self) -> MoeShape:
        """Return the shape of a group for these calls: with the least ``max_nodes`` that allows what the gate chooses.

        One that is given stays.
        """
        if self.shape.max_nodes is not None:
            return self.shape
        return replace(self.shape, max_nodes=self.most_nodes)
