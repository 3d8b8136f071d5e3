"""Inputs of the cost model: sizes that do not fit each other are refused, with both numbers."""

from dataclasses import replace

import pytest

from tokenferry.cost.case import Case, Cluster, Gate, Links
from tokenferry.cost.estimate import DecodeSizes
from tokenferry.cost.sampling import Sampling
from tokenferry.errors import ConfigError
from tokenferry.types import MoeShape

V3 = MoeShape(256, 8, 7168, 4096)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Cluster(0, 8), "num_nodes: expected a positive integer, got 0"),
        (lambda: Cluster(2, True), "ranks_per_node: expected a positive integer, got True"),
        (lambda: Cluster(257, 8), "257 nodes of 8 ranks are 2056 ranks; the model covers up to 2048"),
        (lambda: Links(0.0, 330.0), "network_gbs: expected a rate of at least 1e-06, got 0.0"),
        (lambda: Links(50.0, float("nan")), "nvlink_gbs: expected a rate of at least 1e-06, got nan"),
        (lambda: Links(50.0, float("inf")), "nvlink_gbs: expected a rate of at least 1e-06, got inf"),
        (lambda: Links(50.0, 330.0, -1.0), "network_us: expected 0 or more microseconds, got -1.0"),
        (lambda: Gate(0, 1), "num_groups: expected a positive integer, got 0"),
        (lambda: Gate(8, 9), r"top_groups: expected 1 \.\. 8, got 9"),
        (lambda: Gate(8, 0), r"top_groups: expected 1 \.\. 8, got 0"),
        (lambda: Gate(skew=-0.1), "skew: expected 0 or more, got -0.1"),
        (lambda: Gate(placement="nowhere"), 'placement: expected "shuffled" or "sorted", got \'nowhere\''),
        (lambda: Case(Cluster(3, 8), V3), "256 experts are no multiple of 24 ranks"),
        (lambda: Case(Cluster(1, 4), MoeShape(4, 5, 128, 1)), "top_k=5 exceeds 4 experts"),
        (lambda: Case(Cluster(2, 8), V3, Gate(3, 2)), "3 groups do not divide 256 experts"),
        (lambda: Case(Cluster(2, 8), V3, Gate(64, 1)), "top_k=8 exceeds 4, the experts of 1 of 64 groups"),
        (
            lambda: Case(Cluster(8, 8), replace(V3, max_nodes=3), Gate(8, 4)),
            r"the gate \(4 of 8 groups\) may choose experts on 4 nodes, more than the max_nodes=3 of the shape",
        ),
        (lambda: Case(Cluster(2, 8), V3, rows="fp16"), 'rows: expected "fp8" or "bf16", got \'fp16\''),
        (lambda: Case(Cluster(2, 8), MoeShape(16, 2, 100, 1)), "hidden=100 is no multiple of 128"),
        (lambda: DecodeSizes(0), "tokens: expected a positive integer, got 0"),
        (lambda: DecodeSizes(8, 9), r"slots: expected 1 \.\. 8 \(tokens\), got 9"),
        (lambda: Sampling(0), "num_tokens: expected a positive integer, got 0"),
    ],
)
def test_sizes_that_do_not_fit(make, error):
    with pytest.raises(ConfigError, match=error):
        make()


def test_row_bytes():
    assert Case(Cluster(2, 8), V3).dispatch_row_bytes == 7168 + 56 * 4
    assert Case(Cluster(2, 8), V3, rows="bf16").dispatch_row_bytes == 14336
    assert Case(Cluster(2, 8), V3).combine_row_bytes == 14336
    assert Case(Cluster(2, 8), MoeShape(16, 2, 100, 1), rows="bf16").combine_row_bytes == 200


@pytest.mark.parametrize(
    ("nodes", "gate", "most"),
    [
        (1, Gate(), 0),
        (4, Gate(), 3),  # all others
        (16, Gate(), 8),  # K
        (8, Gate(8, 4), 4),  # one group a node, and all of them may be other nodes
        (4, Gate(8, 2), 2),  # two groups may lie on two nodes
        (16, Gate(8, 2), 4),  # a group lies on two nodes
        (32, Gate(8, 1), 4),
        (2, Gate(8, 4), 1),
    ],
)
def test_most_nodes_of_a_token(nodes, gate, most):
    assert Case(Cluster(nodes, 8), V3, gate).most_remote_nodes == most


def test_a_group_across_the_edge_of_a_node():
    """Three nodes of four experts, two groups of six: the first lies on nodes 0 and 1, the second on 1 and 2."""
    assert Case(Cluster(3, 1), MoeShape(12, 3, 128, 1), Gate(2, 1)).most_remote_nodes == 2


def test_the_shape_of_a_group_for_a_gate():
    gate, cluster = Gate(8, 3), Cluster(8, 8)
    assert Case(cluster, V3, gate).group_shape == replace(V3, max_nodes=3)
    assert Case(cluster, V3).group_shape == replace(V3, max_nodes=8)
    given = replace(V3, max_nodes=5)
    assert Case(cluster, given, gate).group_shape == given


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (Gate(), "uniform"),
        (Gate(8, 8), "uniform"),
        (Gate(8, 4), "4 of 8 groups"),
        (Gate(8, 4, 1.5), "4 of 8 groups, popularity 1 / i^1.5, shuffled"),
        (Gate(skew=1, placement="sorted"), "popularity 1 / i^1, sorted"),
    ],
)
def test_gates_in_words(gate, text):
    assert str(gate) == text
