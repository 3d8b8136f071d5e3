"""What happens between a forward and its backward: experts that move, and experts that backward repeats in part."""

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.utils.checkpoint import checkpoint

import tokenferry
from tokenferry import MoeShape
from tokenferry.nn import LayerOptions, MoELayer, Router, by_expert
from tokenferry.nn.balance import PlacedRouter, Placement, rebalance

INPLACE = r"modified (by an )?in-?place"


def moved_too_early(rank: int, pg: dist.ProcessGroup | None) -> str:
    """Move experts between a forward and its backward; return the error of torch."""
    num_ranks = 1 if pg is None else pg.size()
    here, there = (Placement.of(torch.tensor(slots), num_ranks) for slots in ([0, 1, 2, 3], [3, 2, 1, 0]))
    with tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, max_tokens=32), backend="cpu") as group:
        layer = MoELayer(group, 8, router=PlacedRouter(Router(16, 4, 2), here, group), dtype=torch.float64)
        x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer(x).sum().backward()
        rebalance(layer, there)
        layer(x).sum().backward()  # between two steps it may be
        y = layer(x)
        rebalance(layer, here)
        with pytest.raises(RuntimeError) as caught:
            y.sum().backward()
        return str(caught.value)


def test_experts_that_move_before_backward_are_noticed_on_one_rank():
    assert re.search(INPLACE, moved_too_early(0, None))


def test_experts_that_move_before_backward_are_noticed(worlds):
    for message in worlds(2).run(moved_too_early):
        assert re.search(INPLACE, message)


class Inner(nn.Module):
    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(num_local, 16, 16))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return by_expert(lambda product, rows, w: product(rows, w).tanh(), rows, offsets, self.w)


class Repeated(nn.Module):
    """Experts that checkpoint a part of themselves, as ``how`` says."""

    def __init__(self, num_local: int, how: str) -> None:
        super().__init__()
        self.inner, self.how = Inner(num_local), how
        if how == "wrapper":
            self.inner = checkpoint_wrapper(self.inner)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        if self.how not in ("reentrant", "not reentrant"):
            return 2 * self.inner(rows, offsets)
        return 2 * checkpoint(self.inner, rows, offsets, use_reentrant=self.how == "reentrant")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", ["wrapper", "reentrant"])
@pytest.mark.parametrize("options", [LayerOptions(), LayerOptions(checkpoint_experts=True)])
def test_experts_that_repeat_a_part_of_themselves_are_refused(how, options):
    """In backward it would be called without what functional_call has given it: replicas would drift apart."""
    slots = torch.tensor([0, 1, 2, 3, 0])
    with tokenferry.ExpertGroup(None, MoeShape(5, 2, 16, max_tokens=32), backend="cpu") as group:

        def made(how: str) -> MoELayer:
            router = PlacedRouter(Router(16, 4, 2), Placement.of(slots, 1), group)
            return MoELayer(group, experts=Repeated(5, how), router=router, options=options)

        layer, x = made("not at all"), torch.randn(9, 16)
        checkpoint(layer, x.clone().requires_grad_(), use_reentrant=True).sum().backward()
        layer(nn.Linear(16, 16)(x)).sum().backward()
        if how == "wrapper":
            with pytest.raises(tokenferry.ConfigError, match="checkpoint_wrapper would repeat them"):
                made(how)
            layer.experts.inner = checkpoint_wrapper(layer.experts.inner)
        else:
            layer = made(how)
            with torch.no_grad():
                layer(x)
        with pytest.raises(tokenferry.ConfigError, match=r"would repeat them .*checkpoint_experts=True"):
            layer(x)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 0], [0, 1, 2, 3]], ids=["replicas", "once"])
def test_experts_that_begin_to_repeat_a_part_of_themselves_are_refused(slots):
    """With replicas in any forward, else when experts are trained again, or the last step of theirs is another."""
    with tokenferry.ExpertGroup(None, MoeShape(len(slots), 2, 16, max_tokens=32), backend="cpu") as group:
        router = PlacedRouter(Router(16, 4, 2), Placement.of(torch.tensor(slots), 1), group)
        experts = Repeated(len(slots), "not at all").eval()
        layer, x = MoELayer(group, experts=experts, router=router), torch.randn(9, 16, requires_grad=True)
        layer(x).sum().backward()
        layer.experts.how = "reentrant"
        layer.experts.train(len(slots) == 4)
        for _ in range(2):
            with pytest.raises(tokenferry.ConfigError, match="would repeat them"):
                layer(x)
        layer.experts.how = "not at all"
        layer(x).sum().backward()


def repeated_in_part(rank: int, pg: dist.ProcessGroup) -> str:
    """Return what backward says to experts of which it repeats a part."""
    with tokenferry.ExpertGroup(pg, MoeShape(4, 2, 16, max_tokens=32), backend="cpu") as group:
        layer = MoELayer(group, experts=Repeated(group.num_local_experts, "not reentrant"))
        y = layer(torch.randn(9, 16))
        with pytest.raises(tokenferry.ShapeError) as caught:
            y.sum().backward()
        return str(caught.value)


def test_repeated_parts_of_experts_are_named(worlds):
    """torch repeats them outside of the layer, where parameters are those of all ranks."""
    for message in worlds(2).run(repeated_in_part):
        assert "got [4, 16, 16]; a MoELayer gives its experts their part" in message
        assert "checkpoint the layer, or use LayerOptions(checkpoint_experts=True)" in message


def test_what_was_checkpointed_before_the_experts_is_none_of_theirs():
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=32), backend="cpu") as group:
        layer, before = MoELayer(group, experts=Inner(4)), nn.Linear(16, 16)
        x = checkpoint(before, torch.randn(9, 16).requires_grad_(), use_reentrant=True)
        layer(x).sum().backward()
        assert before.weight.grad.any()


class Alike(nn.Module):
    """Experts that repeat what needs no parameter of theirs, or gets it as an argument."""

    def __init__(self, num_local: int, how: str) -> None:
        super().__init__()
        self.w, self.how = nn.Parameter(torch.ones(num_local, 16, 16) / 16), how

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        def product(rows: Tensor, w: Tensor) -> Tensor:
            return by_expert(lambda product, rows, w: product(rows, w), rows, offsets, w)

        if self.how == "with arguments":
            return checkpoint(product, rows, self.w, use_reentrant=True).tanh()
        out = product(rows, self.w)
        return checkpoint(torch.tanh, out, use_reentrant=True) if self.how == "activation" else out.tanh()


@pytest.mark.parametrize("how", ["with arguments", "activation"])
def test_what_repeats_no_parameters_is_right(how):
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=32), backend="cpu") as group:
        x, grads = torch.randn(9, 16), []
        for way in (how, "once"):
            layer = MoELayer(group, experts=Alike(4, way))
            layer(x.clone().requires_grad_()).square().sum().backward()
            grads.append(layer.experts.w.grad)
        assert grads[0].any()
        assert torch.equal(*grads)


def test_offloaded_experts_are_no_checkpoint():
    with tokenferry.ExpertGroup(None, MoeShape(4, 2, 16, max_tokens=32), backend="cpu") as group:
        layer = MoELayer(group, experts=Repeated(4, "not at all"))
        layer.experts.inner = offload_wrapper(layer.experts.inner)
        layer(torch.randn(9, 16)).sum().backward()
        assert all(parameter.grad.any() for parameter in layer.experts.parameters())
