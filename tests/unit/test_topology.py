"""Which ranks share a node, and how many nodes the experts of a token may lie on."""

import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenferry import ConfigError, Topology
from tokenferry.topology import by_place, consecutive, most_nodes, node_of_ranks


def test_a_rank_finds_itself():
    there = Topology(4, consecutive(6, 2))
    assert (there.num_nodes, there.ranks_per_node, there.node, there.local_rank) == (3, 2, 2, 0)
    assert there.num_ranks == 6
    assert there.rail == (0, 2, 4)
    assert [there.node_of(rank) for rank in range(6)] == [0, 0, 1, 1, 2, 2]
    assert str(there) == "3 nodes of 2 ranks"
    assert str(Topology(0, ((0,),))) == "1 node of 1 rank"


def test_nodes_need_not_be_consecutive_ranks():
    nodes = by_place(["b", "a", "b", "a"])
    assert nodes == ((0, 2), (1, 3))
    assert Topology(3, nodes).rail == (2, 3)
    assert node_of_ranks(nodes) == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("rank", "nodes", "message"),
    [
        (0, ((0, 1), (2,)), "expected nodes of equally many ranks, got 2, 1"),
        (4, ((0, 1), (2, 3)), "rank 4 is on none of the nodes"),
    ],
)
def test_what_is_no_topology(rank, nodes, message):
    with pytest.raises(ConfigError, match=message):
        Topology(rank, nodes)


def test_a_group_smaller_than_a_node_is_one():
    """TOKENFERRY_RANKS_PER_NODE reaches every group of a program, also those of a few ranks."""
    assert consecutive(1, 4) == ((0,),)
    assert consecutive(3, 4) == ((0, 1, 2),)


def test_how_nodes_were_found_makes_them_no_others():
    assert Topology(0, consecutive(4, 2), "ranks_per_node=2") == Topology(0, consecutive(4, 2), "each host is a node")


def test_nodes_have_equally_many_ranks():
    with pytest.raises(ConfigError, match="ranks_per_node=4 does not divide the group's 6 ranks"):
        consecutive(6, 4)


@pytest.mark.parametrize(
    ("ranks_per_node", "limit", "most"),
    [
        (8, (8, 4), 4),  # DeepSeek-V3 on 8 nodes: a group on each
        (16, (8, 4), 4),  # 4 nodes of two groups: each group may be on another one
        (16, (8, 3), 3),
        (4, (8, 2), 4),  # 16 nodes: a group lies on two
        (8, (1, 1), 6),  # no limit but K
        (32, (1, 1), 2),  # or the nodes
        (64, (8, 4), 1),
        (1, (8, 1), 6),
    ],
)
def test_most_nodes_of_a_token(ranks_per_node, limit, most):
    assert most_nodes(consecutive(64, ranks_per_node), 256, 6, *limit) == most


def reached(nodes, num_experts, top_k, num_groups, top_groups):
    """Try every choice of groups: their nodes, at most one for each expert."""
    node_of, width = node_of_ranks(nodes), num_experts // num_groups
    local = num_experts // len(node_of)
    spans = [{node_of[e // local] for e in range(g * width, (g + 1) * width)} for g in range(num_groups)]
    return min(top_k, max(len(set().union(*some)) for some in combinations(spans, top_groups)))


@st.composite
def gates(draw):
    num_nodes, per_node = draw(st.integers(1, 7)), draw(st.integers(1, 2))
    ranks = num_nodes * per_node
    num_experts = ranks * draw(st.integers(1, 6))
    num_groups = draw(st.sampled_from([g for g in range(1, 13) if num_experts % g == 0]))
    return num_nodes, per_node, num_experts, draw(st.integers(1, 8)), num_groups, draw(st.integers(1, num_groups))


@given(gates(), st.integers(0, 1 << 30))
def test_most_nodes_is_exact_for_nodes_of_consecutive_ranks_and_never_too_few(gate, seed):
    num_nodes, per_node, *rest = gate
    nodes = consecutive(num_nodes * per_node, per_node)
    assert most_nodes(nodes, *rest) == reached(nodes, *rest)
    places = [node for node in range(num_nodes) for _ in range(per_node)]
    random.Random(seed).shuffle(places)
    anywhere = by_place([str(place) for place in places])
    assert reached(anywhere, *rest) <= most_nodes(anywhere, *rest) <= min(num_nodes, rest[1])


def test_groups_of_which_two_share_a_node_do_not_count_it_twice():
    """Six nodes of two experts, four groups of three: two of any three groups are neighbours, which share a node."""
    assert most_nodes(consecutive(6, 1), 12, 12, 4, 3) == 5


def test_groups_divide_the_experts():
    with pytest.raises(ConfigError, match="GroupLimit: num_groups=3 does not divide E=8"):
        most_nodes(((0,), (1,)), 8, 2, 3, 1)
