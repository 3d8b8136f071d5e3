"""A job that trains with auxiliary losses, a capacity and biases, and the same in one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tokenferry
from support.training_jobs import FFN, HIDDEN, SHAPE, Recipe, average_by_hand, prepared, wholes
from tokenferry.nn import GroupLimit, MoELayer, Router, RouterOptions, auxiliary_losses, update_biases

EXPERTS, TOP_K = SHAPE.num_experts, SHAPE.top_k


class Model(nn.Module):
    """Two layers of experts, one with each gating, after a dense one."""

    def __init__(self, group: tokenferry.ExpertGroup) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(HIDDEN, HIDDEN)
        options = RouterOptions(losses=True, capacity_factor=1.25)
        routers = [
            Router(HIDDEN, EXPERTS, TOP_K, group_limit=limit, options=options, seed=3)
            for limit in (None, GroupLimit(4, 2))
        ]
        self.moe = nn.ModuleList(MoELayer(group, FFN, router=router) for router in routers)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.moe:
            x = x + layer(x)
        return x


def rows_of(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8 - 3 * rank, HIDDEN, dtype=torch.float64, generator=generator) + 0.5


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    losses = auxiliary_losses(model)
    return out.square().mean() + 0.1 * losses.balance + 0.01 * losses.z


def trained(rank: int, pg: dist.ProcessGroup, tool: str) -> dict[str, Tensor]:
    """Two steps; return the parameters and the biases."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        model = prepared(Model(group), Recipe(tool), pg)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            loss_of(model, rows_of(step, rank)).backward()
            if tool == "hand":
                average_by_hand(model, pg)
            _advance(model, optimizer)
        return _found(model)


def trained_alone(num_ranks: int) -> dict[str, Tensor]:
    """The same from the rule."""
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        model = Model(group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            losses = [loss_of(model, rows_of(step, rank)) for rank in range(num_ranks)]
            torch.stack(losses).mean().backward()
            _advance(model, optimizer)
        return _found(model)


def _advance(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
    update_biases(model, rate=0.01)


def _found(model: nn.Module) -> dict[str, Tensor]:
    bias = model.moe[1].router.bias
    return {**wholes(model), "biases": bias.clone()}
