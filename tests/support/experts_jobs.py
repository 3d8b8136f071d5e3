"""Jobs with experts of a user, and of ours, on several ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tokenferry
from support.training_jobs import SHAPE as SHAPE
from support.training_jobs import Fixed, whole
from tokenferry.nn import GELUExperts, MoELayer, by_expert


class Scaled(nn.Module):
    """Experts of a user: a matrix and a bias for each, and one number for each in a module of its own."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        width = SHAPE.hidden
        whole = torch.randn(
            SHAPE.num_experts, width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        self.matrix = nn.Parameter(whole[first : first + count].clone())
        self.bias = nn.Parameter(whole[first : first + count, 0].clone())
        self.scale = nn.Module()
        self.scale.number = nn.Parameter(whole[first : first + count, 1, 0].clone())

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        assert type(self.matrix.data) is Tensor, "experts must see tensors"
        owners = torch.repeat_interleave(torch.arange(len(self.bias)), offsets.diff())
        y = by_expert(lambda product, part, matrix: product(part, matrix), rows, offsets, self.matrix)
        return (y + self.bias[owners]) * self.scale.number[owners, None]


def custom_layer(group: tokenferry.ExpertGroup) -> MoELayer:
    count = group.num_local_experts
    return MoELayer(group, experts=Scaled(group.rank * count, count), router=Fixed().double())


def rows_of(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 + rank)
    return torch.randn(5 - rank, SHAPE.hidden, dtype=torch.float64, generator=generator)


def custom(rank: int, pg: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the result, the gradients of all experts, and what a checkpoint would hold."""
    with tokenferry.ExpertGroup(pg, SHAPE) as group:
        layer = custom_layer(group)
        out = layer(rows_of(rank))
        out.square().mean().backward()
        grads = {f"grad {name}": whole(p.grad) for name, p in layer.named_parameters() if p.grad is not None}
        return {"out": out.detach(), **grads, **{f"state {name}": whole(v) for name, v in layer.state_dict().items()}}


def drawn(rank: int, pg: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the experts of all ranks after they were drawn again as DTensors."""
    with tokenferry.ExpertGroup(pg, SHAPE) as group:
        layer = MoELayer(group, experts=GELUExperts(group, 24, seed=5))
        for parameter in layer.expert_parameters():
            parameter.to_local().detach().zero_()
        layer.reset_parameters()
        return {name: whole(value) for name, value in layer.experts.state_dict().items()}


def stepped(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the result and all gradients of one step, and leave none behind."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.float().square().sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    module.zero_grad()
    return found
