"""Layers whose routers use few groups of experts, in groups of several nodes that allow no more nodes than that."""

from dataclasses import dataclass, replace

import pytest
import torch

from support.pairs import NODES, Pair
from support.sharded import local_parts
from tokenferry import ConfigError, MoeShape, Routing, RoutingError
from tokenferry.nn import GroupLimit, MoELayer, Router
from tokenferry.testing.dense import DenseMoE

EXPERTS, HIDDEN, FFN, TOKENS = 48, 16, 4, 20


@dataclass(frozen=True)
class Gate:
    """The limit of the router, and the most nodes to which it sends a token."""

    nodes: Pair
    ranks: int
    limit: GroupLimit
    most: int
    top_k: int = 4

    @property
    def shape(self) -> MoeShape:
        return MoeShape(EXPERTS, self.top_k, HIDDEN, TOKENS, max_nodes=self.most)

    def router(self) -> Router:
        return Router(HIDDEN, EXPERTS, self.top_k, group_limit=self.limit, scale=2.5, seed=5)

    def x(self, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randn(TOKENS - 3 * (rank == 1), HIDDEN, dtype=torch.float64, generator=generator)


TWO_BY_TWO, THREE_BY_TWO, TWO_BY_FOUR, FOUR_BY_ONE = NODES
GATES = [
    Gate(*TWO_BY_TWO, GroupLimit(8, 1), 1),
    Gate(*THREE_BY_TWO, GroupLimit(8, 1), 2),  # nodes of 16 experts, groups of 6: some lie on two nodes
    Gate(*TWO_BY_FOUR, GroupLimit(8, 1), 1),
    Gate(*FOUR_BY_ONE, GroupLimit(8, 2), 2),
    Gate(Pair("cpu", "process_group", 1), 8, GroupLimit(8, 4), 4, top_k=8),  # DeepSeek-V3: a group a node, four of 8
]


def train(rank, pg, gate: Gate):
    with gate.nodes.open(pg, gate.shape) as group:
        layer = MoELayer(group, FFN, router=gate.router().double(), seed=3, dtype=torch.float64)
        x = gate.x(rank).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        width = EXPERTS // group.topology.num_nodes
        nodes = [set((experts // width).tolist()) for experts in layer.router(x.detach()).topk_idx]
        return out.detach(), x.grad, max(map(len, nodes)), local_parts(layer.state_dict())


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.nodes}-{gate.ranks}")
def test_a_layer_that_keeps_to_its_limit(worlds, gate):
    results = worlds(gate.ranks).run(train, gate)
    dense = DenseMoE(gate.router().double(), [state for *_, state in results])
    for rank, (out, grad, most, _) in enumerate(results):
        assert most == gate.most, "the routing does not try the limit"
        x = gate.x(rank).requires_grad_()
        want = dense(x)
        want.square().sum().backward()
        torch.testing.assert_close(out, want, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(grad, x.grad, rtol=2e-6, atol=1e-6)


class Table(torch.nn.Module):
    """A router of which only its calls show where it sends tokens."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        topk_idx = torch.tensor([self.experts]).repeat(len(x), 1)
        return Routing(topk_idx, torch.ones(topk_idx.shape, dtype=torch.float32))


def go_too_far(rank, pg, gate: Gate):
    """No rank waits for another one: nothing was sent. Then all go on."""
    with gate.nodes.open(pg, gate.shape) as group:
        messages = []
        narrow = group.for_shape(replace(gate.shape, max_nodes=1))
        for router in (gate.router(), None):
            with pytest.raises(ConfigError) as caught:
                MoELayer(narrow, FFN, router=router)
            messages.append(str(caught.value))
        x = gate.x(rank).float()
        layer = MoELayer(narrow, FFN, router=Table([0, 1, 2, EXPERTS - 1]), dtype=torch.float32)
        with pytest.raises(RoutingError, match=r"^dispatch: topk_idx\[0\] has experts on 2 nodes \(0, 3\), .* most 1;"):
            layer(x)
        layer.router.experts = [0, 1, 2, 11]
        assert layer(x).shape == x.shape
        MoELayer(group.for_shape(replace(gate.shape, max_nodes=None)), FFN)
        return messages


def test_a_router_that_may_go_too_far_is_refused(worlds):
    gate = GATES[3]
    limited = (
        "MoELayer: router: with group_limit=GroupLimit(num_groups=8, top_groups=2) it may choose experts on 2 of 4 "
        "nodes, and the group has max_nodes=1; let it use fewer groups, or make the group with MoeShape(max_nodes=2)"
    )
    free = (
        "MoELayer: router: with group_limit=None it may choose experts on 4 of 4 nodes, and the group has max_nodes=1; "
    )
    for one, other in worlds(gate.ranks).run(go_too_far, gate):
        assert one == limited
        assert other.startswith(free)
