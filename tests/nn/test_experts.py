"""Experts as modules: ours, by loops and by grouped products, and those of a user."""

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tokenferry
from support import experts_jobs as jobs
from tokenferry import DispatchOptions, Layout, MoeShape
from tokenferry.nn import GELUExperts, GroupLimit, LayerOptions, MoELayer, Router, SwiGLUExperts, by_expert
from tokenferry.testing.compare import same_bits

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=12)
ON_DEVICE = LayerOptions(dispatch=DispatchOptions(Layout.EXPERTS, counts="device"))
OFFSETS = (0, 3, 3, 10, 12)
"""An expert without rows, and two rows past the end that hold no data."""


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as one:
        yield one


def silu_of(row, experts, e):
    return (F.silu(row @ experts.gate[e]) * (row @ experts.up[e])) @ experts.down[e]


def gelu_of(row, experts, e):
    return F.gelu(row @ experts.up[e]) @ experts.down[e]


KINDS = [(SwiGLUExperts, silu_of), (GELUExperts, gelu_of)]


@pytest.mark.parametrize(("kind", "formula"), KINDS, ids=["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_each_expert_gets_its_rows(group, kind, formula, dtype, index):
    """Rows past the end change no result and no gradient of an expert."""
    experts = kind(group, 24, seed=3, dtype=dtype)
    rows = torch.randn(14, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[12:] = torch.nan
    rows.requires_grad_()
    out = experts(rows, torch.tensor(OFFSETS, dtype=index))
    owners = [0] * 3 + [2] * 7 + [3] * 2
    want = torch.cat([formula(rows[i : i + 1], experts, e) for i, e in enumerate(owners)])
    assert out.shape == (14, 16)
    found = torch.autograd.grad(out[:12].sum(), [rows, *experts.parameters()])
    right = torch.autograd.grad(want.sum(), [rows, *experts.parameters()], materialize_grads=True)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(out[:12], want, **tolerance)
    for got, wanted in zip(found[1:], right[1:], strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(found[0][:12], right[0][:12], **tolerance)


def test_grouped_products_are_used_and_can_be_differentiated_twice(group, monkeypatch):
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    rows, offsets = torch.randn(12, 16).bfloat16().requires_grad_(), torch.tensor(OFFSETS, dtype=torch.int32)
    wide, narrow, odd = (GELUExperts(group, n, dtype=dtype) for n, dtype in WIDTHS)
    for experts, used in ((wide, 0), (narrow, 2), (odd, 0)):
        del calls[:]
        out = experts(rows.to(experts.up.dtype), offsets)
        assert len(calls) == used
        (first,) = torch.autograd.grad(out.sum(), rows, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), experts.up)[0].any()
    loop = torch.cat([gelu_of(rows[a:b], narrow, e) for e, (a, b) in enumerate(itertools.pairwise(OFFSETS))])
    same_bits("out", narrow(rows, offsets), loop)
    assert narrow(rows[:0], torch.zeros(5, dtype=torch.int32)).shape == (0, 16)


WIDTHS = [(24, torch.float32), (24, torch.bfloat16), (20, torch.bfloat16)]


def test_nothing_is_read_on_the_host_where_products_are_grouped(group):
    """A fake tensor has no value to read."""
    layer = MoELayer(group, 24, dtype=torch.bfloat16, options=ON_DEVICE)
    wide = MoELayer(group, 24, dtype=torch.float32, options=ON_DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(3, 16, dtype=torch.bfloat16)).shape == (3, 16)
        with pytest.raises(DataDependentOutputException):
            wide(torch.empty(3, 16, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_on_the_device_change_nothing(group, dtype):
    x = torch.randn(5, 16).to(dtype)
    want = jobs.stepped(MoELayer(group, 24, dtype=dtype), x)
    aligned = LayerOptions(dispatch=DispatchOptions(Layout.EXPERTS, alignment=8, counts="device", capacity=40))
    for options in (ON_DEVICE, aligned):
        got = jobs.stepped(MoELayer(group, 24, dtype=dtype, options=options), x)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
    with pytest.raises(tokenferry.CapacityError):
        MoELayer(
            group, 24, options=LayerOptions(dispatch=DispatchOptions(Layout.EXPERTS, counts="device", capacity=1))
        )(torch.randn(5, 16))


@pytest.mark.parametrize("options", [LayerOptions(), ON_DEVICE], ids=["host", "device"])
def test_grouped_products_compile_as_one_graph(group, options):
    layer = MoELayer(group, 24, dtype=torch.bfloat16, options=options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for num_tokens in (6, 3):
        x = torch.randn(num_tokens, 16).bfloat16()
        want = jobs.stepped(layer, x)
        for name, value in jobs.stepped(compiled, x).items():
            same_bits(name, value, want[name.removeprefix("_orig_mod.")])


def test_experts_of_a_user_on_two_ranks_are_those_of_one_process(worlds):
    """Parameters, gradients, results, and what a checkpoint holds, of a module that knows nothing of ranks."""
    with tokenferry.ExpertGroup(None, jobs.SHAPE, backend="cpu") as alone:
        layer = jobs.custom_layer(alone)
        parts = [jobs.rows_of(rank) for rank in range(2)]
        out = [layer(part) for part in parts]
        torch.stack([one.square().mean() for one in out]).mean().backward()
    results = worlds(2).run(jobs.custom)
    torch.testing.assert_close(torch.cat([got["out"] for got in results]), torch.cat(out).detach(), rtol=1e-12, atol=0)
    for got in results:
        experts = dict(layer.experts.named_parameters(prefix="experts"))
        assert {name for name in got if name.startswith("grad")} == {f"grad {name}" for name in experts}
        for name, value in layer.state_dict().items():
            assert torch.equal(got[f"state {name}"], value), name
        for name, parameter in experts.items():
            torch.testing.assert_close(got[f"grad {name}"], parameter.grad, rtol=1e-12, atol=1e-14)


def test_our_experts_do_not_depend_on_the_ranks(worlds):
    with tokenferry.ExpertGroup(None, jobs.SHAPE, backend="cpu") as alone:
        want = GELUExperts(alone, 24, seed=5).state_dict()
    assert want["up"].unique().numel() > 0.99 * want["up"].numel(), "experts must differ"
    for got in worlds(2).run(jobs.drawn):
        for name, value in want.items():
            same_bits(name, got[name], value)


def made(**changes):
    def make(group):
        return MoELayer(group, **{"experts": nn.Linear(16, 4), **changes})

    return make


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))


def tied(group):
    experts = SwiGLUExperts(group, 24)
    experts.up = experts.gate
    return MoELayer(group, experts=experts)


BAD_LAYERS = (
    (made(ffn_hidden=24), "experts: expected either ffn_hidden or a module of experts"),
    (made(experts=None), "experts: expected either ffn_hidden or a module of experts"),
    (made(dtype=torch.float32), "dtype=torch.float32 is that of experts that the layer makes"),
    (
        made(experts=nn.Linear(16, 5)),
        r"weight: expected the L=4 experts of this rank as the first dimension, got \[5, 16",
    ),
    (tied, "experts: gate and up are one parameter; keep one of the names"),
    (made(experts=Counting()), r"expected no buffers in the state_dict, got \['seen'\]"),
    (lambda group: GELUExperts(group, 0), "GELUExperts: ffn_hidden: expected a positive integer, got 0"),
    (lambda group: SwiGLUExperts(group, 8, seed=-1), "SwiGLUExperts: seed: .* got -1"),
    (made(options=DispatchOptions()), "options: expected a LayerOptions or None, got DispatchOptions"),
    (lambda group: Router(16, 4, 2, options=LayerOptions()), "options: expected a RouterOptions or None, got LayerOpt"),
    (lambda group: LayerOptions(shared=4), r"shared: expected a torch\.nn\.Module or None, got int"),
    (lambda group: LayerOptions(dispatch=DispatchOptions()), r"dispatch: expected Layout.EXPERTS, got Layout.ROWS"),
)


@pytest.mark.parametrize(("make", "message"), BAD_LAYERS, ids=[message for _, message in BAD_LAYERS])
def test_what_is_refused(group, make, message):
    with pytest.raises(tokenferry.ConfigError, match=message):
        make(group)


def test_weights_that_are_no_matrices_are_refused():
    rows, offsets = torch.zeros(3, 16), torch.tensor([0, 1, 3])
    for weights in (torch.zeros(2, 16), torch.zeros(3, 16, 8)):
        with pytest.raises(
            tokenferry.ShapeError, match=r"weights\[1\]: expected \[L, I, O\] with L=2 from the offsets"
        ):
            by_expert(lambda product, x, a, b: x, rows, offsets, torch.zeros(2, 16, 8), weights)


def test_reset_draws_our_experts_and_leaves_others_alone(group):
    mine, ours = nn.Linear(16, 4), GELUExperts(group, 24, seed=2)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    router = Router(16, 4, 2, group_limit=GroupLimit(1, 1))
    for experts in (mine, ours):
        layer = MoELayer(group, experts=experts, router=router)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(7.0)
        layer.reset_parameters()
    assert mine.weight.eq(7.0).all()
    for name, value in before.items():
        same_bits(name, ours.state_dict()[name], value)
    with torch.device("meta"):
        assert {p.device.type for p in MoELayer(group, experts=GELUExperts(group, 24)).parameters()} == {"meta"}
