"""Tools of torch that make other tensors of the experts' parameters: what works, and what is said of the rest."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import GELUExperts, MoELayer, parallelize

SHAPE = MoeShape(4, 2, 16, max_tokens=32)
LOST = (
    "and may have given every rank the experts of rank 0; load them again, and use DistributedDataParallel(model) "
    "after parallelize(model), or replicate(model, ignored_modules=[layer.experts]), with process_group= instead of"
)


def rows(rank: int) -> torch.Tensor:
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(rank))


def model_of(group: tokenferry.ExpertGroup) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), MoELayer(group, experts=GELUExperts(group, 8)))


def gradients(model: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Two backward passes: some tools replace parameters behind the first forward."""
    for _ in range(2):
        model(rows(rank)).square().sum().backward()
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
    }


def replicated(rank: int, pg: dist.ProcessGroup, prepare: bool, apart: bool) -> tuple[dict, dict]:
    """Return the gradients of a model that replicate leaves the experts of alone, and those by DDP."""
    mesh = init_device_mesh("cpu", (2, pg.size() // 2) if apart else (1, pg.size()), mesh_dim_names=("dp", "ep"))
    found = []
    with tokenferry.ExpertGroup(mesh["ep"].get_group(), SHAPE, backend="cpu") as group:
        for tool in ("replicate", "ddp"):
            model: nn.Module = model_of(group)
            before = model[1].experts.up.full_tensor().detach().clone()
            if prepare or tool == "ddp":
                parallelize(model, mesh["ep"], replicate=mesh["dp"] if apart else None)
            if tool == "ddp":
                model = DistributedDataParallel(model)
            else:
                how = {"process_group": pg} if apart else {}
                replicate(model, ignored_modules=[model[1].experts], **how)
            found.append(gradients(model, rank))
            layer = getattr(model, "module", model)[1]
            assert torch.equal(layer.experts.up.full_tensor(), before)
    return found[0], found[1]


@pytest.mark.parametrize(("ranks", "prepare", "apart"), [(2, True, False), (2, False, False), (4, True, True)])
def test_replicate_leaves_experts_alone_if_told(worlds, ranks, prepare, apart):
    for got, want in worlds(ranks).run(replicated, prepare, apart):
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def not_told(rank: int, pg: dist.ProcessGroup) -> list[str]:
    """Return what is said when replicate has taken the experts, by forward and by what once seemed to help."""
    mesh, errors = init_device_mesh("cpu", (2,)), []
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        model = model_of(group)
        parallelize(model)
        replicate(model)
        for call in (
            lambda: model(rows(rank)),
            lambda: torch.compile(model, backend="eager")(rows(rank)),
            lambda: parallelize(model, mesh),
            lambda: parallelize(model),
            lambda: MoELayer(group, experts=model[1].experts),
        ):
            with pytest.raises(tokenferry.ConfigError) as caught:
                call()
            errors.append(str(caught.value))
        assert not hasattr(model[1].experts.up, "to_local"), "its values were taken for those of this rank"
    return errors


def test_experts_that_replicate_has_taken_are_lost(worlds):
    for errors in worlds(2).run(not_told):
        for message in errors:
            assert f"MoELayer: experts: a tool has made plain tensors of them, such as up, {LOST}" in message


def reconstructed(rank: int, pg: dist.ProcessGroup, how: str) -> tuple[str, bool]:
    """Return what is said of DTensors that are no parameters any more, and whether the experts are as they were."""
    mesh = init_device_mesh("cpu", (2, pg.size() // 2), mesh_dim_names=("dp", "ep"))
    wide = how == "before DDP"
    with tokenferry.ExpertGroup(pg if wide else mesh["ep"].get_group(), SHAPE, backend="cpu") as group:
        model: nn.Module = model_of(group)
        experts = model[1].experts
        before = experts.up.to_local().detach().clone()
        parallelize(model, replicate=None if wide else mesh["dp"])
        if wide:
            _pre_dp_module_transform(model)
            model = DistributedDataParallel(model)
        else:
            replicate(model, device_mesh=mesh["dp"])
        with pytest.raises(tokenferry.ConfigError) as caught:
            model(rows(rank))
        return str(caught.value), torch.equal(experts.up.to_local(), before)


@pytest.mark.parametrize(("ranks", "how"), [(2, "before DDP"), (4, "replicate over a slice")])
def test_experts_that_are_no_parameters_any_more(worlds, ranks, how):
    for message, kept in worlds(ranks).run(reconstructed, how):
        assert kept, "DistributedDataParallel ignores the names that parallelize has given it"
        assert "MoELayer: experts: up is no parameter any more, since a tool has replaced it" in message
        assert LOST in message


def transformed(rank: int, pg: dist.ProcessGroup) -> list[str]:
    """Return what is said of transforms of parameters and of rows."""
    errors = []
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        layer = model_of(group)[1]
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(parameters):
            return torch.func.functional_call(layer, parameters, (rows(rank),)).sum()

        x = rows(rank)
        for call in (
            lambda: torch.func.grad(loss)(parameters),
            lambda: torch.func.jacrev(loss)(parameters),
            lambda: torch.func.vjp(loss, parameters),
            lambda: torch.func.grad(lambda x: layer(x).sum())(x),
            lambda: torch.func.jvp(layer, (x,), (x,)),
            lambda: torch.vmap(layer)(x[None]),
        ):
            with pytest.raises(tokenferry.ArgumentError) as caught:
                call()
            errors.append(str(caught.value))
        by_autograd = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
        assert len(by_autograd) == 3
    return errors


def test_transforms_of_torch_func_are_named(worlds):
    for errors in worlds(2).run(transformed):
        for message in errors:
            assert "transforms of torch.func, and torch.vmap, do not work with experts that are spread over" in message
            assert message.endswith("use torch.autograd.grad or .backward()")


def inside_of_transforms(rank: int, pg: dist.ProcessGroup) -> None:
    """A layer whose gradients nobody asks for, within what is transformed."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group, torch.no_grad():
        layer, x = model_of(group)[1], rows(rank)
        y = layer(x)
        value, tangent = torch.func.jvp(lambda t: t * layer(x), (x,), (torch.ones_like(x),))
        assert torch.equal(value, x * y)
        assert torch.equal(tangent, y)

        def product(t: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                frozen = layer(x)
            return (t * frozen).sum()

        assert torch.equal(torch.func.grad(product)(x), y)
        scaled = torch.vmap(lambda scale: scale * layer(x))(torch.arange(2.0))
        assert torch.equal(scaled[1], y)


def test_frozen_layers_may_stand_inside_of_transforms(worlds):
    worlds(2).run(inside_of_transforms)
