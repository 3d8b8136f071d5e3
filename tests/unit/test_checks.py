"""The messages of errors about shapes, dtypes, devices and strides."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.masked import masked_tensor

import tokenferry
from support.wrapped import Mine, Wrapped, distributed
from tokenferry import ArgumentError, CapacityError, RoutingError, ShapeError, autograd
from tokenferry.checks import FLOATS, Checks, NodeLimit, check_plain, fits


@pytest.fixture
def check() -> Checks:
    return Checks("dispatch", torch.device("cpu")).given("the group", H=8, K=2)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ArgumentError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_an_argument_of_another_kind(check):
    text = message(check.tensor, "x", [1, 2], "T H", FLOATS)
    assert text.startswith("dispatch: x: expected torch.bfloat16 or torch.float16 or ")
    assert text.endswith("[T, H], got list; pass a torch.Tensor")


def test_another_dtype(check):
    text = message(check.tensor, "w", torch.zeros(3, 2).double(), "T K", (torch.float32,))
    expected = "dispatch: w: expected torch.float32 [T, K], got torch.float64 [3, 2] on cpu; call .to(torch.float32)"
    assert text == expected


def test_another_device(check):
    text = message(check.tensor, "x", torch.zeros(3, 8, device="meta"), "T H", FLOATS)
    assert text.endswith("got torch.float32 [3, 8] on meta; the group is on cpu: call .to('cpu')")


def test_another_number_of_dimensions(check):
    text = message(check.tensor, "x", torch.zeros(8), "T H", FLOATS)
    assert text.endswith("got torch.float32 [8] on cpu; pass 2 dimensions instead of 1")


def test_a_size_that_the_group_set(check):
    text = message(check.tensor, "x", torch.zeros(3, 7), "T H", FLOATS)
    assert text.endswith("got torch.float32 [3, 7] on cpu; H=8 was set by the group, here it is 7: pass shape [3, 8]")


def test_a_size_that_another_argument_set(check):
    check.tensor("x", torch.zeros(7, 8), "T H", FLOATS)
    text = message(check.tensor, "topk_idx", torch.zeros(5, 2, dtype=torch.int64), "T K", (torch.int64,))
    assert text.endswith("T=7 was set by x, here it is 5: pass shape [7, 2]")


def test_strides(check):
    text = message(check.tensor, "x", torch.zeros(8, 3).t(), "T H", FLOATS)
    assert text == "dispatch: x: must be contiguous, got strides (1, 3); call .contiguous()"
    check.tensor("x", torch.zeros(8, 3).t(), "T H", FLOATS, contiguous=False)


ONES = torch.ones(3, 8, device="cpu", dtype=torch.float32)
NOT_DENSE = {
    "sparse": (lambda: ONES.to_sparse(), r"expected a dense tensor, got torch\.sparse_coo; call \.to_dense\(\)"),
    "rows of a sparse one": (lambda: ONES.to_sparse_csr(), r"got torch\.sparse_csr; call \.to_dense\(\)"),
    "of oneDNN": (lambda: ONES.to_mkldnn(), r"got torch\._mkldnn; call \.to_dense\(\)"),
    "nested": (lambda: torch._nested_tensor_from_tensor_list(list(ONES)), r"got a nested one; .*to_padded_tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(ONES, 0.5, 0, torch.qint8), r"got torch\.qint8; .*int_repr\(\)"),
}


@pytest.mark.filterwarnings("ignore")  # torch says that some of these are new, or are to go
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense(check, kind):
    """Some have no shape, and some no strides, so that a bare error of torch came first."""
    make, text = NOT_DENSE[kind]
    for dtypes in (None, FLOATS):
        with pytest.raises(ShapeError, match=f"dispatch: x: .*{text}"):
            check.tensor("x", make(), "T H", dtypes, contiguous=False)
    with pytest.raises(ShapeError, match=f"dispatch: x: .*{text}"):
        check_plain("dispatch", "x", make())
    assert not fits(make(), (3, 8), FLOATS, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "rows of a sparse one", "of oneDNN", "nested"])
def test_a_group_refuses_rows_that_are_not_dense_before_it_sends_any(kind):
    make, text = NOT_DENSE[kind]
    where = tokenferry.Routing(torch.zeros(3, 2, dtype=torch.int64))
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 8, 64), backend="cpu") as group:
        for call in (group.dispatch, group.decode_dispatch):
            with pytest.raises(ShapeError, match=f"{call.__name__}: x: .*{text}"):
                call(make(), where)
        assert group.dispatch(ONES, where).x.shape == (3, 8)


def test_memory_that_holds_other_values():
    for make in (torch._neg_view, lambda x: torch.view_as_complex(x.view(3, 4, 2)).conj()):
        with pytest.raises(ShapeError, match=r"dispatch: x: .*negated or conjugated.*resolve_neg\(\)"):
            check_plain("dispatch", "x", make(ONES))
    check_plain("dispatch", "x", ONES)


STAND_INS = {
    "vmap": lambda call: torch.vmap(call)(ONES[None]),
    "grad": lambda call: torch.func.grad(call)(ONES),
    "functionalize": lambda call: torch.func.functionalize(call)(ONES),
    "FakeTensorMode": lambda call: call(FakeTensorMode().from_tensor(ONES)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("kind", STAND_INS)
def test_tensors_that_stand_for_others(kind):
    """Torch raised when they were read, which broke the group."""
    where = tokenferry.Routing(torch.zeros(3, 2, dtype=torch.int64))
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 8, 64), backend="cpu") as group:
        for call in (group.dispatch, group.decode_dispatch):
            with pytest.raises(ShapeError, match=f"{call.__name__}: x: .*values in memory"):
                STAND_INS[kind](lambda x, call=call: call(x, where).x)
        assert group.dispatch(ONES, where).x.shape == (3, 8)


def test_calls_inside_of_a_mode_whose_tensors_have_no_values():
    """Also with tensors that have: what the call makes of them would have none."""
    where = tokenferry.Routing(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 8, 64), backend="cpu") as group:
        sent, decoded = group.dispatch(ONES, where), group.decode_dispatch(ONES, where)
        for name, call in {
            "dispatch: x": lambda: group.dispatch(ONES, where),
            "redispatch: x": lambda: group.redispatch(ONES, sent.plan),
            "combine: y": lambda: group.combine(sent.x, sent.plan),
            "decode_dispatch: x": lambda: group.decode_dispatch(ONES, where),
            "decode_combine: y": lambda: group.decode_combine(decoded.x, decoded.plan),
        }.items():
            with (
                FakeTensorMode(allow_non_fake_inputs=True),
                pytest.raises(ShapeError, match=f"^{name}: .* make the call outside of it"),
            ):
                call()
            call()


@pytest.mark.filterwarnings("ignore:.*MaskedTensors is in prototype")
def test_classes_that_stand_for_others(check):
    """They have no memory: their addresses are 0, and what is done to them is done to others."""
    for make, text in (
        (Wrapped, r"Wrapped, .*; pass a plain torch\.Tensor"),
        (AsyncCollectiveTensor, r"AsyncCollectiveTensor, .*; call \.wait\(\)"),
        (lambda x: masked_tensor(x, x > 0), r"MaskedTensor, .*; call \.to_tensor\(0\)"),
        (FakeTensorMode().from_tensor, r"FakeTensor, .*"),
    ):
        with pytest.raises(ShapeError, match=f"dispatch: x: expected a tensor with values .* of class {text}"):
            check.tensor("x", make(ONES), "T H", FLOATS)
    for harmless in (ONES.as_subclass(Mine), torch.nn.Parameter(ONES), torch.nn.Buffer(ONES)):
        assert check.tensor("x", harmless, "T H", FLOATS) is harmless
        check_plain("dispatch", "x", harmless)


def test_dtensors_are_refused_by_every_call():
    """Their rows arrived as what lies at address 0, and broke the group."""
    text = r": expected a tensor with values .* of class DTensor, .*; call \.to_local\(\) or \.full_tensor\(\)"
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 16, 64), backend="cpu") as group, distributed() as make:
        for name, (right, call) in all_calls(group).items():
            with pytest.raises(ShapeError, match=re.escape(name) + text):
                call(make(right))
            call(right)
            call(right.as_subclass(Mine))


def test_tangents_are_not_lost_without_a_word():
    where = tokenferry.Routing(torch.zeros(3, 2, dtype=torch.int64))
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 8, 64), backend="cpu") as group, dual_level():
        x = make_dual(ONES, ONES)
        for call in (group.dispatch, group.decode_dispatch, partial(autograd.dispatch, group)):
            with pytest.raises(ArgumentError, match=r"dispatch: x: has a tangent"):
                call(x, where)
        assert group.dispatch(unpack_dual(x).primal, where).x.shape == (3, 8)


def test_any_dtype_where_none_is_asked_for(check):
    check.tensor("x.data", torch.zeros(3, 9, dtype=torch.uint8), "T W", None)
    text = message(check.tensor, "x.data", 3, "T W", None)
    assert text == "dispatch: x.data: expected a tensor [T, W], got int; pass a torch.Tensor"


@pytest.mark.parametrize(
    ("width", "dtype", "num_bytes", "padded"),
    [(7, torch.bfloat16, 14, 8), (9, torch.bfloat16, 18, 16), (3, torch.float64, 24, 4), (17, torch.uint8, 17, 32)],
)
def test_rows_of_odd_bytes(check, width, dtype, num_bytes, padded):
    text = message(check.row_bytes, "x", torch.zeros(2, width, dtype=dtype))
    expected = f"a row of {width} x {dtype} is {num_bytes} bytes, expected a multiple of 16; "
    assert expected in text
    assert text.endswith(f"pad the hidden size to {padded} elements")
    check.row_bytes("x", torch.zeros(2, padded, dtype=dtype))


def test_too_many_tokens(check):
    check.max_tokens("x", 4, 4)
    with pytest.raises(
        CapacityError, match=r"x: T=5 rows exceed max_tokens=4; send at most 4 .*MoeShape\(max_tokens=5\)"
    ):
        check.max_tokens("x", 5, 4)


@pytest.mark.parametrize(("bad", "place"), [(4, (1, 0)), (-2, (0, 1)), (99, (2, 1))])
def test_experts_out_of_range(check, bad, place):
    idx = torch.zeros(3, 2, dtype=torch.int32)
    idx[place] = bad
    text = rf"topk_idx\[{place[0]}, {place[1]}\] is {bad}, expected an expert in \[0, 4\), or -1"
    with pytest.raises(RoutingError, match=text):
        check.experts("topk_idx", idx, 4)


def test_experts_in_range(check):
    check.experts("topk_idx", torch.tensor([[-1, 3]]), 4)
    check.experts("topk_idx", torch.empty(0, 2, dtype=torch.int64), 4)


INTERLEAVED = (0, 1, 2, 0, 1, 2)
"""The nodes of six ranks, with two experts each."""


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("experts", "nodes"),
    [([0, 2, 5], "0, 1, 2"), ([11, 10, 8], "1, 2"), ([-1, 6, 9], "0, 1"), ([7, -1, 4], "0, 2")],
)
def test_too_many_nodes(check, experts, nodes, dtype):
    idx = torch.tensor([[0, 1, -1], [-1, -1, -1], experts, [0, 2, 5]], dtype=dtype)
    num = len(nodes.split(", "))
    limit = NodeLimit(num - 1, INTERLEAVED, 2)
    with pytest.raises(RoutingError) as caught:
        check.nodes("topk_idx", idx, limit)
    assert str(caught.value) == (
        f"dispatch: topk_idx[2] has experts on {num} nodes ({nodes}), expected at most {num - 1}; the group has "
        f"max_nodes={num - 1}: limit the groups of the router, or make the group with MoeShape(max_nodes={num})"
    )
    check.nodes("topk_idx", idx[:2], limit)


def test_few_enough_nodes(check):
    idx = torch.tensor([[0, 1, 6, 7], [-1, -1, 11, 5], [3, 9, 2, 8], [-1, -1, -1, -1]])
    check.nodes("topk_idx", idx, NodeLimit(1, INTERLEAVED, 2))
    check.nodes("topk_idx", torch.empty(0, 3, dtype=torch.int64), NodeLimit(1, INTERLEAVED, 2))


def test_lost_gradients(check):
    x = torch.zeros(2, requires_grad=True)
    text = message(check.no_grad, y=torch.zeros(2), bias=(torch.zeros(2), x))
    assert text.startswith(
        "dispatch: bias: requires grad, and this call is not differentiable; use tokenferry.autograd"
    )
    check.no_grad(x=x.detach(), w=None)
    with torch.no_grad():
        check.no_grad(x=x)


def test_sizes_of_one_call_do_not_leak_into_the_next():
    for num_tokens in (3, 4):
        check = Checks("a", torch.device("cpu")).given("the group", H=8)
        assert check.tensor("x", torch.zeros(num_tokens, 8), "T H", FLOATS).shape == (num_tokens, 8)


def test_the_source_of_a_size_that_was_given_is_named(check):
    check.given("the plan", T=3)
    assert "T=3 was set by the plan, here it is 5" in message(check.tensor, "y", torch.zeros(5, 8), "T H", FLOATS)


def test_shape_error_is_what_is_raised(check):
    with pytest.raises(ShapeError):
        check.tensor("x", torch.zeros(3, 7), "T H", FLOATS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: torch._neg_view(x), "resolve_neg"),
        (
            lambda x: tokenferry.Quantized(torch.view_as_complex(x.view(3, 8, 2)).conj(), x[:, :1].clone()),
            "resolve_conj",
        ),
        (lambda x: x.to_sparse(), "to_dense"),
    ],
)
def test_rows_that_are_not_what_lies_in_memory(make, message):
    """They are refused before anything is sent."""
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 16, 64), backend="cpu") as group:
        where = tokenferry.Routing(torch.zeros(3, 2, dtype=torch.int64))
        for _ in range(2):
            with pytest.raises(tokenferry.ShapeError, match=message):
                group.dispatch(make(torch.ones(3, 16)), where)
        sent = group.dispatch(torch.ones(3, 16), where)
        with pytest.raises(tokenferry.ShapeError, match=r"combine: y: .*resolve_neg"):
            group.combine(torch._neg_view(sent.x), sent.plan)


def all_calls(group):
    """Each tensor of each call, with what it takes there."""
    x, idx, weights = torch.ones(3, 16), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    where = tokenferry.Routing(idx, weights)
    sent, decoded = group.dispatch(x, where), group.decode_dispatch(x, where)
    y, plan, quantized = decoded.x, decoded.plan, tokenferry.Quantized(x, weights)
    return {
        "dispatch: x": (x, lambda t: group.dispatch(t, where)),
        "dispatch: x.data": (x, lambda t: group.dispatch(replace(quantized, data=t), where)),
        "dispatch: x.scale": (weights, lambda t: group.dispatch(replace(quantized, scale=t), where)),
        "dispatch: topk_idx": (idx, lambda t: group.dispatch(x, replace(where, topk_idx=t))),
        "dispatch: topk_weights": (weights, lambda t: group.dispatch(x, replace(where, topk_weights=t))),
        "redispatch: x": (x, lambda t: group.redispatch(t, sent.plan)),
        "redispatch: topk_weights": (weights, lambda t: group.redispatch(x, sent.plan, topk_weights=t)),
        "combine: y": (x, lambda t: group.combine(t, sent.plan)),
        "combine: topk_weights": (weights, lambda t: group.combine(x, sent.plan, topk_weights=t)),
        "combine: bias": (x, lambda t: group.combine(x, sent.plan, bias=t)),
        "combine: bias[1]": (x, lambda t: group.combine(x, sent.plan, bias=(x, t))),
        "combine: out": (x, lambda t: group.combine(x, sent.plan, out=t)),
        "decode_dispatch: x": (x, lambda t: group.decode_dispatch(t, where)),
        "decode_dispatch: topk_idx": (idx, lambda t: group.decode_dispatch(x, replace(where, topk_idx=t))),
        "decode_dispatch: topk_weights": (weights, lambda t: group.decode_dispatch(x, replace(where, topk_weights=t))),
        "decode_combine: y": (y, lambda t: group.decode_combine(t, plan)),
        "decode_combine: plan.topk_weights": (
            weights,
            lambda t: group.decode_combine(y, replace(plan, topk_weights=t)),
        ),
        "decode_combine: out": (x, lambda t: group.decode_combine(y, plan, out=t)),
    }


KINDS = {
    "negated": (torch._neg_view, r".*resolve_neg\(\)"),
    "sparse": (torch.Tensor.to_sparse, r".*torch\.sparse_coo; call \.to_dense\(\)"),
    "nested": (lambda right: torch._nested_tensor_from_tensor_list(list(right)), ".*a nested one"),
    "of oneDNN": (torch.Tensor.to_mkldnn, r".*torch\._mkldnn; call \.to_dense\(\)"),
    "quantized": (lambda right: torch.quantize_per_tensor(right, 0.5, 0, torch.quint8), r".*torch\.quint8"),
    "wrapped": (Wrapped, ".*got one of class Wrapped, which stands for others; pass a plain torch.Tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_no_call_takes_a_tensor_whose_memory_holds_no_values(kind):
    """Each is refused by name before anything is sent: torch raised later, and broke the group."""
    make, text = KINDS[kind]
    with tokenferry.ExpertGroup(None, tokenferry.MoeShape(4, 2, 16, 64), backend="cpu") as group:
        for name, (right, call) in all_calls(group).items():
            if name.endswith("topk_idx") and kind in ("of oneDNN", "quantized"):
                continue  # there are none of integers
            with pytest.raises(ShapeError, match=re.escape(name) + ":" + text):
                call(make(right))
            call(right)
