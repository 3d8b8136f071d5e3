"""Shared experts: a module for all tokens, whose result is added."""

import pytest
import torch
from torch import nn

import tokenferry
from support.experts_jobs import stepped
from support.training_jobs import Fixed
from tokenferry import MoeShape
from tokenferry.nn import LayerOptions, MoELayer

SHAPE = MoeShape(num_experts=8, top_k=2, hidden=16, max_tokens=12)


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


class Summed(nn.Module):
    """What a layer with shared experts must be."""

    def __init__(self, routed, shared):
        super().__init__()
        self.experts, self.router, self.shared = routed.experts, routed.router, shared
        self.routed = [routed]

    def forward(self, x):
        return self.routed[0](x) + self.shared(x)


def layers(group, dtype, **options):
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(16, 20, dtype=dtype), nn.SiLU(), nn.Linear(20, 16, dtype=dtype))
    router = Fixed().to(dtype)
    with_shared = MoELayer(group, 24, router=router, dtype=dtype, options=LayerOptions(shared=shared, **options))
    return with_shared, Summed(MoELayer(group, 24, router=router, dtype=dtype), shared)


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (0, 16)], ids=str)
def test_it_is_added(group, shape):
    layer, summed = layers(group, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    want = stepped(summed, x)
    got = stepped(layer, x)
    assert got.keys() == want.keys()
    assert got["shared.0.weight"].any() == (x.numel() > 0)
    for name, value in want.items():
        if value is not None:  # of the router
            torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_takes_part_in_autocast(group, dtype):
    layer, summed = layers(group, dtype)
    x = torch.randn(5, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = layer(x), summed(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_its_parameters_are_replicated(group):
    layer, _ = layers(group, torch.float32)
    shared = {id(p) for p in layer.options.shared.parameters()}
    assert len(shared) == 4
    assert shared <= {id(p) for p in layer.replicated_parameters()}
    assert {name for name in layer.state_dict() if name.startswith("shared")} == {
        f"shared.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")
    }


def test_a_result_of_another_shape_is_refused(group, monkeypatch):
    layer = MoELayer(group, 24, options=LayerOptions(shared=nn.Linear(16, 8)))
    monkeypatch.setattr(tokenferry.autograd, "dispatch", None)  # nothing must be sent
    with pytest.raises(tokenferry.ShapeError, match=r"shared: expected \[T, H\] = \[5, 16\] from it, got \[5, 8\]"):
        layer(torch.randn(5, 16))
