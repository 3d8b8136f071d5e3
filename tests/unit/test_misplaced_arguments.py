"""Arguments that are close to what a call expects: the error says what to pass instead."""

import pytest
import torch
import torch.distributed as dist

from tokenferry import (
    ArgumentError,
    ConfigError,
    DispatchOptions,
    ExpertGroup,
    Layout,
    MoeShape,
    PlanError,
    Routing,
    Scale,
    ShapeError,
    autograd,
)

SHAPE = MoeShape(num_experts=4, top_k=2, hidden=128, max_tokens=8)
X = torch.ones(3, 128)
WEIGHTS, IDX = torch.topk(torch.rand(3, 4), 2)
ROUTING = Routing(IDX, WEIGHTS)


@pytest.fixture(scope="module")
def group():
    with ExpertGroup(None, SHAPE, backend="cpu") as made:
        yield made


CALLS = {
    "dispatch": lambda group, routing: group.dispatch(X, routing),
    "decode_dispatch": lambda group, routing: group.decode_dispatch(X, routing),
    "autograd": lambda group, routing: autograd.dispatch(group, X, routing),
}


@pytest.mark.parametrize("call", CALLS)
def test_values_of_topk_in_the_place_of_indices(group, call):
    with pytest.raises(ShapeError) as raised:
        CALLS[call](group, Routing(WEIGHTS, IDX))
    text = str(raised.value)
    assert "topk_idx is floating point and topk_weights is an integer tensor: were they swapped?" in text
    assert "int64)" not in text, "cast to integers, the weights would be experts"


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_indices_that_are_not_swapped(group, weights):
    with pytest.raises(ShapeError, match=r"topk_idx: expected torch.int64 .*call .to\(torch.int64\)"):
        group.dispatch(X, Routing(IDX.double(), weights))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("routing", [(IDX, WEIGHTS), IDX])
def test_what_belongs_into_a_routing(group, call, routing):
    got = type(routing).__name__
    with pytest.raises(ArgumentError, match=rf"got {got}; pass Routing\(topk_idx, topk_weights\)"):
        CALLS[call](group, routing)


@pytest.mark.parametrize(
    ("options", "remedy"), [(Layout.EXPERTS, "DispatchOptions(Layout.EXPERTS)"), ({}, "DispatchOptions(...)")]
)
def test_what_belongs_into_options(group, options, remedy):
    with pytest.raises(ArgumentError) as raised:
        group.dispatch(X, ROUTING, options=options)
    assert str(raised.value).endswith(f"got {type(options).__name__}; pass {remedy}")


def test_results_instead_of_their_rows(group):
    sent, decoded = group.dispatch(X, ROUTING), group.decode_dispatch(X, ROUTING)
    wrong = {
        "combine": lambda: group.combine(sent, sent.plan),
        "combine with gradients": lambda: autograd.combine(group, sent, sent.plan),
        "redispatch": lambda: group.redispatch(sent, sent.plan),
        "dispatch": lambda: group.dispatch(group.combine(sent.x, sent.plan), ROUTING),
        "dispatch with gradients": lambda: autograd.dispatch(group, sent, ROUTING),
        "decode_combine": lambda: group.decode_combine(decoded, decoded.plan),
    }
    for call in wrong.values():
        with pytest.raises(ShapeError, match=r"; pass the tensor in it, as sent.x of a result sent"):
            call()
    with pytest.raises(PlanError, match=r"got Dispatched; pass the plan of dispatch"):
        group.combine(sent.x, sent)
    quantized = group.decode_dispatch(X, ROUTING, quantize=Scale.FLOAT32)
    with pytest.raises(ShapeError, match=r"got Quantized; pass a torch.Tensor"):
        group.decode_combine(quantized.x, quantized.plan)


def test_group_and_shape_in_the_wrong_order():
    with pytest.raises(ConfigError, match=r"got MoeShape; pass the group first: ExpertGroup\(group, shape\)"):
        ExpertGroup(SHAPE, None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match=r"shape: .* pass the group first: ExpertGroup\(group, shape\)"):
            ExpertGroup(None, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shape", [None, (4, 2, 128, 8)])
def test_no_shape(group, shape):
    sizes = r"pass MoeShape\(num_experts, top_k, hidden, max_tokens\)"
    for make in (lambda: ExpertGroup(None, shape), lambda: group.for_shape(shape)):
        with pytest.raises(ConfigError, match=rf"shape: expected a MoeShape, got {type(shape).__name__}; {sizes}"):
            make()


def test_masks_of_a_group_of_one(group):
    with pytest.raises(ArgumentError, match=r"got 7, outside \[0, 1\)"):
        group.mask(7)
    with pytest.raises(ArgumentError, match=r"another rank, of which a group of one has none, got 0$"):
        group.mask(0)


def test_options_may_still_be_none(group):
    assert group.dispatch(X, ROUTING, options=None).plan.options == DispatchOptions()
