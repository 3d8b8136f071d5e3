"""Layers whose experts are placed, compiled in one graph, which is made once and follows all that places experts."""

import copy

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import GroupLimit, MoELayer, Router, update_biases
from tokenferry.nn.balance import PlacedRouter, Placement, rebalance

SLOTS = torch.tensor([0, 1, 2, 0, 3, 1])
"""With replicas: they train, but not in one graph."""


def made(group, slots, limit=None):
    router = PlacedRouter(Router(16, 4, 2, group_limit=limit), Placement.of(slots, 1), group)
    return MoELayer(group, 16, router=router)


def put(layer, slots, how):
    """Place the experts of a layer otherwise, weights and all."""
    placement = Placement.of(slots, 1)
    if how == "rebalance":
        rebalance(layer, placement)
    elif how == "place":
        layer.router.place(placement)
        layer.reset_parameters()
    elif how == "load_state_dict":
        layer.load_state_dict(made(layer.group, slots).state_dict())
    else:  # as torch.distributed.checkpoint.load does it
        state = layer.state_dict()
        for name, value in made(layer.group, slots).state_dict().items():
            state[name].detach().copy_(value)


def trained_as_eagerly(layer, compiled, x):
    """Check the gradients of a compiled layer, drop them, and return an eager copy that has been trained as well."""
    eager = copy.deepcopy(layer)
    for run in (eager, compiled):
        run(x).square().sum().backward()
    for got, want in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    layer.zero_grad()
    return eager


@pytest.mark.parametrize("how", ["rebalance", "place", "load_state_dict", "in place"])
@pytest.mark.parametrize("slots", [torch.arange(4), SLOTS], ids=["once", "replicas"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_follows_placements(how, slots, backend):
    shape = MoeShape(len(slots), 2, 16, max_tokens=64)
    one_graph = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with tokenferry.ExpertGroup(None, shape, backend="cpu") as group, torch._dynamo.config.patch(one_graph):
        layer, x = made(group, slots), torch.randn(9, 16)
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        with torch.no_grad():
            want = copy.deepcopy(layer)(x)
            torch.testing.assert_close(compiled(x), want)
            for other in (slots.flip(0), slots.roll(1), slots):
                put(layer, other, how)
                torch.testing.assert_close(compiled(x), want)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["rebalance", "in place"])
def test_one_graph_trains(how):
    with (
        tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=64), backend="cpu") as group,
        torch._dynamo.config.patch(capture_scalar_outputs=True),
    ):
        layer, x = made(group, torch.arange(4)), torch.randn(9, 16)
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for slots in (torch.arange(4), torch.tensor([3, 1, 0, 2]), torch.tensor([1, 0, 2, 3])):
            put(layer, slots, how)
            trained_as_eagerly(layer, compiled, x)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_placements_that_do_not_fit_are_refused_in_one_graph():
    with (
        tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=64), backend="cpu") as group,
        torch._dynamo.config.patch(capture_scalar_outputs=True),
    ):
        layer, x = made(group, torch.arange(4)), torch.randn(9, 16)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compiled(x)
        layer.state_dict()["router._extra_state"].copy_(torch.tensor([0, 1, 2, 0]))
        for run in (compiled, layer):
            with pytest.raises(tokenferry.ConfigError, match="expected 4 logical experts like before, got 3"):
                run(x)


OTHERS = ([0, 1, 2, 3, 2, 3], [1, 3, 0, 2, 1, 0], [2, 1, 1, 3, 2, 0])
"""Placements as SLOTS, each with replicas of other experts than the one before."""


@pytest.mark.parametrize(
    ("slots", "others", "limit"),
    [
        (SLOTS, OTHERS, None),
        (torch.arange(4), ([3, 0, 1, 2], [3, 2, 1, 0], [1, 0, 2, 3]), GroupLimit(1, 1)),
        (SLOTS, OTHERS, GroupLimit(1, 1)),
    ],
    ids=["replicas", "biases", "both"],
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_what_breaks_the_graph_of_training(slots, others, limit, backend):
    """The documents say so; without ``fullgraph`` it is right, also when a placement was loaded in place."""
    shape = MoeShape(len(slots), 2, 16, max_tokens=64)
    with (
        tokenferry.ExpertGroup(None, shape, backend="cpu") as group,
        torch._dynamo.config.patch(capture_scalar_outputs=True),
    ):
        layer, x = made(group, slots, limit), torch.randn(9, 16)
        with pytest.raises(TorchDynamoException):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        compiled = torch.compile(layer, backend=backend)
        trained_as_eagerly(layer, compiled, x)
        for how, other in zip(("in place", "rebalance", "in place"), others, strict=True):
            put(layer, torch.tensor(other), how)
            eager = trained_as_eagerly(layer, compiled, x)
            if limit is not None:
                for one in (eager, layer):
                    update_biases(one, rate=0.25)
                assert torch.equal(layer._choice.bias, eager._choice.bias)


def test_steps_after_a_move_are_not_compiled_again():
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=64), backend="cpu") as group:
        layer, x = made(group, torch.arange(4), GroupLimit(1, 1)), torch.randn(9, 16)
        compiled = torch.compile(layer, backend="aot_eager")
        compiled(x).sum().backward()
        rebalance(layer, Placement.of(torch.tensor([3, 2, 1, 0]), 1))
        for _ in range(2):  # of which the second finds a load that was counted
            compiled(x).sum().backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                compiled(x).sum().backward()
        assert [held for held, _ in layer._take_loads()] == [[0, 1, 2, 3], [3, 2, 1, 0]]
        compiled(x)
        layer.router = layer._choice  # experts are in their order again
        layer(x)
        assert [held for held, _ in layer._take_loads()] == [[3, 2, 1, 0], [0, 1, 2, 3]]
