"""Routers and experts inside of torch's wrappers: a layer does with them what it does without."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import (
    GELUExperts,
    GroupLimit,
    MoELayer,
    Router,
    RouterOptions,
    SwiGLUExperts,
    auxiliary_losses,
    clip_grad_norm_,
    parallelize,
    update_biases,
)
from tokenferry.nn.balance import PlacedRouter, Placement, rebalance
from tokenferry.nn.experts import seeded_parameters

SHAPE = MoeShape(4, 2, 16, max_tokens=64)
HERE, THERE = ([0, 1, 0, 2], [2, 1, 0, 0])


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


ROUTERS = {
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "both": lambda module: checkpoint_wrapper(compiled(module)),
}
EXPERTS = {"compiled": compiled, "offloaded": offload_wrapper, "both": lambda module: offload_wrapper(compiled(module))}


def as_it_is(module: nn.Module) -> nn.Module:
    return module


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


def rows(seed: int) -> Tensor:
    return torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router_of(seed: int = 0, top_k: int = 2) -> Router:
    return Router(16, 3, top_k, group_limit=GroupLimit(1, 1), options=RouterOptions(losses=True), seed=seed)


def placed(group: tokenferry.ExpertGroup, wrap: Any, slots: list[int] = HERE) -> nn.Module:
    """Return a placed router, wrapped, around one that is, too."""
    return wrap(PlacedRouter(wrap(router_of()), Placement.of(torch.tensor(slots), group.num_ranks), group))


def inner(model: nn.Module) -> Router:
    return next(module for module in model.modules() if isinstance(module, Router))


def trained(group: tokenferry.ExpertGroup, wrap: Any, late: bool) -> list[Tensor]:
    """Return all that layers and tools make of a layer with replicas, whose router is wrapped at once, or late."""
    layer = MoELayer(group, 8, router=placed(group, as_it_is if late else wrap), dtype=torch.float64)
    if late:
        layer.router.router = wrap(layer.router.router)
        layer.router = wrap(layer.router)
    x = rows(0)
    out = layer(x)
    losses = auxiliary_losses(layer)
    (out.square().mean() + losses.balance).backward()
    found = [out.detach(), *(p.grad.clone() for p in layer.parameters()), clip_grad_norm_(layer, 0.1)]
    update_biases(layer)
    found.append(inner(layer).bias.clone())
    rebalance(layer, Placement.of(torch.tensor(THERE), 1))
    found.append(layer(x).detach())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    return [*found, *(p.detach().clone() for p in layer.parameters()), inner(layer).bias.clone()]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ROUTERS)
def test_wrapped_routers_are_what_is_in_them(group, how, late):
    for got, want in zip(trained(group, ROUTERS[how], late), trained(group, as_it_is, late), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ROUTERS)
def test_wrapped_routers_are_checked_as_others(group, how):
    wrap = ROUTERS[how]
    with pytest.raises(tokenferry.ConfigError, match=r"router: it has num_experts=3, .*expected 4, as the group has"):
        MoELayer(group, 8, router=wrap(router_of()))
    router = wrap(Router(16, 4, 2, options=RouterOptions(losses=True)))
    model = nn.Sequential(*(MoELayer(group, 8, router=router, seed=seed) for seed in (0, 1)))
    model(torch.randn(9, 16))
    with pytest.raises(tokenferry.ConfigError, match="is the router of 2 layers"):
        auxiliary_losses(model)


@pytest.mark.parametrize("how", ROUTERS)
def test_layers_that_share_a_router_share_it_in_wrappers_too(group, how):
    layer = MoELayer(group, 8, router=placed(group, as_it_is))
    other = MoELayer(group, 8, router=ROUTERS[how](layer.router))
    with pytest.raises(tokenferry.ConfigError, match="another MoELayer shares its router"):
        rebalance(layer, Placement.of(torch.tensor(THERE), 1))
    del other


@pytest.mark.parametrize("how", ROUTERS)
def test_half_a_state_is_refused_in_wrappers_too(group, how):
    one, other = (MoELayer(group, 8, router=placed(group, ROUTERS[how], slots)) for slots in (HERE, THERE))
    state = one.state_dict()
    (place,) = (key for key in state if key.endswith("_extra_state"))
    slots = state.pop(place)
    with pytest.raises(tokenferry.ConfigError, match=r"the state has experts.* but not router.*_extra_state"):
        other.load_state_dict(state, strict=False)
    for key in [key for key in state if key.startswith("experts.")]:
        del state[key]
    with pytest.raises(tokenferry.ConfigError, match=r"_extra_state says that the slots hold the experts"):
        other.load_state_dict({**state, place: slots}, strict=False)
    other.load_state_dict(one.state_dict())
    x = torch.randn(9, 16)
    assert torch.equal(other(x), one(x))


@pytest.mark.parametrize("how", EXPERTS)
def test_wrapped_experts_are_drawn(group, how):
    want = MoELayer(group, 8)
    with torch.device("meta"):
        layer = MoELayer(group, 8)
        layer.experts = EXPERTS[how](layer.experts)
    assert seeded_parameters(layer.experts) == set(layer.experts.parameters())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    for got, wanted in zip(layer.parameters(), want.parameters(), strict=True):
        assert torch.equal(got, wanted)


class Around(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = self.inside(rows, offsets)
        return out


def spread(rank: int, pg: dist.ProcessGroup | None, how: str) -> list[Tensor]:
    """Return the gradients of wrapped experts, at once, late and in part: of the loss of this rank, or of both."""
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        found = []
        for kind in ("all", "late", "part"):
            experts = SwiGLUExperts(group, 8, dtype=torch.float64)
            if how != "plain" and kind != "late":
                experts = EXPERTS[how](experts)
            layer = MoELayer(group, experts=Around(experts) if kind == "part" else experts)
            if how != "plain" and kind == "late":
                layer.experts = EXPERTS[how](layer.experts)
            parallelize(layer)
            ranks = range(2) if pg is None else [rank]
            torch.stack([layer(rows(r)).square().sum() for r in ranks]).mean().backward()
            found += [p.grad.full_tensor() if pg else p.grad for p in layer.experts.parameters()]
        return found


@pytest.mark.parametrize("how", EXPERTS)
def test_wrapped_experts_are_trained(worlds, how):
    want = spread(0, None, "plain")
    for got in worlds(2).run(spread, how):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # weights of the router are float32


def replicated(rank: int, pg: dist.ProcessGroup) -> str:
    """Return what `parallelize` says to a wrapped `PlacedRouter` that several groups would have."""
    alone = [dist.new_group([r]) for r in range(2)][rank]
    with tokenferry.ExpertGroup(alone, SHAPE, backend="cpu") as group:
        layer = MoELayer(group, experts=GELUExperts(group, 8), router=placed(group, compiled))
        with pytest.raises(tokenferry.ConfigError) as caught:
            parallelize(layer, replicate=pg)
        return str(caught.value)


def test_wrapped_placed_routers_are_refused_in_several_groups(worlds):
    for message in worlds(2).run(replicated):
        assert "has a PlacedRouter, and each group may place its experts elsewhere" in message
