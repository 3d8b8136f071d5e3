"""Calls with gradients where nothing traces: the same as those of operators, and what else they promise."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tokenferry
from support.autograd_ways import always_operators, never_operators, plain_torch
from support.silent_kernels import NUM_RANKS, SENT_TO_EACH, SilentGroup
from support.torch_calls import TorchCalls, num_functions
from support.wrapped import Mine, Wrapped, distributed
from tokenferry import ArgumentError, DispatchOptions, Layout, MoeShape, Quantized, Routing, Scale, ShapeError, autograd
from tokenferry.formats import fp8
from tokenferry.nn import MoELayer
from tokenferry.testing.compare import same_bits

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=16, max_tokens=8)
TOKENS = (5, 0, 8, 3)
OPTIONS = (
    DispatchOptions(),
    DispatchOptions(counts="device"),
    DispatchOptions(counts="device", capacity=23),
    DispatchOptions(Layout.EXPERTS, alignment=4),
    DispatchOptions(Layout.EXPERTS, alignment=4, counts="device"),
    DispatchOptions(Layout.MASKED),
    DispatchOptions(Layout.MASKED, counts="device"),
)


def name(options):
    return f"{options.layout.value}-{options.counts}-{options.capacity}"


@pytest.fixture
def group():
    with tokenferry.ExpertGroup(None, SHAPE, backend="cpu") as group:
        yield group


def inputs(rank, num_tokens):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(num_tokens, SHAPE.hidden, generator=generator).requires_grad_()
    weights = torch.rand(num_tokens, SHAPE.top_k, generator=generator).requires_grad_()
    return x, weights, torch.randint(-1, SHAPE.num_experts, (num_tokens, SHAPE.top_k), generator=generator)


def all_calls(group, options, tensors, quantize=None):
    """Each call, with all that it takes, and the tensors that it gives."""
    x, weights, topk_idx = tensors
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options, quantize=quantize)
    home = autograd.combine(group, sent.x.tanh(), sent.plan, topk_weights=sent.topk_weights, bias=(x, x.sin()))
    again = autograd.redispatch(group, home.x, sent.plan, topk_weights=home.topk_weights)
    bare = autograd.dispatch(group, again.x[:0].reshape(0, SHAPE.hidden), Routing(topk_idx[:0]), options=options)
    out = autograd.combine(group, again.x * again.x, sent.plan).x
    parts = (sent.x, sent.topk_weights, home.x, home.topk_weights, again.x, again.topk_weights, bare.x, out)
    known = (sent.expert_counts, sent.expert_offsets, sent.topk_idx, again.expert_counts, sent.plan.row_idx)
    numbers = (sent.host_counts, again.host_counts, sent.plan.num_received, sent.plan.num_delivered, sent.plan.options)
    return out, home.topk_weights, parts, known, numbers


def everything(group, options, tensors, quantize=None):
    """Return results, gradients and second derivatives, and what is no tensor."""
    tensors = (*(each.detach().clone().requires_grad_() for each in tensors[:2]), tensors[2])
    out, slots, parts, known, numbers = all_calls(group, options, tensors, quantize)
    loss = out.square().sum() + slots.square().sum()
    first = torch.autograd.grad(loss, tensors[:2], create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), tensors[:2])
    found = (*(part.detach() for part in parts), *(one for one in known if one is not None), *first, *second)
    return [each.detach() for each in found], numbers


def _the_same_by_operators(rank, pg, options, quantize):
    with tokenferry.ExpertGroup(pg, SHAPE, backend="cpu") as group:
        tensors = inputs(rank, TOKENS[rank])
        got, numbers = everything(group, options, tensors, quantize)
        with always_operators():
            want, same_numbers = everything(group, options, tensors, quantize)
        assert numbers == same_numbers
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            same_bits(str(i), one, other)
        # Ranks need not agree: those that compile their models may give up at different calls.
        with always_operators() if rank % 2 else plain_torch():
            mixed, _ = everything(group, options, tensors, quantize)
        for i, (one, other) in enumerate(zip(mixed, want, strict=True)):
            same_bits(str(i), one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_the_same_bits_by_operators(worlds, options):
    for quantize in (None, Scale.FLOAT32):
        _the_same_by_operators(0, None, options, quantize)
        worlds(4).run(_the_same_by_operators, options, quantize)


def _bytes(group, options, tensors):
    _, weights, topk_idx = tensors
    weights = weights.detach().clone().requires_grad_()
    packed = fp8.cast(torch.randn(5, SHAPE.hidden, generator=torch.Generator().manual_seed(1)), Scale.FLOAT32)
    sent = autograd.dispatch(group, packed, Routing(topk_idx, weights), options=options)
    again = autograd.redispatch(group, Quantized(packed.data, packed.scale), sent.plan, topk_weights=weights)
    (sent.topk_weights.square().sum() + again.topk_weights.sum()).backward()
    return sent.x.data.view(torch.uint8), sent.x.scale, again.x.scale, sent.topk_weights.detach(), weights.grad


@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_quantized_rows_are_the_same_by_operators(group, options):
    tensors = inputs(0, 5)
    got = _bytes(group, options, tensors)
    with always_operators():
        want = _bytes(group, options, tensors)
    for one, other in zip(got, want, strict=True):
        same_bits("part", one, other)


def round_trip(group, tensors):
    x, weights, topk_idx = tensors
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights))
    return autograd.combine(group, sent.x * 2, sent.plan).x


OPERATORS = {"tokenferry.dispatch.default", "tokenferry.combine.default"}


def names_in(graph):
    return {str(node.target) for node in graph.graph.nodes}


def by_proxies(group, tensors):
    return names_in(make_fx(lambda x, w: round_trip(group, (x, w, tensors[2])))(*tensors[:2]))


def by_proxies_before_dispatch(group, tensors):
    run = make_fx(lambda x, w: round_trip(group, (x, w, tensors[2])), pre_dispatch=True)
    return names_in(run(*tensors[:2]))


def by_a_mode(group, tensors):
    with TorchCalls() as calls:
        round_trip(group, tensors)
    return set(calls.names)


def by_export(group, tensors):
    class Model(torch.nn.Module):
        def forward(self, x, weights, topk_idx):
            return round_trip(group, (x, weights, topk_idx))

    return names_in(torch.export.export(Model(), tensors).graph_module)


@pytest.mark.parametrize("traced", [by_proxies, by_proxies_before_dispatch, by_a_mode, by_export])
def test_what_traces_sees_operators(group, traced):
    assert traced(group, inputs(0, 5)) >= OPERATORS


def test_fake_tensors_outside_of_their_mode(group):
    options = DispatchOptions(counts="device")
    with FakeTensorMode() as mode:
        x, weights, topk_idx = (mode.from_tensor(each) for each in inputs(0, 5))
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
    assert (sent.x.shape, sent.host_counts) == ((8, 16), None)


def number_of_calls(group):
    return group._backend._exchange.last_call


def test_transforms_that_stand_for_many_tensors(group):
    """They are refused before anything is sent: a call sends one."""
    x, weights, topk_idx = (each.detach() for each in inputs(0, 5))
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights))
    before = number_of_calls(group)
    for name, right, call in (
        ("dispatch: x", x, lambda t: autograd.dispatch(group, t, Routing(topk_idx, weights)).x),
        ("dispatch: topk_idx", topk_idx, lambda t: autograd.dispatch(group, x, Routing(t, weights)).x),
        ("dispatch: topk_weights", weights, lambda t: autograd.dispatch(group, x, Routing(topk_idx, t)).x),
        ("redispatch: x", x, lambda t: autograd.redispatch(group, t, sent.plan).x),
        ("combine: y", sent.x, lambda t: autograd.combine(group, t, sent.plan).x),
        (r"combine: bias\[0\]", x, lambda t: autograd.combine(group, sent.x, sent.plan, bias=t).x),
    ):
        for transform in (torch.vmap, lambda f: torch.vmap(torch.func.grad(lambda t: f(t).sum()))):
            if right is topk_idx and transform is not torch.vmap:
                continue
            with pytest.raises(ArgumentError, match=rf"^{name}: stands for several tensors"):
                transform(call)(right[None])
    assert number_of_calls(group) == before


def test_transforms_that_differentiate(group):
    """They cannot follow operators, and torch says so in words of its own functions."""
    x, weights, topk_idx = (each.detach() for each in inputs(0, 5))
    before = number_of_calls(group)
    for transform in (torch.func.grad, torch.func.jacrev, lambda f: lambda t: torch.func.vjp(f, t)):
        with pytest.raises(
            ArgumentError, match=r"^dispatch: x: is to be differentiated by torch\.func, .*autograd\.grad"
        ):
            transform(lambda rows: round_trip(group, (rows, weights, topk_idx)).sum())(x)
    assert number_of_calls(group) == before


def linearized(f, x):
    return torch.func.linearize(f, x)[1](x)


FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": linearized,
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda t: f(t).sum()), (x,), (x,)),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.vmap(f), (x[None],), (x[None],)),
    "vmap of jvp": lambda f, x: torch.vmap(lambda t: torch.func.jvp(f, (t,), (t,)))(x[None]),
    "hessian": lambda f, x: torch.func.hessian(lambda t: f(t).sum())(x),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, strategy="forward-mode", vectorize=True),
    "compiled jvp": lambda f, x: torch.compile(lambda t: torch.func.jvp(f, (t,), (t,)), backend="eager")(x),
}


@pytest.mark.filterwarnings("ignore")  # torch says that some of these are slow, or new
@pytest.mark.parametrize("kind", FORWARD)
@pytest.mark.parametrize("what", ["calls", "a layer"])
def test_derivatives_forward_are_refused(group, kind, what):
    """They were zeros, without a word."""
    x, weights, topk_idx = (each.detach() for each in inputs(0, 5))
    layer = MoELayer(group, 8, router=lambda _: Routing(topk_idx, weights))
    f = layer if what == "a layer" else lambda rows: round_trip(group, (rows, weights, topk_idx))
    numbers = []

    def counted(rows):
        numbers.append(number_of_calls(group))
        return f(rows)

    with pytest.raises(ArgumentError, match=r"^dispatch: (x|topk_weights): (has a tangent|stands for several)"):
        FORWARD[kind](counted if "compiled" not in kind else f, x)
    assert not numbers or numbers[-1] == number_of_calls(group)
    assert round_trip(group, (x, weights, topk_idx)).isfinite().all()


def test_what_has_no_tangent_can_be_called_inside_of_jvp(group):
    """Such as the calls of a frozen part of a model."""
    x, weights, topk_idx = (each.detach() for each in inputs(0, 5))
    want = round_trip(group, (x, weights, topk_idx))
    _, tangent = torch.func.jvp(lambda t: t * round_trip(group, (x, weights, topk_idx)), (x,), (torch.ones_like(x),))
    same_bits("tangent", tangent, want)


@pytest.mark.parametrize("ways", [never_operators, always_operators])
def test_tangents_of_gradients_are_refused_in_backward(group, ways):
    x, weights, topk_idx = inputs(0, 5)
    with ways():
        out = round_trip(group, (x, weights, topk_idx))
    before = number_of_calls(group)
    with pytest.raises(ArgumentError, match=r"^backward: gradient: has a tangent"):
        torch.func.jvp(lambda grad: torch.autograd.grad(out, x, grad, retain_graph=True)[0], (out,), (out,))
    assert number_of_calls(group) == before


@pytest.mark.filterwarnings("ignore:.*MaskedTensors is in prototype")
def test_classes_that_stand_for_others(group):
    """Operators of torch that are not known to a class raised a bare error; those that torch waits for are."""
    x, weights, topk_idx = (each.detach() for each in inputs(0, 5))
    want, before = round_trip(group, (x, weights, topk_idx)), number_of_calls(group)
    with distributed() as distribute:
        for make in (Wrapped, distribute, lambda t: masked_tensor(t, torch.ones_like(t, dtype=torch.bool))):
            for place, name in enumerate(("x", "topk_weights", "topk_idx")):
                tensors = [x, weights, topk_idx]
                tensors[place] = make(tensors[place])
                with pytest.raises(ShapeError, match=f"^dispatch: {name}: expected a tensor with values in memory"):
                    round_trip(group, tensors)
    assert number_of_calls(group) == before
    for harmless in (AsyncCollectiveTensor, torch.nn.Parameter, lambda t: t.as_subclass(Mine)):
        same_bits("rows", round_trip(group, (harmless(x), weights, topk_idx)).detach().as_subclass(torch.Tensor), want)


def test_selective_checkpoints_name_operators(group):
    """A policy may ask to keep what dispatch has brought; then it is not called again."""
    kept = {torch.ops.tokenferry.dispatch.default, torch.ops.tokenferry.combine.default}
    x, weights, topk_idx = inputs(0, 5)
    want = torch.autograd.grad(round_trip(group, (x, weights, topk_idx)).square().sum(), x)
    out = checkpoint(
        lambda rows: round_trip(group, (rows, weights, topk_idx)),
        x,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(list(kept)),
    )
    same_bits("gradient", *torch.autograd.grad(out.square().sum(), x), *want)


def test_backward_may_be_traced_where_forward_was_not(group):
    """As by compiled autograd: its modes see the operators."""
    x, weights, topk_idx = inputs(0, 5)
    out = round_trip(group, (x, weights, topk_idx))
    with TorchCalls() as calls:
        out.sum().backward()
    assert {"tokenferry.redispatch.default", "tokenferry.combine.default"} <= set(calls.names)


class Widths:
    """Notes the widths of rows, and whether weights come along, in calls of groups."""

    def __init__(self, monkeypatch):
        self.seen = []
        for call in ("redispatch", "combine"):
            monkeypatch.setattr(tokenferry.ExpertGroup, call, self._noting(getattr(tokenferry.ExpertGroup, call)))

    def _noting(self, function):
        def run(group, rows, plan, *, topk_weights=None, **kwargs):
            self.seen.append((function.__name__, rows.shape[-1], topk_weights is not None))
            return function(group, rows, plan, topk_weights=topk_weights, **kwargs)

        return run


NEEDED = {
    "rows": ("x", [("combine", 16, False)], [("redispatch", 16, False)]),
    "weights": ("w", [("combine", 8, True)], [("redispatch", 8, True)]),
    "both": ("xw", [("combine", 16, True)], [("redispatch", 16, True)]),
    "bias": ("b", [], []),
}


@pytest.mark.parametrize("way", [plain_torch, always_operators])
@pytest.mark.parametrize("needed", NEEDED)
@pytest.mark.parametrize("options", OPTIONS, ids=name)
def test_gradients_that_are_not_needed_do_not_travel(group, monkeypatch, way, needed, options):
    what, of_dispatch, of_combine = NEEDED[needed]
    x, weights, topk_idx = inputs(0, 5)
    full = everything(group, options, (x, weights, topk_idx))
    assert full
    x, weights = x.detach(), weights.detach()
    raw = group.dispatch(x, Routing(topk_idx, weights), options=options)
    rows, row_weights, bias = raw.x.clone(), raw.topk_weights.clone().nan_to_num(), torch.zeros(5, 16)
    for each, letter in ((x, "x"), (weights, "w"), (rows, "x"), (row_weights, "w"), (bias, "b")):
        each.requires_grad_(letter in what)
    with way():
        widths = Widths(monkeypatch)
        sent = autograd.dispatch(group, x, Routing(topk_idx, weights), options=options)
        if of_dispatch:
            (sent.x.sum() + 2 * sent.topk_weights.sum()).backward()
        assert widths.seen == of_dispatch
        home = autograd.combine(group, rows, raw.plan, topk_weights=row_weights, bias=bias)
        del widths.seen[:]
        (home.x.sum() + 3 * home.topk_weights.sum()).backward()
        assert widths.seen == of_combine
    chosen = (topk_idx >= 0).float()
    if "w" in what:
        same_bits("weights", weights.grad, 2 * chosen)
        assert row_weights.grad.sum() == 3 * chosen.sum()
    if "b" in what:
        same_bits("bias", bias.grad, torch.ones(5, 16))


def test_the_view_for_weights_is_made_once_and_ends_with_its_group(monkeypatch):
    made = []
    for_shape = tokenferry.ExpertGroup.for_shape
    monkeypatch.setattr(
        tokenferry.ExpertGroup, "for_shape", lambda group, shape: made.append(shape) or for_shape(group, shape)
    )
    group = tokenferry.ExpertGroup(None, SHAPE, backend="cpu")
    _, weights, topk_idx = inputs(0, 5)
    for _ in range(3):
        sent = autograd.dispatch(group, torch.ones(5, 16), Routing(topk_idx, weights))
        (gradient,) = torch.autograd.grad(sent.topk_weights.square().sum(), weights, create_graph=True)
        gradient.sum().backward()
    assert len(made) == 1
    ended = weakref.ref(group)
    gc.disable()  # without a cycle
    try:
        del group, sent, gradient
        assert ended() is None
    finally:
        gc.enable()


def test_results_may_be_overwritten(group):
    x, weights, topk_idx = inputs(0, 5)
    sent = autograd.dispatch(group, x, Routing(topk_idx, weights))
    rows, gates = sent.x, sent.topk_weights
    rows.mul_(2)
    gates.mul_(3)
    home = autograd.combine(group, rows.clone(), sent.plan, topk_weights=gates.clone())
    home.x.add_(1)
    home.topk_weights.add_(1)
    (home.x.sum() + home.topk_weights.sum()).backward()
    assert weights.grad.unique().tolist() == [0.0, 3.0]
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_calls_of_the_group_are_all(group, state):
    x, weights, topk_idx = inputs(0, 5)
    with state():
        sent = autograd.dispatch(group, x, Routing(topk_idx, weights))
        out = autograd.combine(group, sent.x, sent.plan).x
        same_bits("x", out, group.combine(sent.x, sent.plan).x)
    assert not out.requires_grad
    assert out.is_inference() == (state is torch.inference_mode)


T, K, E, H = 8, 2, 2 * NUM_RANKS, 1024


@pytest.fixture
def silent():
    return SilentGroup(MoeShape(num_experts=E, top_k=K, hidden=H, max_tokens=64)).group


def step(group):
    """A layer whose experts do next to nothing, forward and backward."""
    x = torch.ones(T, H, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(T, K, requires_grad=True)
    routing = Routing(torch.arange(T * K).view(T, K) % E, weights)
    gradient = torch.ones(T, H, dtype=torch.bfloat16)

    def forward():
        sent = autograd.dispatch(group, x, routing, options=DispatchOptions(Layout.EXPERTS))
        return autograd.combine(group, sent.x * sent.topk_weights.unsqueeze(1).to(sent.x.dtype), sent.plan).x

    return forward, gradient


MOST_OPERATORS = 15
"""Of torch, in a step: 10 of the experts, 2 of leaves, 2 that copy what arrives, and a copy that a kernel waits for."""

MOST_FUNCTIONS = 400
"""Of Python, half of them in the calls of the group. By operators there are 930."""


def test_a_step_costs_the_host_little(silent):
    forward, gradient = step(silent)

    def run():
        forward().backward(gradient)

    for _ in range(3):
        run()
    with never_operators(), TorchCalls() as calls:
        run()
    assert len(calls.names) <= MOST_OPERATORS, calls.names
    assert num_functions(run) <= MOST_FUNCTIONS


def test_layers_keep_no_rows_in_the_heap(silent):
    """Experts keep theirs until backward. The heap is for rows under way, of a layer at a time."""
    forward, gradient = step(silent)
    heap = silent._backend.context.heap
    forward()
    free = heap.free_bytes
    kept = forward()
    assert free - heap.free_bytes < NUM_RANKS * SENT_TO_EACH * H * kept.itemsize
    kept.backward(gradient)
