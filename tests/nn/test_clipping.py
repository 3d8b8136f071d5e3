"""Norms of experts with replicas that FSDP2 has sharded, however it does that."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import MoELayer, Router, by_expert, clip_grad_norm_
from tokenferry.nn.balance import PlacedRouter, Placement
from tokenferry.nn.clipping import _norms_of_experts

SLOTS = [0, 1, 2, 1, 0]
PLACED = Placement.of(torch.tensor(SLOTS), 1)


class Biased(nn.Module):
    """Experts with a number for each, beside a matrix of a size that no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        of_all = torch.randn(3, 16, 16, dtype=torch.float64, generator=draws)
        self.matrix, self.number = nn.Parameter(of_all[SLOTS]), nn.Parameter(of_all[SLOTS, 0, 0])

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        def formula(product, rows, matrix, number):
            return product(rows, matrix).tanh() * number

        return by_expert(formula, rows, offsets, self.matrix, self.number[:, None, None])


def with_gradients(sizes: tuple[int, ...] = (), dim: int = 0) -> MoELayer:
    """A layer of one rank, of which FSDP2 shards the experts over all."""
    group = tokenferry.ExpertGroup(None, MoeShape(5, 2, 16, max_tokens=64), backend="cpu")
    layer = MoELayer(group, experts=Biased(), router=PlacedRouter(Router(16, 3, 2), PLACED, group))
    if sizes:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
        fully_shard(layer.router, mesh=mesh)
        fully_shard(layer, mesh=mesh, shard_placement_fn=lambda p: Shard(dim) if p.ndim == 3 else Shard(0))
    x = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    return layer


def norms(rank: int, pg: dist.ProcessGroup, sizes: tuple[int, ...], dim: int) -> list[float]:
    layer = with_gradients(sizes, dim)
    return [float(clip_grad_norm_(layer, 1e9, norm_type)) for norm_type in (1.0, 2.0, 3.0)]


@pytest.mark.parametrize(
    ("sizes", "dim"), [((2,), 0), ((4,), 0), ((4,), 1), ((2, 2), 0)], ids=["two", "four", "columns", "both"]
)
def test_norms_of_sharded_experts_count_each_once(worlds, sizes, dim):
    layer = with_gradients()
    want = [float(clip_grad_norm_(layer, 1e9, norm_type)) for norm_type in (1.0, 2.0, 3.0)]
    first = torch.tensor([0, 1, 2])  # the slots that count
    grads = [layer.experts.matrix.grad[first], layer.experts.number.grad[first], layer._choice.weight.grad]
    assert want == pytest.approx([float(nn.utils.get_total_norm(grads, p)) for p in (1.0, 2.0, 3.0)])
    for got in worlds(torch.Size(sizes).numel()).run(norms, sizes, dim):
        assert got == pytest.approx(want, rel=1e-6)  # those of routers are float32


def in_another_order(rank: int, pg: dist.ProcessGroup) -> str:
    mesh = init_device_mesh("cpu", (2, 2))
    grad = distribute_tensor(torch.zeros(8, 2), mesh, [Replicate(), Shard(0)])
    spec = grad._spec
    object.__setattr__(spec, "placements", (_StridedShard(0, split_factor=2), Shard(0)))
    with pytest.raises(tokenferry.ConfigError) as caught:
        _norms_of_experts(grad, PLACED, 2.0)
    return str(caught.value)


def test_slots_that_no_longer_follow_each_other_are_refused(worlds):
    for message in worlds(4).run(in_another_order):
        assert "expected Shard and Replicate only" in message
