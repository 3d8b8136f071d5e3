"""Rows that are cast to FP8 only for the way to the experts: values, and gradients straight through the cast."""

import pytest
import torch

import tokenferry
from support.experts_jobs import stepped
from tokenferry import DispatchOptions, Layout, MoeShape, Quantized, Routing, Scale, autograd
from tokenferry.formats import fp8
from tokenferry.nn import LayerOptions, MoELayer, Router
from tokenferry.testing.compare import same_bits

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=144, max_tokens=8)
OPTIONS = (
    DispatchOptions(),
    DispatchOptions(counts="device"),
    DispatchOptions(Layout.EXPERTS, alignment=4),
    DispatchOptions(Layout.EXPERTS, counts="device"),
    DispatchOptions(Layout.MASKED, capacity=8),
)


def name(options):
    return f"{options.layout.value}-{options.counts}"


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


def inputs(rank=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5 - rank, SHAPE.hidden, generator=generator).to(dtype)
    weights = torch.rand(5 - rank, SHAPE.top_k, generator=generator)
    return x, weights, torch.randint(-1, SHAPE.num_experts, (5 - rank, SHAPE.top_k), generator=generator)


def there_and_back(group, options, quantize, tensors):
    """Return what arrives, and the gradients; everything is linear, so that the cast changes none of them."""
    x, weights, topk_idx = tensors
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options, quantize=quantize)
    out = autograd.combine(group, 3 * sent.x, sent.plan, topk_weights=sent.topk_weights)
    head = torch.linspace(-1, 1, SHAPE.hidden)
    (out.x.float() * head).sum().add(out.topk_weights.square().sum()).backward()
    return {"x": sent.x.detach(), "grad": x.grad, "weights": weights.grad}


def rounded(x, scale):
    return fp8.dequantize(fp8.cast(x, scale)).to(x.dtype)


def _one_case(rank, pg, options, scale, dtype):
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        x, weights, topk_idx = inputs(rank, dtype)
        got = there_and_back(group, options, scale, (x, weights, topk_idx))
        want = there_and_back(group, options, None, (rounded(x, scale), weights, topk_idx))
        for key, value in want.items():
            same_bits(key, got[key], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_rows_arrive_as_fp8_has_them(options, dtype):
    for scale in Scale:
        _one_case(0, None, options, scale, dtype)


def test_between_ranks(worlds):
    worlds(2).run(_one_case, OPTIONS[2], Scale.UE8M0, torch.bfloat16)


def test_bytes_travel_and_gradients_do_not(group, monkeypatch):
    """Rows leave as FP8; their gradients come back in their dtype, in one call."""
    sent, back = [], []
    dispatch, combine = group.dispatch, group.combine
    monkeypatch.setattr(group, "dispatch", lambda x, *args, **kwargs: sent.append(x) or dispatch(x, *args, **kwargs))
    monkeypatch.setattr(group, "combine", lambda y, *args, **kwargs: back.append(y) or combine(y, *args, **kwargs))
    layer = MoELayer(group, 24, dtype=torch.bfloat16, options=LayerOptions(quantize=Scale.FLOAT32))
    layer(inputs()[0].requires_grad_()).float().sum().backward()
    assert [type(x) for x in sent] == [Quantized]
    assert sent[0].data.dtype == torch.float8_e4m3fn
    assert [y.dtype for y in back] == [torch.bfloat16] * 2
    assert all(y.shape[1] == SHAPE.hidden for y in back)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_learns_from_rounded_rows(group, compiled):
    """Experts see rounded rows, the router exact ones; gradients are those at the rounded rows."""
    x = inputs()[0]
    with torch.no_grad():
        routing = Router(SHAPE.hidden, 4, 2)(x)
    options = LayerOptions(quantize=Scale.POWER_OF_TWO)
    layer = MoELayer(group, 24, router=lambda rows: routing, dtype=torch.bfloat16, options=options)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    got = stepped(run, x)
    plain = MoELayer(group, experts=layer.experts, router=lambda rows: routing)
    want = stepped(plain, rounded(x, Scale.POWER_OF_TWO))
    assert not torch.equal(want["out"], stepped(plain, x)["out"])
    for key in ("out", "x", "experts.gate"):
        same_bits(key, got[f"_orig_mod.{key}" if compiled and "." in key else key], want[key])


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_opcheck(group, options):
    x, weights, topk_idx = inputs()
    where, sizes = autograd.ops.pack(group, group.key, options, 0, 0)
    where = autograd.ops.with_cast(where, Scale.UE8M0)
    arguments = (x.requires_grad_(), None, topk_idx, weights.requires_grad_(), where, sizes)
    torch.library.opcheck(autograd.ops.dispatch, arguments)


def test_what_is_refused(group):
    x, weights, topk_idx = inputs()
    routing = Routing(topk_idx, weights)
    cases = (
        (fp8.cast(x, Scale.FLOAT32), Scale.FLOAT32, tokenferry.ArgumentError, r"x is a Quantized already"),
        (x, "float32", tokenferry.ArgumentError, r"quantize: expected a tokenferry\.Scale or None, got 'float32'"),
        (x[:, :128].contiguous(), Scale.FLOAT32, tokenferry.ShapeError, r"H=144 .*, got torch.bfloat16 \[5, 128\]"),
        (x.long(), Scale.FLOAT32, tokenferry.ShapeError, r"floating point .*, got torch.int64"),
    )
    for rows, quantize, error, message in cases:
        with pytest.raises(error, match=message):
            autograd.dispatch(group, rows, routing, quantize=quantize)
    with pytest.raises(tokenferry.ConfigError, match=r"quantize: expected a tokenferry\.Scale or None, got True"):
        LayerOptions(quantize=True)
