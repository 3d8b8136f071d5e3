"""The gradients of dispatch, redispatch and combine: each is the transpose of its forward over all ranks."""

import dataclasses
import gc

import pytest
import torch

import tokenferry
from support.autograd_ways import always_operators, plain_torch
from support.deep_ep_jobs import on_nodes
from tokenferry import DispatchOptions, Layout, MoeShape, Quantized, Routing, autograd

SHAPE = MoeShape(num_experts=8, top_k=3, hidden=4, max_tokens=6)
TOKENS = (5, 0, 6, 3)
DELIVERIES = (
    DispatchOptions(),
    DispatchOptions(counts="device"),
    DispatchOptions(counts="device", capacity=23),
    DispatchOptions(Layout.EXPERTS),
    DispatchOptions(Layout.EXPERTS, alignment=4),
    DispatchOptions(Layout.EXPERTS, alignment=4, counts="device"),
    DispatchOptions(Layout.MASKED),
    DispatchOptions(Layout.MASKED, counts="device", capacity=20),
)


def name(options):
    capacity = f"-{options.capacity}" if options.capacity else ""
    return f"{options.layout.value}-A{options.alignment}-{options.counts}{capacity}"


class Poisoned:
    """Within, memory that torch leaves uninitialised holds NaN, so that a read of it shows."""

    def __enter__(self):
        torch.use_deterministic_algorithms(True)
        assert torch.empty(4).isnan().all()

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


def inputs(rank, num_tokens, seed=0):
    """x in float64, and weights that float32 adds and multiplies exactly; -1, repeated experts, tokens without any."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    x = torch.randn(num_tokens, SHAPE.hidden, dtype=torch.float64, generator=generator)
    weights = torch.randint(1, 64, (num_tokens, SHAPE.top_k), generator=generator) / 16
    topk_idx = torch.randint(-1, SHAPE.num_experts, (num_tokens, SHAPE.top_k), generator=generator)
    topk_idx[num_tokens // 2 :][:1] = -1
    return x.requires_grad_(), weights.requires_grad_(), topk_idx


def live_rows(plan):
    """Return masks of the delivered rows that hold data, and of their weights, from the plan alone."""
    live = torch.zeros(plan.num_delivered, dtype=torch.bool)
    if plan.options.layout is Layout.ROWS:
        live[: int(plan.src_counts.sum())] = True
        return live, live.unsqueeze(1) & (plan.topk_idx >= 0)
    live[plan.row_idx[plan.row_idx >= 0]] = True
    live = live.view(plan.expert_counts.numel(), -1) if plan.options.layout is Layout.MASKED else live
    return live, live


def cotangent(like, live, generator):
    """Random eighths where there is data, NaN elsewhere."""
    values = torch.randint(-32, 32, like.shape, generator=generator) / 8
    return values.to(like.dtype).masked_fill(~(live if live.ndim == like.ndim else live.unsqueeze(-1)), torch.nan)


def dot(a, b):
    return float((a.double() * b.double()).nansum())


def _dispatch_is_transposed_by_its_backward(rank, pg, options, again):
    with tokenferry.ExpertGroup(pg, SHAPE) as group, Poisoned():
        x, weights, topk_idx = inputs(rank, TOKENS[rank] if pg else 6)
        sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
        if again:
            sent = autograd.redispatch(group, x, sent.plan, topk_weights=weights)
        live, live_weights = live_rows(sent.plan)
        raw = group.dispatch(x.detach(), Routing(topk_idx, weights.detach()), options=options)
        assert torch.equal(sent.x[live], raw.x[live])
        assert torch.equal(sent.topk_weights[live_weights], raw.topk_weights[live_weights])
        assert torch.equal(sent.plan.row_idx, raw.plan.row_idx)
        assert (sent.host_counts, sent.plan.num_received) == (raw.host_counts, raw.plan.num_received)
        assert not sent.x[~live].any(), "padding must be zero"
        assert not sent.topk_weights[~live_weights].any(), "padding must be zero"

        generator = torch.Generator().manual_seed(rank)
        to_rows = cotangent(sent.x, live, generator)
        to_weights = cotangent(sent.topk_weights, live_weights, generator)
        grad_x, grad_weights = torch.autograd.grad([sent.x, sent.topk_weights], [x, weights], [to_rows, to_weights])
        assert grad_x.isfinite().all()
        assert grad_weights.isfinite().all()
        return [
            (dot(to_rows, sent.x.detach()), dot(grad_x, x.detach())),
            (dot(to_weights, sent.topk_weights.detach()), dot(grad_weights, weights.detach())),
        ]


def _combine_is_transposed_by_its_backward(rank, pg, options):
    with tokenferry.ExpertGroup(pg, SHAPE) as group, Poisoned():
        x, weights, topk_idx = inputs(rank, TOKENS[rank] if pg else 6)
        sent = group.dispatch(x.detach(), Routing(topk_idx, weights.detach()), options=options)
        live, live_weights = live_rows(sent.plan)
        generator = torch.Generator().manual_seed(rank)
        y = cotangent(sent.x, live, generator).requires_grad_()
        row_weights = cotangent(sent.topk_weights, live_weights, generator).requires_grad_()
        biases = tuple(torch.randn_like(x).requires_grad_() for _ in range(2))
        home = autograd.combine(group, y, sent.plan, topk_weights=row_weights, bias=biases)
        assert home.x.isfinite().all()
        assert home.topk_weights.isfinite().all()

        to_x = torch.randint(-32, 32, home.x.shape, generator=generator) / 8.0
        to_weights = torch.randint(-32, 32, home.topk_weights.shape, generator=generator) / 8.0
        grad_y, grad_weights, *grad_biases = torch.autograd.grad(
            [home.x, home.topk_weights], [y, row_weights, *biases], [to_x.double(), to_weights]
        )
        assert not grad_y[~live].any(), "padding has no gradient"
        assert not grad_weights[~live_weights].any(), "padding has no gradient"
        assert all(torch.equal(grad, to_x.double()) for grad in grad_biases)
        no_bias = home.x.detach() - biases[0].detach() - biases[1].detach()
        return [
            (dot(to_x, no_bias), dot(grad_y, y.detach())),
            (dot(to_weights, home.topk_weights.detach()), dot(grad_weights, row_weights.detach())),
        ]


def _check_transposed(results):
    """<c, A v> = <A^T c, v>, summed over the ranks: for a random c and v only the true A^T passes."""
    for forward, backward in (zip(*pairs, strict=True) for pairs in zip(*results, strict=True)):
        assert any(forward)
        assert sum(forward) == pytest.approx(sum(backward), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize("num_nodes", [0, 1, 2])
@pytest.mark.parametrize("options", DELIVERIES, ids=name)
def test_each_backward_is_the_transpose(worlds, options, num_nodes):
    """Four ranks; 0 nodes: one rank, without a process group."""
    for job, args in (
        (_dispatch_is_transposed_by_its_backward, (options, False)),
        (_dispatch_is_transposed_by_its_backward, (options, True)),
        (_combine_is_transposed_by_its_backward, (options,)),
    ):
        if num_nodes == 0:
            _check_transposed([job(0, None, *args)])
        else:
            _check_transposed(worlds(4).run(*([on_nodes, 2] if num_nodes == 2 else []), job, *args))


def _gradcheck(rank, pg, options):
    """Collective: every rank perturbs as many numbers as the others, in the same order, so that their calls match."""
    with tokenferry.ExpertGroup(pg, MoeShape(num_experts=4, top_k=2, hidden=2, max_tokens=3)) as group:
        generator = torch.Generator().manual_seed(rank)
        topk_idx = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(3)])
        topk_idx[1, 0] = -1
        x = torch.randn(3, 2, dtype=torch.float64, generator=generator, requires_grad=True)

        def round_trip(x, weights):
            sent = autograd.dispatch(group, x, Routing(topk_idx, weights.float()), options=options)
            gates = sent.topk_weights.double()
            gates = gates.sum(-1, keepdim=True) if options.layout is Layout.ROWS else gates.unsqueeze(-1)
            return autograd.combine(group, (sent.x * gates).tanh(), sent.plan, bias=x.sin()).x

        weights = torch.ones(3, 2, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: round_trip(x, weights), (x,))
        assert torch.autograd.gradgradcheck(lambda x: round_trip(x, weights), (x,))
        # Weights are float32 by contract: a step that float32 holds exactly, and its tolerance.
        weights = (torch.randint(8, 16, (3, 2), generator=generator) / 16.0).double().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda weights: round_trip(x.detach(), weights), (weights,), eps=2.0**-9, atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("options", [DispatchOptions(), DispatchOptions(Layout.EXPERTS, alignment=2)], ids=name)
def test_gradcheck(worlds, options):
    _gradcheck(0, None, options)
    worlds(4).run(_gradcheck, options)
    worlds(4).run(on_nodes, 2, _gradcheck, options)


def _weight_gradient(rank, pg, options):
    """A matrix that is applied to all delivered rows, padding included, as a grouped GEMM would."""
    with tokenferry.ExpertGroup(pg, SHAPE) as group, Poisoned():
        x, weights, topk_idx = inputs(rank, 6)
        matrix = torch.eye(SHAPE.hidden, dtype=torch.float64).requires_grad_()
        sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
        autograd.combine(group, sent.x @ matrix, sent.plan).x.square().sum().backward()
        return matrix.grad, x.grad


@pytest.mark.parametrize("options", [d for d in DELIVERIES if d != DispatchOptions()], ids=name)
def test_padding_leaks_into_no_gradient(options):
    """Otherwise uninitialised rows would be multiplied by zero gradients, and NaN times 0 is NaN."""
    exact = DispatchOptions() if options.layout is Layout.ROWS else DispatchOptions(Layout.EXPERTS)
    for got, want in zip(_weight_gradient(0, None, options), _weight_gradient(0, None, exact), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.fixture(params=[plain_torch, always_operators])
def group(request):
    with tokenferry.ExpertGroup(None, SHAPE) as group, request.param():
        yield group


@pytest.mark.parametrize("options", DELIVERIES, ids=name)
def test_quantized_rows_carry_bytes_and_gradients_of_weights(group, options):
    _, weights, topk_idx = inputs(0, 6)
    x = Quantized(torch.randn(6, 32).to(torch.float8_e4m3fn), torch.rand(6, 5))
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
    live, live_weights = live_rows(sent.plan)
    raw = group.dispatch(x, Routing(topk_idx, weights.detach()), options=options)
    assert torch.equal(sent.x.data.view(torch.uint8)[live], raw.x.data.view(torch.uint8)[live])
    assert torch.equal(sent.x.scale[live], raw.x.scale[live])
    assert not sent.x.data.view(torch.uint8)[~live].any()
    assert not sent.x.scale[~live].any()
    assert not sent.x.data.requires_grad
    assert not sent.x.scale.requires_grad
    again = autograd.redispatch(group, x, sent.plan, topk_weights=weights)
    for result in (sent, again):
        (3 * result.topk_weights[live_weights]).sum().backward()
        assert torch.equal(weights.grad, torch.where(topk_idx >= 0, 3.0, 0.0))
        weights.grad = None


def test_masked_weights_are_not_taken_for_slots():
    """Four rows of two slots, four experts of two rows: the shapes are equal, the meaning is not."""
    with tokenferry.ExpertGroup(None, MoeShape(num_experts=4, top_k=2, hidden=4, max_tokens=4)) as group:
        topk_idx = torch.tensor([[3, -1], [-1, 2], [1, -1], [-1, 0]])
        sent = group.dispatch(torch.ones(4, 4), Routing(topk_idx), options=DispatchOptions(Layout.MASKED, capacity=2))
        weights = torch.tensor([[1.0, torch.nan], [2.0, torch.nan], [3.0, torch.nan], [4.0, torch.nan]])
        home = autograd.combine(group, sent.x, sent.plan, topk_weights=weights)
        assert home.topk_weights.tolist() == [[4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]]


def test_rows_without_weights_have_gradients_and_no_grad_mode_has_none(group):
    x, _, topk_idx = inputs(0, 6)
    sent = autograd.dispatch(group, x, Routing(topk_idx))
    assert sent.topk_weights is None
    autograd.combine(group, sent.x, sent.plan, bias=x).x.sum().backward()
    assert x.grad[:, 0].tolist() == [1.0 + bool((row >= 0).any()) for row in topk_idx]
    with torch.no_grad():
        assert not autograd.dispatch(group, x, Routing(topk_idx)).x.requires_grad


@pytest.mark.parametrize("group", [always_operators], indirect=True)
@pytest.mark.parametrize("options", DELIVERIES, ids=name)
def test_host_counts_cross_with_the_plan(group, options, monkeypatch):
    """Otherwise the backward of combine would have to wait for the device."""
    x, weights, topk_idx = inputs(0, 6)
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
    expected = tuple(sent.expert_counts.tolist()) if options.counts == "host" else None
    assert sent.host_counts == sent.plan._host_counts == expected
    seen = []
    redispatch = type(group).redispatch
    monkeypatch.setattr(
        type(group), "redispatch", lambda *args, **kwargs: seen.append(args[2]) or redispatch(*args, **kwargs)
    )
    autograd.combine(group, sent.x, sent.plan).x.sum().backward()
    assert [plan._host_counts for plan in seen] == [expected]
    assert all(len(plan._places) == 0 for plan in seen)


def test_a_graph_keeps_its_group_and_its_sizes():
    """There is no other reference to the view of the group: only the graph can keep it for backward."""
    x, weights, topk_idx = inputs(0, 6)
    parent = tokenferry.ExpertGroup(None, dataclasses.replace(SHAPE, hidden=16))
    sent = autograd.dispatch(parent.for_shape(SHAPE), x, Routing(topk_idx, weights))
    del parent
    gc.collect()
    sent.x.sum().backward()
    assert x.grad.sum() > 0


@pytest.mark.parametrize("max_nodes", [None, 1, 3])
@pytest.mark.parametrize("way", [plain_torch, always_operators])
def test_no_call_makes_a_view(max_nodes, way, monkeypatch):
    """Operators find the group by its limit of nodes, too."""
    limited = tokenferry.ExpertGroup(None, dataclasses.replace(SHAPE, max_nodes=max_nodes))
    monkeypatch.setattr(tokenferry.ExpertGroup, "for_shape", None)
    x, weights, topk_idx = inputs(0, 6)
    with way():
        sent = autograd.dispatch(limited, x, Routing(topk_idx, weights))
        autograd.redispatch(limited, x, sent.plan)
        autograd.combine(limited, sent.x, sent.plan).x.sum().backward()
    assert x.grad.sum() > 0


BAD_CALLS = (
    (lambda g, a: autograd.dispatch(g, None, a.routing), tokenferry.ShapeError, "dispatch: x: expected a torch.Tensor"),
    (
        lambda g, a: autograd.dispatch(g, a.x, Routing([[0, 1, 2]])),
        tokenferry.ShapeError,
        "dispatch: topk_idx: .* got list",
    ),
    (lambda g, a: autograd.dispatch(g, a.x, a.routing.topk_idx), tokenferry.ArgumentError, "routing: .* got Tensor"),
    (lambda g, a: autograd.dispatch(g, a.x.int(), a.routing), tokenferry.ShapeError, "dispatch: x: .* torch.int32"),
    (lambda g, a: autograd.dispatch(g, a.x[:2], a.routing), tokenferry.ShapeError, "topk_idx: .* T=2 was set by x"),
    (
        lambda g, a: autograd.dispatch(g, Quantized(a.x, torch.ones(6, 1)), a.routing),
        tokenferry.ArgumentError,
        "x: a Quantized has no gradient",
    ),
    (lambda g, a: autograd.redispatch(g, a.x[:2], a.plan), tokenferry.ShapeError, "x: .* T=6 was set by the plan"),
    (lambda g, a: autograd.redispatch(g, a.x, a.other), tokenferry.PlanError, "plan: it was made by group"),
    (lambda g, a: autograd.combine(g, None, a.plan), tokenferry.ShapeError, "y: expected a torch.Tensor"),
    (lambda g, a: autograd.combine(g, a.sent.x[:1], a.plan), tokenferry.ShapeError, "combine: y: .* set by the plan"),
    (
        lambda g, a: autograd.combine(g, a.sent.x, a.plan, topk_weights=torch.ones(2, 3)),
        tokenferry.ShapeError,
        "combine: topk_weights: .* set by the plan",
    ),
    (lambda g, a: autograd.combine(g, a.sent.x, a.plan, bias=3.0), tokenferry.ShapeError, r"bias\[0\]: .* got float"),
    (
        lambda g, a: autograd.combine(g, a.sent.x, a.plan, bias=(a.x, a.x, a.x)),
        tokenferry.ArgumentError,
        "at most 2 tensors, got 3",
    ),
)


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[message for _, _, message in BAD_CALLS])
def test_bad_calls_say_what_is_wrong_and_leave_the_group_usable(group, call, error, message):
    class Arguments:
        x, weights, topk_idx = inputs(0, 6)
        routing = Routing(topk_idx, weights)
        sent = autograd.dispatch(group, x, routing)
        plan = sent.plan
        other = dataclasses.replace(plan, group_key="another")

    with pytest.raises(error, match=message):
        call(group, Arguments)
    autograd.dispatch(group, Arguments.x, Arguments.routing)


@pytest.mark.parametrize("call", ["redispatch", "combine"])
def test_a_plan_of_inference_mode_is_refused_where_backward_would_need_it(group, call):
    x, weights, topk_idx = inputs(0, 6)
    with torch.inference_mode():
        plan = group.dispatch(x, Routing(topk_idx, weights)).plan
    rows = x if call == "redispatch" else torch.ones(plan.num_delivered, x.shape[1], dtype=x.dtype).requires_grad_()
    with pytest.raises(tokenferry.PlanError, match=r"plan: was made in torch.inference_mode\(\), .*; dispatch outside"):
        getattr(autograd, call)(group, rows, plan)
    assert getattr(autograd, call)(group, rows.detach(), plan).x.isfinite().all()


def test_a_group_that_is_gone_is_named():
    group = tokenferry.ExpertGroup(None, SHAPE)
    x, _, topk_idx = inputs(0, 6)
    where, sizes = autograd.ops.pack(group, group.key, DispatchOptions(), 0, 0)
    del group
    gc.collect()
    with pytest.raises(tokenferry.ClosedError, match=r"is gone: .* keep the ExpertGroup"):
        torch.ops.tokenferry.dispatch(x, None, topk_idx, None, where, sizes)
