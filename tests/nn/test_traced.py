"""The ops under torch.compile, on fake tensors, and under torch.library's own checks."""

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tokenferry
from support.deep_ep_jobs import on_nodes
from tokenferry import DispatchOptions, Layout, MoeShape, Plan, Quantized, Routing, autograd

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=4, max_tokens=8)
HOST = (DispatchOptions(), DispatchOptions(Layout.EXPERTS, alignment=4), DispatchOptions(Layout.MASKED, capacity=8))
DEVICE = (
    DispatchOptions(counts="device"),
    DispatchOptions(Layout.EXPERTS, alignment=4, counts="device"),
    DispatchOptions(Layout.MASKED, counts="device"),
)


def name(options):
    return f"{options.layout.value}-{options.counts}"


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE) as group:
        yield group


def inputs(rank, num_tokens):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_tokens, SHAPE.hidden, generator=generator)
    weights = torch.rand(num_tokens, SHAPE.top_k, generator=generator)
    return x, weights, torch.randint(-1, SHAPE.num_experts, (num_tokens, SHAPE.top_k), generator=generator)


def layer(group, options, x, weights, topk_idx):
    """Both directions and a redispatch, with weights sent both ways."""
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
    home = autograd.combine(group, sent.x.tanh(), sent.plan, topk_weights=sent.topk_weights, bias=x)
    again = autograd.redispatch(group, home.x, sent.plan, topk_weights=home.topk_weights)
    gates = again.topk_weights.sum(-1, keepdim=True) if sent.topk_idx is not None else again.topk_weights.unsqueeze(-1)
    return autograd.combine(group, again.x * gates, sent.plan).x


def gradients(function, num_tokens, rank=0):
    x, weights, topk_idx = inputs(rank, num_tokens)
    x.requires_grad_()
    weights.requires_grad_()
    out = function(x, weights, topk_idx)
    out.square().sum().backward()
    return out.detach(), x.grad, weights.grad


def _compiled_equals_eager(rank, pg, options, backend):
    with tokenferry.ExpertGroup(pg, SHAPE) as group:

        def eager(x, weights, topk_idx):
            return layer(group, options, x, weights, topk_idx)

        compiled = torch.compile(eager, fullgraph=True, backend=backend)
        for num_tokens in (5 - rank, 8 - rank):  # the second makes T a dynamic size
            for got, want in zip(
                gradients(compiled, num_tokens, rank), gradients(eager, num_tokens, rank), strict=True
            ):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", [*HOST, *DEVICE], ids=name)
def test_compile_fullgraph(options):
    _compiled_equals_eager(0, None, options, "aot_eager")


def test_compile_fullgraph_between_ranks(worlds):
    worlds(2).run(_compiled_equals_eager, DispatchOptions(Layout.EXPERTS, alignment=4), "aot_eager")


def test_compile_fullgraph_between_nodes(worlds):
    """Where the plan has a tensor whose size only the routing decides."""
    worlds(4).run(on_nodes, 2, _compiled_equals_eager, DispatchOptions(Layout.EXPERTS, alignment=4), "aot_eager")


@pytest.mark.parametrize("num_tokens", [5, 0])
def test_generated_code_keeps_the_order_of_calls(group, monkeypatch, num_tokens):
    """Inductor sorts what does not depend on each other as sizes suggest, and sizes differ between ranks.

    And without tokens nothing depends on the results: all that is made of them is empty, or zero.
    """
    calls = []

    def record(one, name, call):
        actual = getattr(one, call)

        def recorded(*args, **kwargs):
            calls.append(f"{call} {name}")
            return actual(*args, **kwargs)

        monkeypatch.setattr(one, call, recorded)

    with tokenferry.ExpertGroup(None, SHAPE) as other:
        for name, one in (("a", group), ("b", other)):
            for call in ("dispatch", "redispatch", "combine"):
                record(one, name, call)

        def side_by_side(x, weights, topk_idx):
            def home(one):
                sent = autograd.dispatch(one, x, Routing(topk_idx, weights), options=DispatchOptions(Layout.EXPERTS))
                return autograd.combine(one, sent.x.tanh() * sent.topk_weights[:, None], sent.plan).x

            return home(group) + home(other)

        want = gradients(side_by_side, num_tokens)
        order, calls[:] = calls[:], []
        assert [call[-1] for call in order] == list("aabbbbaa")
        with (  # caches may have code from before a change
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            got = gradients(torch.compile(side_by_side, fullgraph=True), num_tokens)
        assert calls == order
        for one, wanted in zip(got, want, strict=True):
            torch.testing.assert_close(one, wanted)


def test_a_compiled_function_may_return_what_dispatch_returns(group):
    x, weights, topk_idx = inputs(0, 5)
    options = DispatchOptions(Layout.EXPERTS)

    def function(x, weights):
        return autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)

    got = torch.compile(function, fullgraph=True, backend="eager")(x, weights)
    want = function(x, weights)
    assert torch.equal(got.x, want.x)
    assert torch.equal(got.expert_offsets, want.expert_offsets)
    assert (got.host_counts, want.host_counts) == (None, tuple(want.expert_counts.tolist()))
    assert torch.equal(group.combine(got.x, got.plan).x, group.combine(want.x, want.plan).x)


def shapes(sent):
    return {
        "x": sent.x.shape,
        "topk_weights": sent.topk_weights.shape,
        "expert_counts": sent.expert_counts.shape,
        **{field: getattr(sent.plan, field).shape for field in ("dst_token", "src_token", "topk_idx", "row_idx")},
    }


@pytest.mark.parametrize("options", DEVICE, ids=name)
def test_fake_tensors_have_the_true_shapes_with_device_counts(group, options):
    x, weights, topk_idx = inputs(0, 5)
    true = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
    with FakeTensorMode() as mode:
        x, weights, topk_idx = (mode.from_tensor(t) for t in (x, weights, topk_idx))
        fake = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
        assert shapes(fake) == shapes(true)
        assert fake.host_counts is None
        again = autograd.redispatch(group, x, fake.plan, topk_weights=weights)
        assert again.x.shape == true.x.shape
        home = autograd.combine(group, fake.x, fake.plan, topk_weights=fake.topk_weights)
        assert (home.x.shape, home.topk_weights.shape) == ((5, 4), (5, 2))


@pytest.mark.parametrize("options", HOST, ids=name)
def test_fake_tensors_have_a_dynamic_number_of_rows_with_host_counts(group, options):
    x, weights, topk_idx = inputs(0, 5)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, weights, topk_idx = (mode.from_tensor(t) for t in (x, weights, topk_idx))
        fake = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
        assert isinstance(fake.plan.src_token.shape[0], torch.SymInt)
        assert (fake.x.dtype, fake.x.shape[-1], fake.host_counts) == (torch.float32, 4, None)
        if options.layout is Layout.MASKED:
            assert fake.x.shape == (4, 8, 4)
        assert autograd.combine(group, fake.x, fake.plan).x.shape == (5, 4)


# opcheck tests that the schema of an op is right, that autograd is registered correctly, that the fake implementation
# agrees with the real one, and that both agree when traced with dynamic sizes, gradients included.
@pytest.mark.parametrize("options", [*HOST, *DEVICE], ids=name)
@pytest.mark.parametrize("quantized", [False, True])
def test_opcheck(group, options, quantized):
    x, weights, topk_idx = inputs(0, 5)
    weights.requires_grad_()
    scale = torch.rand(5, 3) if quantized else None
    x = x.repeat(1, 2) if quantized else x.requires_grad_()
    ops = autograd.ops
    where, sizes = ops.pack(group, group.key, options, 0, 0)
    torch.library.opcheck(ops.dispatch, (x, scale, topk_idx, weights, where, sizes))

    rows = x if scale is None else Quantized(x, scale)
    sent = autograd.dispatch(group, rows, Routing(topk_idx, weights), options=options)
    where, sizes = ops.pack(group, group.key, sent.plan.options, 5, sent.plan.num_delivered)
    plan = ops.tensors_of(sent.plan)
    torch.library.opcheck(ops.redispatch, (x, scale, weights, plan, where, sizes))
    if not quantized:
        y = sent.x.detach().requires_grad_()
        row_weights = sent.topk_weights.detach().requires_grad_()
        bias = torch.randn(5, 4, requires_grad=True)
        torch.library.opcheck(ops.combine, (y, row_weights, [bias], plan, where, sizes))
        torch.library.opcheck(ops.combine, (y.detach(), None, [], plan, where, sizes))


class OneBlock:
    """A backend whose results are views of one block a call, as they are where peers write into shared memory."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.blocks: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def dispatch(self, request: Any) -> Any:
        return self._pack(self._backend.dispatch(request))

    def redispatch(self, request: Any) -> Any:
        return self._pack(self._backend.redispatch(request))

    def combine(self, request: Any) -> Any:
        return self._pack(self._backend.combine(request))

    def _pack(self, result: Any) -> Any:
        self._block = torch.zeros(1 << 16, dtype=torch.uint8)
        self._end = 64
        self.blocks.append(self._block.data_ptr())
        return self._moved(result)

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            begin, self._end = self._end, self._end + -(-value.nbytes // 16) * 16
            piece = self._block[begin : begin + value.nbytes].view(value.dtype).view(value.shape)
            return piece.copy_(value)
        if isinstance(value, Plan | Quantized | tokenferry.Dispatched | tokenferry.Combined):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return type(value)(**{name: self._moved(field) for name, field in fields.items()})
        return value


@pytest.mark.parametrize("options", [*HOST, *DEVICE], ids=name)
def test_results_that_share_one_block(group, options, monkeypatch):
    """torch refuses ops whose results alias; they must not be copied for that, as they are the largest tensors."""
    want = gradients(lambda *args: layer(group, options, *args), 5)
    monkeypatch.setattr(group, "_backend", backend := OneBlock(group._backend))
    for got, wanted in zip(gradients(lambda *args: layer(group, options, *args), 5), want, strict=True):
        assert torch.equal(got, wanted)
    for quantized in (False, True):
        test_opcheck(group, options, quantized)

    x, weights, topk_idx = inputs(0, 5)
    del backend.blocks[:]
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
    block = backend.blocks[0]
    assert block <= sent.x.data_ptr() < block + (1 << 16), "the rows were copied"
    del backend._block
    keep = sent.x.clone()
    torch.full((1 << 16,), 255, dtype=torch.uint8)  # takes the block's place, if nothing kept it
    assert torch.equal(sent.x, keep)
