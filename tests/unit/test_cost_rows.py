"""Rows on the links: counted ones by another count, and expected ones as the mean of all counts."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenferry.cost.case import Case, Cluster
from tokenferry.cost.reach import Reach, uniform_reach
from tokenferry.cost.rows import RankRows, busiest, count_rows, expected_rows, mean, network_rows
from tokenferry.errors import ConfigError, RoutingError
from tokenferry.topology import Topology
from tokenferry.types import MoeShape

TWO_BY_TWO = Cluster(2, 2)
HERE = Topology(0, TWO_BY_TWO.nodes)


def test_one_token_by_hand():
    """Four ranks, two experts each; rank 1's token needs experts 0 (rank 0), 5 (rank 2) and 6, 7 (rank 3)."""
    nothing: list[list[int]] = []
    rows = count_rows([nothing, [[0, 5, 6, 7]], nothing, nothing], 8, TWO_BY_TWO.nodes)
    assert rows == (
        RankRows(received=1, own_in=1),
        RankRows(network_out=1, own_out=1),
        RankRows(received=1, relayed_in=1),
        RankRows(received=1, network_in=1, relayed_out=1),  # the relay, rank 1 of node 1, needs the row as well
    )
    assert network_rows([[0, 5, 6, 7]], 8, Topology(1, TWO_BY_TWO.nodes)) == (0, 1)
    assert network_rows([[0, 5, 6, 7]], 8, Topology(2, TWO_BY_TWO.nodes)) == (1, 0)


def test_nodes_of_other_ranks():
    """Ranks 0 and 2 are node 0: rank 0's token for experts of ranks 1 and 2 crosses to rank 1, its relay."""
    nodes = ((0, 2), (1, 3))
    rows = count_rows([[[2, 4]], [], [], [[1, 3]]], 8, nodes)
    assert rows[0] == RankRows(network_out=1, own_out=1, received=1, relayed_in=1)
    assert rows[1] == RankRows(network_in=1, received=2, own_in=1)
    assert rows[2] == RankRows(received=1, own_in=1, network_in=1, relayed_out=1)
    assert rows[3] == RankRows(network_out=1, own_out=1)
    assert network_rows([[1, 3]], 8, Topology(3, nodes)) == (1, 0)


def test_unused_slots_and_repeated_experts():
    assert network_rows([[-1, 4, 4, 5], [-1, -1, -1, -1]], 8, Topology(0, TWO_BY_TWO.nodes)) == (0, 1)


@st.composite
def routings(draw):
    cluster = Cluster(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    experts = cluster.num_ranks * draw(st.integers(1, 2))
    token = st.lists(st.integers(-1, experts - 1), min_size=3, max_size=3)
    rank = st.lists(token, max_size=4)
    return cluster, experts, draw(st.lists(rank, min_size=cluster.num_ranks, max_size=cluster.num_ranks))


@given(routings())
def test_counted_rows_add_up(drawn):
    cluster, experts, routing = drawn
    rows = count_rows(routing, experts, cluster.nodes)
    width, per_node = experts // cluster.num_ranks, cluster.ranks_per_node
    for out, into in (("network_out", "network_in"), ("own_out", "own_in"), ("relayed_out", "relayed_in")):
        assert sum(getattr(each, out) for each in rows) == sum(getattr(each, into) for each in rows)
    for rank, each in enumerate(rows):
        node = rank // per_node
        crossing = network_rows(routing[rank], experts, Topology(rank, cluster.nodes))
        assert each.network_out == sum(crossing)
        assert crossing[node] == 0
        rail = Topology(rank, cluster.nodes).rail
        assert each.network_in == sum(
            network_rows(routing[peer], experts, Topology(peer, cluster.nodes))[node] for peer in rail
        )
        wanted = [token for tokens in routing for token in tokens if any(e >= 0 and e // width == rank for e in token)]
        assert each.received == len(wanted)
        through = each.network_in + len(routing[rank])
        assert each.own_out + each.relayed_out <= through * (per_node - 1)
        # What is received came over NVLink, by the rail, or was here: no row is lost, and none is sent twice.
        assert each.own_in + each.relayed_in <= each.received <= each.own_in + each.relayed_in + through


@given(routings())
def test_tensors_count_as_lists(drawn):
    cluster, experts, routing = drawn
    tensors = [torch.tensor(each, dtype=torch.int64, device="cpu").view(-1, 3) for each in routing]
    assert count_rows(tensors, experts, cluster.nodes) == count_rows(routing, experts, cluster.nodes)


def test_expected_rows_are_the_mean_over_all_routings():
    """Every pair of choices of two tokens, on 2 x 2 ranks with one or two experts each."""
    for experts, top_k in ((4, 2), (8, 1)):
        choices = list(combinations(range(experts), top_k))
        case = Case(TWO_BY_TWO, MoeShape(experts, top_k, 128, 2))
        expected = expected_rows(case, uniform_reach(case))
        counted = [count_rows([list(two)] * 4, experts, TWO_BY_TWO.nodes) for two in product(choices, repeat=2)]
        for rank in range(4):
            average = mean([rows[rank] for rows in counted])
            for name in RankRows.__slots__:
                assert getattr(average, name) == pytest.approx(getattr(expected[rank], name)), name


def test_expected_rows_of_uneven_ranks():
    """One popular rank: what it receives differs from what it passes on."""
    case = Case(TWO_BY_TWO, MoeShape(4, 1, 128, 10))
    rows = expected_rows(case, Reach((0.7, 0.3), (0.6, 0.1, 0.2, 0.1)))
    assert rows[0] == RankRows(
        *map(pytest.approx, (10 * 0.3, 10 * 0.7, 10 * 0.1, 10 * 0.6, 10 * 0.1, 10 * 0.6, 4 * 10 * 0.6))
    )
    assert rows[3].network_in == pytest.approx(10 * 0.3)
    assert rows[3].own_out == pytest.approx(10 * 0.2)
    most = busiest(rows)
    assert most.network_out == pytest.approx(7)
    assert most.own_out == pytest.approx(6), "rank 1 passes on what rank 0 needs"
    assert mean(rows).received == pytest.approx(10)


def test_combine_goes_the_other_way():
    rows = RankRows(1, 2, 3, 4, 5, 6, 7)
    assert rows.reversed() == RankRows(2, 1, 4, 3, 6, 5, 7)
    assert rows.reversed().reversed() == rows


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: network_rows([[0]], 6, HERE), ConfigError, "6 experts are no multiple of 4 ranks"),
        (lambda: network_rows([[0], [8]], 8, HERE), RoutingError, "token 1 has expert 8"),
        (lambda: network_rows([[-2]], 8, HERE), RoutingError, "token 0 has expert -2"),
        (lambda: count_rows([[[0]]], 8, HERE.nodes), ConfigError, "one routing for each of 4 ranks, got 1"),
    ],
)
def test_bad_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()
