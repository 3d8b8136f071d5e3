"""Buffers of experts, with a row for each: no tool overwrites them, and they go where their experts go."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import MoELayer, Router, by_expert, parallelize
from tokenferry.nn.balance import PlacedRouter, Placement, rebalance

SHAPE = MoeShape(4, 2, 16, max_tokens=64)


class Masked(nn.Module):
    """Experts with a mask and a number for each, as pruning leaves them."""

    def __init__(self, first: int, count: int, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        up, down, mask = (torch.randn(4, 16, 16, dtype=torch.float64, generator=draws) / 4 for _ in range(3))
        here = slice(first, first + count)
        self.up, self.down = nn.Parameter(up[here].clone()), nn.Parameter(down[here].clone())
        self.inner = nn.Module()
        self.inner.register_buffer("mask", (mask[here, :1] > 0).double(), persistent=False)
        self.register_buffer("number", torch.arange(1.0, 5.0, dtype=torch.float64)[here].clone(), persistent=False)
        self.register_buffer("factor", torch.full((1, 16), 0.5, dtype=torch.float64), persistent=False)
        self.register_buffer("calls", torch.tensor(0), persistent=False)
        self.register_buffer("nothing", None, persistent=False)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        def formula(product, rows, up, down, mask, number):
            return product(product(rows, up).relu() * mask, down) * number * self.factor

        return by_expert(formula, rows, offsets, self.up, self.down, self.inner.mask, self.number[:, None, None])


def masked(group: tokenferry.ExpertGroup, seed: int = 0, **parts: nn.Module) -> MoELayer:
    count = group.num_local_experts
    router = PlacedRouter(Router(16, 4, 2), Placement.of(torch.arange(4), group.num_ranks), group)
    made = {"experts": Masked(group.rank * count, count, seed), "router": router, **parts}
    return MoELayer(group, **made)


def rows_of(rank: int) -> Tensor:
    return torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def alone() -> list[Tensor]:
    """What each rank should get."""
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group, torch.no_grad():
        return [masked(group)(rows_of(rank)) for rank in range(4)]


def under_a_tool(rank: int, pg: dist.ProcessGroup, tool: str) -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    with tokenferry.ExpertGroup(mesh.get_group(), SHAPE, backend="cpu") as group:
        model = nn.Sequential(masked(group))
        if tool == "compiled":
            model = torch.compile(model, backend="eager")
        experts = parallelize(model, mesh)
        if tool == "fsdp":
            fully_shard(model, mesh=mesh, ignored_params=experts)
        else:
            model = DistributedDataParallel(model)
        for _ in range(2):  # with buffers of the first one, which DDP has broadcast
            out = model(rows_of(rank))
        return out.detach()


@pytest.mark.parametrize("tool", ["ddp", "compiled", "fsdp"])
def test_tools_leave_buffers_of_experts_alone(worlds, tool):
    for got, want in zip(worlds(2).run(under_a_tool, tool), alone(), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def on_some_ranks(rank: int, pg: dist.ProcessGroup) -> tuple[list[str], Tensor]:
    """Ranks 2 and 3 hold the same experts again, with other values until they are made equal; from the meta device."""
    mesh, errors = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "experts")), []
    with tokenferry.ExpertGroup(mesh["experts"].get_group(), SHAPE, backend="cpu") as group:
        count = group.num_local_experts
        layer = MoELayer(group, experts=Masked(group.rank * count, count, seed=rank // 2), router=Router(16, 4, 2))
        layer.experts.register_buffer("late", torch.ones(1, 1, device="meta"), persistent=False)
        parallelize(layer, replicate=mesh["replicate"])
        model = DistributedDataParallel(layer)
        with pytest.raises(tokenferry.ConfigError) as caught:
            layer(rows_of(rank))
        errors.append(str(caught.value))
        layer.experts.late = torch.ones(1, 1)
        parallelize(layer)
        return errors, model(rows_of(rank)).detach()


def test_ranks_with_the_same_experts_have_the_same_buffers(worlds):
    for (errors, got), want in zip(worlds(4).run(on_some_ranks), alone(), strict=True):
        assert "late had no values when parallelize would have made" in errors[0]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def moved(rank: int, pg: dist.ProcessGroup | None) -> list[Tensor]:
    """Results before and after moves."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        layer = masked(group)
        found = [layer(rows_of(rank)).detach()]
        for slots in ([2, 3, 0, 1], [0, 3, 1, 2]):
            rebalance(layer, Placement.of(torch.tensor(slots), group.num_ranks))
            found.append(layer(rows_of(rank)).detach())
            here = torch.tensor(slots).view(group.num_ranks, -1)[group.rank]
            assert layer.experts.number.tolist() == (here + 1).tolist()
        return found


def test_buffers_move_with_their_experts(worlds):
    want = alone()
    for rank, results in enumerate([*worlds(2).run(moved), moved(0, None)]):
        for got in results:
            torch.testing.assert_close(got, want[rank % 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(16, 4), (2,)])
def test_buffers_that_belong_to_no_expert_are_refused(sizes):
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        layer = masked(group)
        layer.experts.inner.register_buffer("table", torch.zeros(sizes), persistent=False)
        before = layer.experts.up.clone()
        with pytest.raises(tokenferry.ConfigError, match=r"buffer inner.table of its experts is .* give it the L=4"):
            rebalance(layer, Placement.of(torch.tensor([3, 2, 1, 0]), 1))
        assert torch.equal(layer.experts.up, before)
        assert layer.router.placement.physical_to_logical.tolist() == [0, 1, 2, 3]


def test_buffers_that_cannot_move_are_named():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        layer = masked(group)
        layer.experts.register_buffer("one", torch.zeros(1, 3).expand(4, 3), persistent=False)
        with pytest.raises(tokenferry.ConfigError, match=r"the buffer one of its experts .* got strides \[0, 1\]"):
            rebalance(layer, Placement.of(torch.tensor([3, 2, 1, 0]), 1))
        assert layer.router.placement.physical_to_logical.tolist() == [0, 1, 2, 3]


def test_buffers_that_another_layer_needs_where_they_are_stay():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        layers = [masked(group, seed) for seed in (0, 1)]
        layers[1].experts.calls = layers[0].experts.calls  # which does not move
        rebalance(layers[0], Placement.of(torch.tensor([3, 2, 1, 0]), 1))
        layers[1].experts.number = layers[0].experts.number
        with pytest.raises(tokenferry.ConfigError, match="another MoELayer shares its experts"):
            rebalance(layers[0], Placement.of(torch.arange(4), 1))


def test_hooks_of_state_dicts_may_change_values():
    """As those that move them to the host: what has the name of a parameter is no buffer."""
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        experts = Masked(0, 4)
        experts.register_state_dict_post_hook(
            lambda _module, state, _prefix, _local: state.update({key: one.detach() for key, one in state.items()})
        )
        layer = MoELayer(group, experts=experts)
        assert {"experts.up", "experts.down"} <= set(layer.state_dict())
