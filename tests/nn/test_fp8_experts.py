"""Products of experts in FP8: by plain loops, their gradients, and the calls that GPUs get."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenferry
from support import experts_jobs as jobs
from tokenferry import MoeShape, Scale
from tokenferry.nn import GELUExperts, LayerOptions, MoELayer, SwiGLUExperts, by_expert, fp8_products
from tokenferry.testing.compare import same_bits

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=12)
OFFSETS = torch.tensor((0, 3, 3, 10, 12))
"""An expert without rows."""
OWNERS = [0] * 3 + [2] * 7 + [3] * 2


def linear(product, rows, weight):
    return product(rows, weight)


def drawn(*sizes: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(sizes, generator=generator) * torch.randn(sizes, generator=generator).exp()).to(dtype)


def e4m3(x: float) -> float:
    """Round to the nearest number of 4 bits of exponent and 3 of mantissa, halves to even."""
    if x == 0:
        return 0.0
    unit = 2.0 ** (max(math.frexp(x)[1] - 1, -6) - 3)
    return round(x / unit) * unit


def in_fp8(numbers: list[float]) -> tuple[list[float], float]:
    """Return e4m3 numbers and their scale, which is a float32."""
    scale = (torch.tensor(max(*map(abs, numbers), 2.0**-100)) / torch.tensor(448.0)).item()
    return [e4m3((torch.tensor(x) / torch.tensor(scale)).item()) for x in numbers], scale


def product_by_loops(rows: Tensor, weights: Tensor, owners: list[int]) -> Tensor:
    """Return the product in float64, with rows and columns cast as the documents say."""
    out = torch.zeros(len(owners), weights.shape[2], dtype=torch.float64)
    for i, expert in enumerate(owners):
        row, row_scale = in_fp8(rows[i].float().tolist())
        for o in range(weights.shape[2]):
            column, scale = in_fp8(weights[expert, :, o].float().tolist())
            out[i, o] = sum(a * b for a, b in zip(row, column, strict=True)) * row_scale * scale
    return out


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)], ids=str)
def test_a_product_is_that_of_plain_loops(dtype, bound):
    rows, weights = drawn(12, 16, seed=0, dtype=dtype), drawn(4, 16, 9, seed=1, dtype=dtype)
    rows[4], rows[5] = 0, rows[5] * 2.0**-60
    out = by_expert(linear, rows, OFFSETS, weights, fp8=True)
    want = product_by_loops(rows, weights, OWNERS)
    assert out.dtype == dtype
    assert not out[4].any()
    size = want.abs().amax(dim=1, keepdim=True)
    assert ((out - want).abs() <= bound * size).all()
    exact = torch.stack([rows[i].double() @ weights[e].double() for i, e in enumerate(OWNERS)])
    off = (out - exact).norm() / exact.norm()
    assert 5e-3 < off < 6e-2, "three bits of mantissa"


def test_what_is_not_finite_stays_in_its_row_and_column():
    rows, weights = drawn(12, 16, seed=0), drawn(4, 16, 8, seed=1)
    want = by_expert(linear, rows, OFFSETS, weights, fp8=True)
    rows[1, 3], rows[11, 0], weights[2, 5, 6] = torch.inf, torch.nan, -torch.inf
    out = by_expert(linear, rows, OFFSETS, weights, fp8=True)
    bad = torch.zeros(12, 8, dtype=torch.bool)
    bad[1] = bad[11] = bad[3:10, 6] = True
    assert out.isnan().equal(bad)
    assert out[~bad].equal(want[~bad])


def test_rows_past_the_end_and_no_rows():
    rows, weights = drawn(14, 16, seed=0), drawn(4, 16, 8, seed=1)
    rows[12:] = torch.nan
    out = by_expert(linear, rows, OFFSETS, weights, fp8=True)
    assert out.shape == (14, 8)
    assert out[:12].equal(by_expert(linear, rows[:12], OFFSETS, weights, fp8=True))
    assert by_expert(linear, rows[:0], torch.zeros(5, dtype=torch.int64), weights, fp8=True).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_without_the_cast(dtype):
    """Also the gradients of gradients."""
    found = []
    for fp8 in (False, True):
        rows, weights = drawn(12, 16, seed=0, dtype=dtype), drawn(4, 16, 12, seed=1, dtype=dtype)
        upstream = drawn(12, 12, seed=2, dtype=dtype).requires_grad_()
        inputs = rows.requires_grad_(), weights.requires_grad_()
        out = by_expert(linear, rows, OFFSETS, weights, fp8=fp8)
        first = torch.autograd.grad(out, inputs, upstream, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (*inputs, upstream))
        found.append((*first, *second))
    for plain, cast in zip(*found, strict=True):
        torch.testing.assert_close(cast, plain, rtol=1e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-4)


@pytest.mark.parametrize("kind", [SwiGLUExperts, GELUExperts])
def test_every_product_of_our_experts_is_cast(group, kind):
    experts = kind(group, 24, seed=3, fp8=True)
    rows = drawn(12, 16, seed=4)

    def product(x, name):
        return product_by_loops(x, getattr(experts, name).detach(), OWNERS).float()

    up = product(rows, "up")
    hidden = F.silu(product(rows, "gate")) * up if kind is SwiGLUExperts else F.gelu(up)
    # A number that float32 rounds otherwise may become another FP8 number.
    torch.testing.assert_close(experts(rows, OFFSETS), product(hidden, "down"), rtol=0, atol=2e-2)
    assert not kind(group, 24, seed=3)(rows, OFFSETS).allclose(experts(rows, OFFSETS), rtol=0, atol=2e-2)
    assert [p.dtype for p in experts.parameters()] == [torch.float32] * len(list(experts.parameters()))


@pytest.mark.parametrize("quantize", [None, Scale.FLOAT32])
def test_a_layer_trains_with_it(group, quantize):
    """Losses are near those without FP8; under autocast, products are cast from its dtype."""
    losses = {}
    for fp8 in (False, True):
        experts = SwiGLUExperts(group, 32, seed=1, fp8=fp8)
        layer = MoELayer(group, experts=experts, options=LayerOptions(quantize=quantize))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(5))
        losses[fp8] = []
        for _ in range(8):
            loss = (layer(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[fp8].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=3e-2)
    assert losses[True] != losses[False]
    assert losses[True][-1] < 0.95 * losses[True][0]


def test_autocast_casts_operands_and_no_more(group):
    layer = MoELayer(group, experts=GELUExperts(group, 32, seed=1, fp8=True))
    narrow = MoELayer(group, experts=GELUExperts(group, 32, seed=1, fp8=True, dtype=torch.bfloat16))
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))
    with torch.autocast("cpu", torch.bfloat16):
        found = jobs.stepped(layer, x)
    want = jobs.stepped(narrow, x.bfloat16())
    assert found["out"].dtype == torch.bfloat16
    same_bits("out", found["out"], want["out"])


def test_plain_fp8_products_of_torch_agree(monkeypatch):
    """`torch._scaled_mm`, which torch has for CPUs, too: as GPUs get it that have no grouped products in FP8."""
    rows = drawn(12, 16, seed=0, dtype=torch.bfloat16)
    weights = drawn(4, 16, 32, seed=1, dtype=torch.bfloat16)
    want = by_expert(linear, rows, OFFSETS, weights, fp8=True)
    calls = []
    real = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **how: calls.append(1) or real(*args, **how))
    monkeypatch.setattr(fp8_products, "_capability", lambda device: (8, 9))
    torch.testing.assert_close(by_expert(linear, rows, OFFSETS, weights, fp8=True), want, rtol=1e-2, atol=1e-3)
    assert len(calls) == 3, "none without rows"
    for other in (rows.float(), weights.float()), (rows[:, :8], weights[:, :8]), (rows, weights[..., :24]):
        by_expert(linear, other[0], OFFSETS, other[1], fp8=True)
    assert len(calls) == 3, "other dtypes, or an I or O that is no multiple of 16"


def test_grouped_fp8_products_get_what_they_ask_for(group, monkeypatch):
    """Torch's description of the operator checks layouts and scales, forward and backward; no value is read."""
    monkeypatch.setattr(fp8_products, "_capability", lambda device: (9, 0))
    calls = []
    real = torch._scaled_grouped_mm
    monkeypatch.setattr(torch, "_scaled_grouped_mm", lambda *args, **how: calls.append(args) or real(*args, **how))
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(14, 16, dtype=torch.bfloat16, requires_grad=True)
        offsets = torch.empty(5, dtype=torch.int64)
        weights = [torch.empty(4, *size, dtype=torch.bfloat16) for size in ((16, 32), (32, 16))]
        inputs = (rows, *(weight.requires_grad_() for weight in weights))
        out = by_expert(lambda product, x, up, down: product(product(x, up), down), rows, offsets, *weights, fp8=True)
        assert (out.shape, out.dtype) == ((14, 16), torch.bfloat16)
        found = torch.autograd.grad(out.sum(), inputs, create_graph=True)
        assert [g.shape for g in found] == [each.shape for each in inputs]
        assert [g.dtype for g in found] == [torch.bfloat16] * 3
        torch.autograd.grad(sum(g.sum() for g in found), inputs)
    assert len(calls) == 2
    q_rows, q_weights, scale, weight_scale = calls[0]
    assert q_rows.dtype == q_weights.dtype == torch.float8_e4m3fn
    assert (scale.shape, weight_scale.shape) == ((14,), (4, 32))


def test_grouped_fp8_products_and_their_gradients(monkeypatch):
    """With a stand-in for the operator, which torch has for GPUs only; gradients are grouped products of bfloat16."""

    def stand_in(rows, weights, scale, weight_scale, *, offs, out_dtype):
        starts = [0, *offs.tolist()]
        out = torch.full((len(rows), weights.shape[2]), torch.nan, dtype=out_dtype)
        for e, (a, b) in enumerate(itertools.pairwise(starts)):
            out[a:b] = (rows[a:b].float() @ weights[e].float()) * scale[a:b, None] * weight_scale[e]
        return out

    found = {}
    for how in ("one by one", "grouped", "without"):
        rows = drawn(14, 16, seed=0, dtype=torch.bfloat16)
        rows[12:] = torch.nan
        inputs = rows.requires_grad_(), drawn(4, 16, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
        if how == "grouped":
            monkeypatch.setattr(torch, "_scaled_grouped_mm", stand_in)
            monkeypatch.setattr(fp8_products, "_capability", lambda device: (9, 0))
        out = by_expert(linear, inputs[0], OFFSETS, inputs[1], fp8=how != "without")
        grads = torch.autograd.grad(out[:12].sum(), inputs)
        found[how] = (out[:12], grads[0][:12], grads[1])
    for grouped, plain in zip(found["grouped"], found["one by one"], strict=True):
        torch.testing.assert_close(grouped, plain, rtol=1e-2, atol=1e-2)
    for grouped, without in zip(found["grouped"][1:], found["without"][1:], strict=True):
        same_bits("gradient", grouped, without)
