"""Which ranks share a node."""

import pytest

from tokenferry import ConfigError, Topology
from tokenferry.topology import by_place, consecutive, node_of_ranks


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


def test_nodes_have_equally_many_ranks():
    with pytest.raises(ConfigError, match="ranks_per_node=4 does not divide the group's 6 ranks"):
        consecutive(6, 4)
