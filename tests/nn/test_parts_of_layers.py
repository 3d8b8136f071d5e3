"""Parts of layers that are not as they were made, or that several layers have."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import (
    GELUExperts,
    GroupLimit,
    LayerOptions,
    MoELayer,
    Router,
    RouterOptions,
    SwiGLUExperts,
    auxiliary_losses,
    group_limited_topk,
    softmax_topk,
    update_biases,
)

ONE = GroupLimit(1, 1)


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=64), backend="cpu") as one:
        yield one


# ---------------------------------------------------------------------- weights that are not normalised


@pytest.mark.parametrize("limit", [None, ONE], ids=["softmax", "sigmoid"])
def test_a_router_of_one_choice_learns_from_the_task(limit):
    x, grads = torch.randn(20, 16), []
    with tokenferry.ExpertGroup(None, MoeShape(4, 1, 16, max_tokens=64), backend="cpu") as group:
        for normalize in (False, True):
            options = RouterOptions(normalize=normalize, losses=True)
            layer = MoELayer(group, 32, router=Router(16, 4, 1, group_limit=limit, options=options))
            layer(x).square().sum().backward()
            grads.append(layer.router.weight.grad.abs().max())
    assert grads[0] > 0.1
    assert grads[1] < 1e-3


def test_weights_that_are_not_normalised():
    logits = torch.randn(9, 8, dtype=torch.float64)
    router = Router(8, 8, 3, options=RouterOptions(normalize=False)).double()
    scaled = Router(8, 8, 3, group_limit=ONE, scale=2.5, options=RouterOptions(normalize=False)).double()
    with torch.no_grad():
        for one in (router, scaled):
            one.weight.copy_(torch.eye(8))
    found = router(logits)
    assert torch.equal(found.topk_idx, softmax_topk(logits, 3).topk_idx)
    torch.testing.assert_close(found.topk_weights, logits.softmax(1).gather(1, found.topk_idx).float())
    found = scaled(logits)
    torch.testing.assert_close(found.topk_weights, 2.5 * logits.sigmoid().gather(1, found.topk_idx).float())
    assert torch.equal(group_limited_topk(logits, 3, ONE, scale=2.5, normalize=False).topk_weights, found.topk_weights)
    with pytest.raises(tokenferry.ConfigError, match="normalize: expected a bool, got 1"):
        RouterOptions(normalize=1)


def test_a_router_that_cannot_learn_says_so():
    for limit in (None, ONE):
        with pytest.warns(UserWarning, match=r"no gradient for it; pass .*RouterOptions\(normalize=False"):
            Router(16, 4, 1, group_limit=limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_experts, top_k, options in (
            (4, 2, RouterOptions()),
            (1, 1, RouterOptions()),
            (4, 1, RouterOptions(losses=True)),
            (4, 1, RouterOptions(normalize=False)),
        ):
            Router(16, num_experts, top_k, options=options)


# ---------------------------------------------------------------------- what reset_parameters draws


class Same(nn.Module):
    def forward(self, weight):
        return weight


def test_what_was_added_to_our_experts_is_not_drawn(group):
    layer = MoELayer(group, 12, seed=3)
    want = copy.deepcopy(layer.experts.state_dict())
    layer.experts.adapter = nn.Parameter(torch.zeros(4, 2, 12))
    layer.experts.bias = nn.Parameter(torch.full((4, 12), 2.0))
    nn.utils.parametrize.register_parametrization(layer.experts, "gate", Same())
    with torch.no_grad():
        for parameter in (layer.experts.parametrizations.gate.original, layer.experts.up, layer.experts.down):
            parameter.zero_()
    layer.reset_parameters()
    for name, value in want.items():
        assert torch.equal(getattr(layer.experts, name), value), name
    assert not layer.experts.adapter.any()
    assert layer.experts.bias.eq(2).all()


def test_what_cannot_be_drawn_is_refused(group):
    layer = MoELayer(group, experts=SwiGLUExperts(group, 12))
    nn.utils.parametrizations.weight_norm(layer.experts, "up", dim=0)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(tokenferry.ConfigError, match="reset_parameters: up is no parameter any more"):
        layer.reset_parameters()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def drawn_sharded(rank: int, pg: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (3,))
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=64), backend="cpu") as group:
        with torch.device("meta"):
            layer = MoELayer(group, experts=GELUExperts(group, 12, seed=5))
        fully_shard(layer, mesh=mesh)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        return {name: value.full_tensor() for name, value in layer.experts.state_dict().items()}


def test_experts_of_one_rank_that_were_sharded_are_drawn_alike(worlds, group):
    want = GELUExperts(group, 12, seed=5).state_dict()
    for got in worlds(3).run(drawn_sharded):
        for name, value in want.items():
            assert torch.equal(got[name], value), name


# ---------------------------------------------------------------------- routers and layers that belong to two


def test_a_router_of_two_layers_takes_one_step_for_both(group):
    router = Router(16, 4, 2, group_limit=ONE)
    model = nn.Sequential(*(MoELayer(group, 12, router=router, seed=seed) for seed in (0, 1)))
    model(torch.randn(20, 16))
    want, load = copy.deepcopy(router), sum(layer.expert_counts for layer in model)
    want.update_bias(load, rate=0.25)
    update_biases(model, rate=0.25)
    assert torch.equal(router.bias, want.bias)


def test_losses_of_one_router_in_two_layers_are_refused(group):
    routers = [Router(16, 4, 2, options=RouterOptions(losses=True)) for _ in range(2)]
    model = nn.Sequential(*(MoELayer(group, 12, router=routers[0], seed=seed) for seed in (0, 1)))
    model(torch.randn(20, 16))
    with pytest.raises(tokenferry.ConfigError, match=r"'0.router' is the router of 2 layers.*other.weight = router"):
        auxiliary_losses(model)
    model[1].router = routers[1]
    routers[1].weight = routers[0].weight
    model(torch.randn(20, 16))
    want = sum(router.losses.balance for router in routers)
    torch.testing.assert_close(auxiliary_losses(model).balance, want)


def replicated_of_both(rank: int, pg: dist.ProcessGroup) -> None:
    """A layer on all ranks, with one inside of it on all of them, or one whose experts each rank has."""
    alone, shape = [dist.new_group([r]) for r in range(pg.size())][rank], MoeShape(4, 2, 16, max_tokens=64)
    with tokenferry.ExpertGroup(pg, shape, backend="cpu") as group, tokenferry.ExpertGroup(alone, shape) as one:
        for of_inner in (group, one):
            inner = MoELayer(of_inner, 8, seed=1)
            layer = MoELayer(group, 12, options=LayerOptions(shared=inner))
            copies = [] if of_inner is group else inner.expert_parameters()
            want = {id(p) for p in (layer.router.weight, inner.router.weight, *copies)}
            assert {id(p) for p in layer.replicated_parameters()} == want


def test_experts_that_every_rank_has_are_replicated_and_others_not(worlds):
    worlds(2).run(replicated_of_both)
