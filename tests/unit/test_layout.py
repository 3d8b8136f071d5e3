"""The sections of a message are in order, aligned, do not overlap, and lie inside of it; capacities of results."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenferry.checks import Checks, NodeLimit
from tokenferry.cost.rows import count_rows
from tokenferry.layout import NetworkCapacity, RowCapacity, Sections, network_capacity, row_capacity
from tokenferry.topology import by_place, node_of_ranks
from tokenferry.types import DispatchOptions, Layout, MoeShape


@pytest.mark.parametrize("num_rows", [0, 1, 3, 1000])
@pytest.mark.parametrize("widths", [(16,), (32, 0, 12), (8, 4, 3, 1), (0, 0)])
def test_sections_do_not_overlap(widths, num_rows):
    sections = Sections(widths)
    offsets = sections.offsets(num_rows)
    assert offsets[0] == 0
    for start, end, width in zip(offsets, offsets[1:], widths, strict=False):
        assert start % 16 == 0
        assert 0 <= end - start - num_rows * width < 16
    assert sections.num_bytes(num_rows) == offsets[-1]
    body = torch.zeros(sections.num_bytes(num_rows), dtype=torch.uint8)
    parts = sections.split(body, num_rows)
    assert [part.shape for part in parts] == [(num_rows, width) for width in widths]
    for part in parts:
        part += 1
    assert int(body.max()) <= 1 if body.numel() else True
    assert int(body.sum()) == num_rows * sum(widths)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DispatchOptions(), RowCapacity(worst=20, given=20, received=20, sent=2)),
        (DispatchOptions(counts="device", capacity=7), RowCapacity(worst=20, given=7, received=7, sent=2)),
        (DispatchOptions(Layout.EXPERTS), RowCapacity(worst=60, given=60, received=20, sent=2)),
        (DispatchOptions(Layout.EXPERTS, alignment=8), RowCapacity(worst=88, given=88, received=20, sent=2)),
        (DispatchOptions(Layout.MASKED, capacity=9), RowCapacity(worst=20, given=9, received=20, sent=2)),
    ],
)
def test_the_capacity_of_a_dispatch(options, expected):
    """R=2, M=10, K=3, L=4: worst-case rows of every layout, and what an explicit capacity leaves of them."""
    found = row_capacity(MoeShape(num_experts=8, top_k=3, hidden=8, max_tokens=10), options, 2)
    assert found == expected
    assert found.tight == (expected.given < expected.worst)


def test_padding_of_the_worst_routing_has_room():
    """Two ranks send a token each, to different experts of one rank: 8 places for each expert."""
    shape = MoeShape(num_experts=4, top_k=1, hidden=16, max_tokens=1)
    options = DispatchOptions(Layout.EXPERTS, alignment=8, counts="device")
    assert row_capacity(shape, options, num_ranks=2).worst == 16


@pytest.mark.parametrize(
    ("num_nodes", "max_nodes", "expected"),
    [
        (1, None, NetworkCapacity(0, 0)),
        (1, 1, NetworkCapacity(0, 0)),
        (4, None, NetworkCapacity(30, 30)),
        (4, 4, NetworkCapacity(30, 30)),
        (4, 3, NetworkCapacity(30, 30)),  # three other nodes, and none of its own
        (4, 2, NetworkCapacity(20, 30)),
        (8, None, NetworkCapacity(50, 70)),  # K
        (8, 1, NetworkCapacity(10, 70)),
    ],
)
def test_the_capacity_of_the_network(num_nodes, max_nodes, expected):
    """M=10, K=5."""
    shape = MoeShape(num_experts=64, top_k=5, hidden=8, max_tokens=10, max_nodes=max_nodes)
    assert network_capacity(shape, num_nodes) == expected


@st.composite
def limited_shapes(draw):
    """Draw the nodes of up to six ranks, in any order, and a shape with or without a limit of nodes."""
    num_nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    nodes = by_place(draw(st.permutations([str(node) for node in range(num_nodes)] * per_node)))
    experts = num_nodes * per_node * draw(st.integers(1, 2))
    max_nodes = draw(st.none() | st.integers(1, 5))
    return nodes, MoeShape(experts, draw(st.integers(1, 4)), 8, draw(st.integers(1, 3)), max_nodes)


def legal_routing(nodes, shape, pick):
    """Return the experts of a rank's tokens, some slots unused, on no more nodes than a token may go to."""
    local = shape.num_experts // sum(map(len, nodes))
    tokens = []
    for _ in range(pick.randint(0, shape.max_tokens)):
        chosen = pick.sample(nodes, min(len(nodes), shape.max_nodes or len(nodes)))
        experts = [rank * local + i for ranks in chosen for rank in ranks for i in range(local)]
        tokens.append([pick.choice([-1, *experts]) for _ in range(shape.top_k)])
    return tokens


@given(limited_shapes(), st.integers(0, 1 << 30))
def test_no_legal_routing_needs_more_of_the_network(drawn, seed):
    nodes, shape = drawn
    pick, node_of = random.Random(seed), node_of_ranks(nodes)
    routings = [legal_routing(nodes, shape, pick) for _ in node_of]
    if shape.max_nodes is not None:
        limit = NodeLimit(shape.max_nodes, node_of, shape.num_experts // len(node_of))
        for tokens in routings:
            topk_idx = torch.tensor(tokens, dtype=torch.int64).reshape(len(tokens), shape.top_k)
            Checks("dispatch", torch.device("cpu")).nodes("topk_idx", topk_idx, limit)
    most = network_capacity(shape, len(nodes))
    for rows in count_rows(routings, shape.num_experts, nodes):
        assert rows.network_out <= most.sent
        assert rows.network_in <= most.received


@given(limited_shapes())
def test_some_legal_routing_needs_all_of_it(drawn):
    """Every token of a rank goes to as many other nodes as it may; then all tokens of all other nodes to one."""
    nodes, shape = drawn
    node_of, local = node_of_ranks(nodes), shape.num_experts // sum(map(len, nodes))
    most = network_capacity(shape, len(nodes))
    firsts = [ranks[0] * local for ranks in nodes]
    away = []
    for rank in range(len(node_of)):
        others = [first for node, first in enumerate(firsts) if node != node_of[rank]]
        token = others[: min(shape.top_k, shape.max_nodes or len(nodes))]
        away.append([token + [-1] * (shape.top_k - len(token))] * shape.max_tokens)
    assert {rows.network_out for rows in count_rows(away, shape.num_experts, nodes)} == {most.sent}
    to_one = [[[firsts[0]] + [-1] * (shape.top_k - 1)] * shape.max_tokens for _ in node_of]
    received = [rows.network_in for rows in count_rows(to_one, shape.num_experts, nodes)]
    assert [received[rank] for rank in nodes[0]] == [most.received] * len(nodes[0])
