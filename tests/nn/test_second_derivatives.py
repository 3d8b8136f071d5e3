"""Gradients of gradients of experts on several ranks: those of one process that has all experts, whatever uses them."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import MoELayer, parallelize

SHAPE = MoeShape(4, 2, 16, max_tokens=64)


def rows(rank: int, step: int = 0) -> Tensor:
    return torch.randn(6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def penalized(layer: MoELayer, ranks: range) -> list[Tensor]:
    """Return the gradients of a loss with a penalty on gradients, which is a number of all ranks."""
    loss = torch.stack([layer(rows(rank)).square().mean() for rank in ranks]).mean()
    grads = torch.autograd.grad(loss, layer.expert_parameters(), create_graph=True)
    penalty = torch.stack([whole(grad.square().sum()) for grad in grads]).sum()
    (loss + 0.1 * penalty).backward()
    return [parameter.grad for parameter in layer.parameters()]


def adapted(layer: MoELayer, ranks: range) -> list[Tensor]:
    """Return the gradients of a loss behind two steps by gradients, as MAML has them."""
    weights = {name: p for name, p in layer.named_parameters() if name.startswith("experts.")}

    def loss(step: int) -> Tensor:
        found = [torch.func.functional_call(layer, weights, rows(rank, step)).square().mean() for rank in ranks]
        return torch.stack(found).mean()

    for step in range(2):
        grads = torch.autograd.grad(loss(step), list(weights.values()), create_graph=True)
        weights = {name: p - 0.5 * grad for (name, p), grad in zip(weights.items(), grads, strict=True)}
    loss(2).backward()
    return [parameter.grad for parameter in layer.parameters()]


def on_ranks(
    rank: int, pg: dist.ProcessGroup, use: Callable[[MoELayer, range], list[Tensor]], expert_ranks: int
) -> list[Tensor]:
    sizes = (pg.size() // expert_ranks, expert_ranks)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "experts"))
    with tokenferry.ExpertGroup(mesh["experts"].get_group(), SHAPE, backend="cpu") as group:
        layer = MoELayer(group, 8, dtype=torch.float64)
        parallelize(layer, replicate=mesh["replicate"])
        found = [whole(grad).detach().clone() for grad in use(layer, range(rank, rank + 1))]
        router = [id(p) for p in layer.parameters()].index(id(layer.router.weight))
        dist.all_reduce(found[router])
        found[router] /= pg.size()
        return found


@pytest.mark.parametrize(("ranks", "expert_ranks"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("use", [penalized, adapted])
def test_uses_of_gradients_are_differentiated_as_in_one_process(worlds, use, ranks, expert_ranks):
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        want = use(MoELayer(group, 8, dtype=torch.float64), range(ranks))
    for got in worlds(ranks).run(on_ranks, use, expert_ranks):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)  # weights of the router are float32
            torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-6, atol=0)
