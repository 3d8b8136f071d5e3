"""torch.autocast and torch's defaults: what they change in routers and layers, and what they do not."""

import pytest
import torch

import tokenferry
from support.ambient import default_dtype
from support.sharded import EXPERT_NAMES
from tokenferry import MoeShape
from tokenferry.nn import GroupLimit, MoELayer, Router
from tokenferry.testing.compare import same_bits

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=32)


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE) as one:
        yield one


def rows(dtype=torch.float32):
    """Rows that bfloat16 can hold."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 12, 16, generator=generator).bfloat16().to(dtype)


def stepped(module, x):
    """Return the result and all gradients; backward runs in the same state as forward."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.float().square().sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def test_a_layer_under_autocast_is_the_layer_in_its_dtype(group):
    """Rows travel and experts compute in bfloat16; gradients have the dtype of their parameters."""
    narrow = stepped(MoELayer(group, 32, seed=1, dtype=torch.bfloat16), rows(torch.bfloat16))
    layer = MoELayer(group, 32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        wide = stepped(layer, rows())
    assert wide["out"].dtype == torch.bfloat16
    assert {wide[name].dtype for name in ("x", *EXPERT_NAMES, "router.weight")} == {torch.float32}
    for name in ("out", *EXPERT_NAMES):
        same_bits(name, wide[name].bfloat16(), narrow[name])
    same_bits("router.weight", wide["router.weight"], narrow["router.weight"])


def test_a_layer_follows_a_linear_under_autocast(group):
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), MoELayer(group, 32), torch.nn.Linear(16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(rows())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_autocast_leaves_float64_alone(group):
    layer = MoELayer(group, 32, dtype=torch.float64)
    want = stepped(layer, rows(torch.float64))
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        got = stepped(layer, rows(torch.float64))
        with pytest.raises(tokenferry.ShapeError, match=r"expected torch.float64 like the experts, got torch.bfloat16"):
            layer(rows())
    for name in want:
        same_bits(name, got[name], want[name])


class Weights(torch.nn.Module):
    """A router as a module with one result."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        routing = self.router(x)
        return routing.topk_weights * (1 + routing.topk_idx)


@pytest.mark.parametrize("limit", [None, GroupLimit(2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_router_computes_in_float32_under_autocast(limit, dtype):
    router, x = Router(16, 4, 2, group_limit=limit), rows(dtype)[0]
    want = stepped(Weights(router), x)
    router.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        got = stepped(Weights(router), x)
    for name in want:
        same_bits(name, got[name], want[name])


def test_compiled_layers_keep_to_it(group):
    layer = MoELayer(group, 32)
    with torch._dynamo.config.patch(capture_scalar_outputs=True), torch.autocast("cpu", torch.bfloat16):
        want = layer(rows())
        got = torch.compile(layer, backend="aot_eager", fullgraph=True)(rows())
    same_bits("compiled", got, want)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_a_seed_gives_the_same_bits_under_all_defaults(group, default):
    want = MoELayer(group, 32, seed=1, dtype=torch.float32).state_dict()
    with default_dtype(default):
        got = MoELayer(group, 32, seed=1, dtype=torch.float32).state_dict()
        narrow = MoELayer(group, 32, seed=1)
    for name in want:
        same_bits(name, got[name], want[name])
    assert (narrow.experts.gate.dtype, narrow.router.weight.dtype) == (default, torch.float32)
    same_bits("gate", narrow.experts.gate, want["experts.gate"].to(default))


@pytest.mark.parametrize("limit", [None, GroupLimit(2, 1)])
def test_a_layer_made_on_meta_is_the_same_layer(group, limit):
    def made():
        router = limit and Router(16, 4, 2, group_limit=limit, seed=3)
        return MoELayer(group, 32, router=router, seed=1)

    want = made()
    with torch.device("meta"):
        layer = made()
        layer.reset_parameters()
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device=group.device)
    for tensor in layer.state_dict().values():
        tensor.fill_(7.0)
    layer.reset_parameters()
    for name, value in want.state_dict().items():
        same_bits(name, layer.state_dict()[name], value)
    same_bits("out", layer(rows()), want(rows()))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_rows_take_the_experts_along(group, narrow):
    """As FSDP2 casts the rest of a model; gradients have the dtype of their parameters."""
    layer, x = MoELayer(group, 32, seed=1), rows(narrow)
    got = stepped(layer, x)
    want = stepped(MoELayer(group, 32, seed=1, dtype=narrow), x)
    assert {got[name].dtype for name in EXPERT_NAMES} == {torch.float32}
    for name in want:
        same_bits(name, got[name].to(want[name].dtype), want[name])


def test_a_router_is_made_on_the_default_device():
    with torch.device("meta"):
        router = Router(16, 4, 2, group_limit=GroupLimit(1, 1))
    assert {tensor.device.type for tensor in router.state_dict().values()} == {"meta"}
    assert router(torch.empty(3, 16, dtype=torch.float32, device="meta")).topk_idx.shape == (3, 2)
