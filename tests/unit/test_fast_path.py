"""The fast path of the CUDA backend: the same launches as the general path, and few calls of torch."""

import copy
import dataclasses
import pickle
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from support.silent_kernels import CountedCalls, SilentGroup, comparable, counted_calls, num_python_calls, rows_of
from support.wrapped import Wrapped
from tokenferry.backends.cuda.combine import Combiner
from tokenferry.backends.cuda.decode import Decoder
from tokenferry.backends.cuda.dispatch import Dispatcher
from tokenferry.compat.deep_ep.throughput import ANY_NUM_TOKENS
from tokenferry.errors import ArgumentError, CapacityError, ClosedError, ShapeError
from tokenferry.kernels.decode_words import RECEIVE, SEND
from tokenferry.types import (
    DecodeDispatched,
    DecodePlan,
    DecodeStats,
    Dispatched,
    DispatchOptions,
    Layout,
    MoeShape,
    Plan,
    Quantized,
    Routing,
    Scale,
)

T, K, E, H = 6, 2, 4, 256
SHAPE = MoeShape(E, K, H, 8)
ROWS, EXPERTS = DispatchOptions(), DispatchOptions(Layout.EXPERTS, alignment=4, zero_padding=True)
OPTIONS = {
    "rows": ROWS,
    "rows, device": DispatchOptions(counts="device"),
    "experts": EXPERTS,
    "experts, device": DispatchOptions(Layout.EXPERTS, counts="device"),
    "masked": DispatchOptions(Layout.MASKED, capacity=9),
    "masked, device": DispatchOptions(Layout.MASKED, counts="device"),
}
PAYLOADS = {
    "bfloat16": rows_of(T, H),
    "float32": torch.ones(T, H, dtype=torch.float32, device="cpu"),
    "scales by row": Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(T, 4, dtype=torch.float32)),
    "scales by column": Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(3, T, dtype=torch.float32).T),
    "no scales": Quantized(torch.ones(T, H, dtype=torch.uint8), torch.ones(T, 0, dtype=torch.float32)),
}
WEIGHTS = torch.ones(T, K, dtype=torch.float32)
UNALIGNED = torch.ones(T * H + 1, dtype=torch.bfloat16)[1:].view(T, H)
RECEIVED, WAIT_NS = torch.zeros(E // 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
STATS = {
    "none": (None, None),
    "empty": (DecodeStats(), DecodeStats()),
    "waits": (DecodeStats(None, WAIT_NS), DecodeStats(None, WAIT_NS)),
    "rows": (DecodeStats(RECEIVED, WAIT_NS), None),
}
"""Counters of a dispatch and a combine."""


def routing(dtype=torch.int64, weights=WEIGHTS):
    return Routing(torch.arange(T * K, device="cpu", dtype=dtype).view(T, K) % E, weights)


def throughput(group, x, options, with_weights):
    """Two rounds of calls; the second takes the fast path."""
    for dtype in (torch.int64, torch.int32):
        for num_sms in (None, 5):
            weights = WEIGHTS if with_weights else None
            sent = group.dispatch(x, routing(dtype, weights), options=options, num_sms=num_sms)
            for other in (weights, None if with_weights else WEIGHTS):
                again = group.redispatch(x, sent.plan, topk_weights=other, num_sms=num_sms)
                assert again.plan is sent.plan
            y = group.empty_rows(sent.plan, torch.bfloat16)
            back = None if not with_weights else sent.topk_weights
            group.combine(y, sent.plan, topk_weights=back, num_sms=num_sms)
            group.combine(y.clone(), sent.plan, num_sms=num_sms)
            bias, out = rows_of(T, H), rows_of(T, H)
            for biases in (bias, (bias,), (bias, out), (UNALIGNED, bias), ()):
                group.combine(y, sent.plan, bias=biases, num_sms=num_sms)
            for target in (out, UNALIGNED):
                done = group.combine(y, sent.plan, topk_weights=back, bias=bias, out=target, num_sms=num_sms)
                assert done.x is target


def launches(job, *args):
    """Return the launches of the second time that a job runs, with both paths."""
    found = []
    for fast_path in (False, True):
        silent = SilentGroup(SHAPE, fast_path=fast_path)
        with silent.workspaces_agree():
            job(silent.group, *args)
            silent.launches.clear()
            job(silent.group, *args)
        found.append(silent.launches)
    return found


@pytest.mark.parametrize("with_weights", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("x", PAYLOADS)
def test_both_paths_launch_the_same(x, options, with_weights):
    general, fast = launches(throughput, PAYLOADS[x], OPTIONS[options], with_weights)
    assert len(general) == len(fast) > 0
    for one, other in zip(general, fast, strict=True):
        assert comparable(one) == comparable(other)


def decoding(group, quantize, numerics, encoding, hooked, stats=STATS["none"]):
    for dtype in (torch.int64, torch.int32):
        group.decode_dispatch(rows_of(T, H), routing(dtype)).hook()
        got = group.decode_dispatch(
            rows_of(T, H), routing(dtype), quantize=quantize, stats=stats[0], return_hook=hooked
        )
        got.hook()
        y = torch.ones(E // 2, 2 * SHAPE.max_tokens, H, dtype=torch.bfloat16)
        out = torch.empty(T, H, dtype=torch.bfloat16)
        other = got.plan._routed(got.plan.topk_idx.int(), WEIGHTS)
        for target, plan in ((None, got.plan), (out, got.plan), (None, other)):
            done = group.decode_combine(
                y, plan, numerics=numerics, encoding=encoding, out=target, stats=stats[1], return_hook=hooked
            )
            done.hook()
            assert target is None or done.x is target


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("quantize", [None, *Scale])
@pytest.mark.parametrize(("numerics", "encoding"), [("exact", "same"), ("fast", "fp8"), ("exact", "logfmt10")])
def test_both_paths_launch_the_same_in_decode_calls(quantize, numerics, encoding, hooked):
    general, fast = launches(decoding, quantize, numerics, encoding, hooked)
    assert len(general) == len(fast) > 0
    for one, other in zip(general, fast, strict=True):
        assert comparable(one) == comparable(other)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("masked", [False, True])
def test_both_paths_launch_the_same_in_decode_calls_that_count_or_skip_a_rank(stats, masked, hooked):
    """The counters' own addresses are compared, too: they are those of the caller."""

    def job(group):
        general.clear()
        decoding(group, Scale.FLOAT32, "exact", "same", hooked, STATS[stats])
        group.mask(1, masked=masked)
        chosen = group.decode_dispatch(rows_of(T, H), routing()).plan.topk_idx
        assert chosen.tolist() == [[0, 1], [-1, -1] if masked else [2, 3]] * 3
        decoding(group, None, "fast", "same", hooked, STATS[stats])
        group.mask(1, masked=False)

    general, dispatch, combine = [], Decoder.dispatch, Decoder.combine
    with (
        mock.patch.object(Decoder, "dispatch", lambda *call: general.append("dispatch") or dispatch(*call)),
        mock.patch.object(Decoder, "combine", lambda *call: general.append("combine") or combine(*call)),
    ):
        slow, fast = launches(job)
    assert general == [], "of the last run, which took the fast path"
    assert len(slow) == len(fast) > 0
    for one, other in zip(slow, fast, strict=True):
        assert comparable(one) == comparable(other)
        assert [one[-1].get(name) for name in ("wait_ns", "received", "alive")] == [
            other[-1].get(name) for name in ("wait_ns", "received", "alive")
        ]
    assert {launch[-1]["alive"] for launch in fast} == ({0b11, 0b01} if masked else {0b11})
    assert any(launch[-1]["wait_ns"] for launch in fast) == (stats in ("waits", "rows"))


def other_views(group):
    """Calls along a plan of a view with other sizes: a form that the plan remembers is that of its own width only."""
    wide = group.for_shape(dataclasses.replace(SHAPE, hidden=2 * H))
    for view in (group, wide):
        got = view.decode_dispatch(rows_of(T, view.shape.hidden), routing())
        view.decode_combine(torch.ones(E // 2, 16, view.shape.hidden, dtype=torch.bfloat16), got.plan)
    got = group.decode_dispatch(rows_of(T, H), routing())
    sent = group.dispatch(rows_of(T, H), routing())
    for view in (group, wide, group):
        y = torch.ones(E // 2, 16, view.shape.hidden, dtype=torch.bfloat16)
        assert view.decode_combine(y, got.plan).x.shape == (T, view.shape.hidden)
        view.redispatch(rows_of(T, view.shape.hidden), sent.plan)
        view.combine(view.empty_rows(sent.plan), sent.plan)


def test_both_paths_launch_the_same_along_plans_of_other_views():
    general, fast = launches(other_views)
    assert len(general) == len(fast) > 0
    for one, other in zip(general, fast, strict=True):
        assert comparable(one) == comparable(other)


def without_most_tokens(group):
    """The first call of a kind waits for the counts; the others guess them."""
    view = group.for_shape(dataclasses.replace(SHAPE, max_tokens=ANY_NUM_TOKENS))
    for num_sms in (None, 5):
        for weights in (WEIGHTS, None):
            sent = view.dispatch(rows_of(T, H), routing(weights=weights), num_sms=num_sms)
            view.redispatch(rows_of(T, H), sent.plan)
            view.combine(view.empty_rows(sent.plan), sent.plan)


def test_both_paths_launch_the_same_without_a_most_of_tokens():
    general, fast = launches(without_most_tokens)
    assert [launch[0] for launch in general] == ["dispatch_fused", "dispatch", "combine_push"] * 4
    for one, other in zip(general, fast, strict=True):
        assert comparable(one) == comparable(other)


# ---------------------------------------------------------------------- budgets


def test_calls_of_torch():
    """Each costs a microsecond, or five with a default device. Results are made when they are read."""
    silent = SilentGroup(SHAPE)
    group = silent.group

    def count(call):
        call()
        with counted_calls(group) as names:
            call()
        return names

    x, where = rows_of(T, H), routing()
    sent = group.dispatch(x, where)
    y = group.empty_rows(sent.plan)
    assert count(lambda: group.dispatch(x, where)) == []
    assert count(lambda: group.dispatch(x, where, options=OPTIONS["experts, device"])) == []
    assert count(lambda: group.redispatch(x, sent.plan)) == []
    assert count(lambda: group.combine(y, sent.plan)) == ["new"]
    with silent.workspaces_agree():
        got = group.decode_dispatch(x, where)
        assert count(lambda: group.decode_dispatch(x, where)) == ["new", "new"]
        assert count(lambda: group.decode_dispatch(x, where).expert_counts) == ["new", "new", "part"]
        assert count(lambda: group.decode_dispatch(x, where, quantize=Scale.FLOAT32)) == ["new", "new", "new"]
        assert count(lambda: group.decode_combine(got.x, got.plan)) == ["new"]


PYTHON_CALLS = {
    "dispatch": 50,
    "dispatch, counts on the device": 32,
    "redispatch": 21,
    "combine": 25,
    "combine, bias": 29,
    "combine, two biases": 32,
    "combine, out": 29,
    "decode_dispatch": 21,
    "decode_dispatch, stats": 26,
    "decode_combine": 19,
    "decode_combine, stats": 23,
    "decode_combine, out": 23,
    "decode_dispatch, masked": 29,
    "decode_combine, masked": 23,
}
"""The most functions of Python in a call; each takes a tenth of a microsecond."""


def test_calls_of_python():
    silent = SilentGroup(SHAPE)
    group = silent.group
    x, where = rows_of(T, H), routing()
    sent = group.dispatch(x, where)
    y = group.empty_rows(sent.plan)
    bias, out, (counters, waits) = rows_of(T, H), rows_of(T, H), (STATS["rows"][0], STATS["waits"][1])
    with silent.workspaces_agree():
        got = group.decode_dispatch(x, where)
        calls = {
            "dispatch": lambda: group.dispatch(x, where),
            "dispatch, counts on the device": lambda: group.dispatch(x, where, options=OPTIONS["rows, device"]),
            "redispatch": lambda: group.redispatch(x, sent.plan),
            "combine": lambda: group.combine(y, sent.plan),
            "combine, bias": lambda: group.combine(y, sent.plan, bias=bias),
            "combine, two biases": lambda: group.combine(y, sent.plan, bias=(bias, bias)),
            "combine, out": lambda: group.combine(y, sent.plan, out=out),
            "decode_dispatch": lambda: group.decode_dispatch(x, where),
            "decode_dispatch, stats": lambda: group.decode_dispatch(x, where, stats=counters),
            "decode_combine": lambda: group.decode_combine(got.x, got.plan),
            "decode_combine, stats": lambda: group.decode_combine(got.x, got.plan, stats=waits),
            "decode_combine, out": lambda: group.decode_combine(got.x, got.plan, out=out),
        }
        found = {name: num_python_calls(call) for name, call in calls.items()}
        group.mask(1)
        for name in ("decode_dispatch", "decode_combine"):
            found[f"{name}, masked"] = num_python_calls(calls[name])
    assert {name: num for name, num in found.items() if num > PYTHON_CALLS[name]} == {}


def test_launches():
    """Few tokens take one launch for a whole dispatch, in every layout but for that of the rows."""
    silent = SilentGroup(MoeShape(E, K, H, 1024))
    few, many = (rows_of(T, H), routing()), (rows_of(600, H), Routing(torch.zeros(600, K, dtype=torch.int64)))
    names = {}
    for label, (x, where) in (("few", few), ("many", many)):
        for layout in ("rows", "experts, device"):
            silent.launches.clear()
            silent.group.dispatch(x, where, options=OPTIONS[layout])
            names[label, layout] = [launch[0] for launch in silent.launches]
    three = ["dispatch_notify", "dispatch_assign", "dispatch"]
    assert names == {
        ("few", "rows"): ["dispatch_fused"],
        ("few", "experts, device"): ["dispatch_fused", "dispatch_expand"],
        ("many", "rows"): three,
        ("many", "experts, device"): [*three, "dispatch_expand"],
    }


def test_function_modes_see_nothing_of_a_call():
    """A default device is one of them. It would run Python code for every use of a tensor."""
    silent = SilentGroup(SHAPE)
    group = silent.group
    x, where = rows_of(T, H), routing()
    sent = group.dispatch(x, where)
    y = sent.x.clone()
    with silent.workspaces_agree():
        got = group.decode_dispatch(x, where)
        answers = got.x.clone()
        calls = {
            "dispatch": lambda: group.dispatch(x, where),
            "by expert": lambda: group.dispatch(x, where, options=OPTIONS["experts, device"]),
            "redispatch": lambda: group.redispatch(x, sent.plan, topk_weights=WEIGHTS),
            "empty_rows": lambda: group.empty_rows(sent.plan),
            "combine": lambda: group.combine(y, sent.plan, topk_weights=WEIGHTS),
            "decode_dispatch": lambda: group.decode_dispatch(x, where, quantize=Scale.FLOAT32),
            "decode_combine": lambda: group.decode_combine(answers, got.plan),
        }
        for name, call in calls.items():
            for _ in range(2):  # the first call of a kind takes the general path
                with CountedCalls(properties=True) as counted:
                    call()
                assert counted.names == [], name


# ---------------------------------------------------------------------- what the fast path leaves to the general one


def test_what_is_not_plainly_right_takes_the_general_path():
    silent = SilentGroup(SHAPE)
    group, x, where = silent.group, rows_of(T, H), routing()
    group.dispatch(x, where)
    unaligned = torch.ones(T * H + 1, dtype=torch.bfloat16)[1:].view(T, H)
    taken = []
    general = Dispatcher.dispatch
    with mock.patch.object(Dispatcher, "dispatch", lambda self, request: taken.append(0) or general(self, request)):
        group.dispatch(x, where)
        assert not taken
        group.dispatch(unaligned, where)
        group.dispatch(torch.nn.Parameter(x, requires_grad=False), where)
        assert len(taken) == 2
        with pytest.raises(ShapeError):
            group.dispatch(x[:, :16].contiguous(), where)
    group.close()
    with pytest.raises(ClosedError):
        group.dispatch(x, where)


@pytest.mark.parametrize("x", [PAYLOADS["bfloat16"], PAYLOADS["scales by row"]], ids=["bfloat16", "scales"])
def test_dispatches_that_are_not_plainly_right_take_the_general_path(x):
    """Each differs in a shape or dtype, of which those of calls before were right."""
    group, where = SilentGroup(SHAPE).group, routing()
    index = where.topk_idx
    for _ in range(2):
        group.dispatch(x, where)
    fewer, taller = x[:5] if x is PAYLOADS["bfloat16"] else Quantized(x.data, x.scale[:5]), index.repeat(2, 1)
    for rows, routed in (
        (fewer, where),
        (x, Routing(index[:5].contiguous(), WEIGHTS[:5].contiguous())),
        (x, Routing(index.float(), WEIGHTS)),
        (x, Routing(index, WEIGHTS.double())),
        (x, Routing(index, WEIGHTS[:5])),
        (x, Routing(index, WEIGHTS.flatten())),
        (x, Routing(index.flatten(), WEIGHTS)),
        (x, Routing(torch.zeros(T, K + 1, dtype=torch.int64), None)),
        (rows_of(2 * T, H), Routing(taller, None)),
    ):
        with pytest.raises((ShapeError, CapacityError)):
            group.dispatch(rows, routed)


def nested(tensor):
    return torch._nested_tensor_from_tensor_list(list(tensor))


@pytest.mark.filterwarnings("ignore")  # torch says that nested tensors are new
@pytest.mark.parametrize("odd", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, nested])
def test_tensors_that_are_not_dense_take_the_general_path(odd):
    """Also as scales, where one like it was dense before: its address was asked for behind the first launch."""
    group, where = SilentGroup(SHAPE).group, routing()
    quantized, weights = PAYLOADS["scales by row"], WEIGHTS
    plan = group.dispatch(rows_of(T, H), where).plan
    for _ in range(2):
        group.dispatch(quantized, Routing(where.topk_idx, weights))
        group.redispatch(quantized, plan)
        group.dispatch(rows_of(T, H), where)
    for rows in (
        Quantized(quantized.data, odd(quantized.scale)),
        Quantized(odd(quantized.data), quantized.scale),
        odd(rows_of(T, H)),
    ):
        for call in (lambda x: group.dispatch(x, where), lambda x: group.redispatch(x, plan)):
            with pytest.raises(ShapeError, match="expected a dense tensor"):
                call(rows)
    with pytest.raises(ShapeError, match="expected a dense tensor"):
        group.dispatch(rows_of(T, H), Routing(where.topk_idx, odd(weights)))
    assert group._backend.broken is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_tensors_that_stand_for_others_take_the_general_path():
    """And those with tangents: addresses were asked for behind the call's begin, and tangents were lost."""
    group, x, where = SilentGroup(SHAPE).group, rows_of(T, H), routing()
    index = where.topk_idx
    with SilentGroup.workspaces_agree():
        sent, decoded = group.dispatch(x, where), group.decode_dispatch(x, where)
        y, answers = rows_of(6, H), decoded.x
        calls = {
            "dispatch: x": (x, lambda t: group.dispatch(t, where)),
            "dispatch: topk_weights": (WEIGHTS, lambda t: group.dispatch(x, Routing(index, t))),
            "redispatch: x": (x, lambda t: group.redispatch(t, sent.plan)),
            "combine: y": (y, lambda t: group.combine(t, sent.plan)),
            "decode_dispatch: x": (x, lambda t: group.decode_dispatch(t, where)),
            "decode_combine: y": (answers, lambda t: group.decode_combine(t, decoded.plan)),
        }
        for _, (right, call) in calls.items():
            call(right)
        number = group._backend.context.latest_call
        for name, (right, call) in calls.items():
            for transform in (torch.vmap, torch.func.functionalize):
                with pytest.raises(ShapeError, match=f"{name}: expected a tensor with values in memory"):
                    transform(call)(right[None] if transform is torch.vmap else right)
            with pytest.raises(ShapeError, match=f"{name}: expected a tensor with values in memory, got .* Wrapped"):
                call(Wrapped(right))
            with forward_ad.dual_level(), pytest.raises(ArgumentError, match=f"{name}: has a tangent"):
                call(forward_ad.make_dual(right, torch.ones_like(right)))
        assert group._backend.context.latest_call == number, "a call has begun"
        for _, (right, call) in calls.items():
            call(right)


def test_combines_that_are_not_plainly_right_take_the_general_path():
    """Shapes and dtypes of biases and outputs are checked every time; sums are not written over what is read."""
    group, x = SilentGroup(SHAPE).group, rows_of(T, H)
    sent = group.dispatch(x, routing())
    y = rows_of(6, H)
    for _ in range(2):
        group.combine(y, sent.plan, bias=x, out=rows_of(T, H))
    for wrong in (x[:5], x.double(), x[:, :128].contiguous(), x.T.contiguous().T):
        for where in ({"bias": wrong}, {"bias": (x, wrong)}, {"out": wrong}):
            with pytest.raises(ShapeError):
                group.combine(y, sent.plan, **where)
    for where in ({"bias": (x, x, x)}, {"bias": x.clone().requires_grad_()}, {"out": x.clone().requires_grad_()}):
        with pytest.raises(ArgumentError):
            group.combine(y, sent.plan, **where)
    with mock.patch.object(Combiner, "combine", side_effect=KeyError) as general:
        for out in (y, UNALIGNED):
            with pytest.raises(KeyError):
                group.combine(y, sent.plan, out=out)
        two = rows_of(T + 1, H)
        with pytest.raises(KeyError):
            group.combine(y, sent.plan, bias=(x, two[:T]), out=two[1:])
    assert general.call_count == 3
    assert group.combine(y, sent.plan, bias=x, out=x).x is x


def test_sums_are_copied_to_where_what_is_read_lies():
    silent = SilentGroup(SHAPE)
    sent, two = silent.group.dispatch(rows_of(T, H), routing()), rows_of(T + 1, H)
    y = rows_of(6, H)
    for bias, out, copied in (
        (two[:T], two[1:], True),
        (two[:T], two[:T], False),
        (y[:1].expand(T, H).clone(), two[1:], False),
    ):
        silent.launches.clear()
        assert silent.group.combine(y, sent.plan, bias=bias, out=out).x is out
        [launch] = [each for each in silent.launches if each[0] == "combine_push"]
        assert (launch[-1]["out"] != out.data_ptr()) == copied


def test_decode_calls_that_are_not_plainly_right_take_the_general_path():
    """Shapes and dtypes are checked once; each of these differs in one of them, or in what is checked every time."""
    silent = SilentGroup(SHAPE)
    group, x, where = silent.group, rows_of(T, H), routing()
    index, wide, grad = where.topk_idx, WEIGHTS.double(), x.clone().requires_grad_()
    with silent.workspaces_agree():
        for _ in range(2):
            got = group.decode_dispatch(x, where)
            group.decode_combine(got.x, got.plan)
        for rows, routed in (
            (x[:5], where),
            (x[:, :128].contiguous(), where),
            (x.T.contiguous().T, where),
            (x.double(), where),
            (torch.ones(9, H, dtype=x.dtype), Routing(torch.zeros(9, K, dtype=torch.int64))),
            (x, Routing(index.float(), WEIGHTS)),
            (x, Routing(index, wide)),
            (x, Routing(index, WEIGHTS[:5])),
            (x, Routing(index.T.contiguous().T, WEIGHTS)),
        ):
            with pytest.raises((ShapeError, CapacityError)):
                group.decode_dispatch(rows, routed)
        for call in (
            lambda: group.decode_dispatch(grad, where),
            lambda: group.decode_dispatch(x, where, quantize=["float32"]),
            lambda: group.decode_dispatch(x, None),
            lambda: group.decode_combine(got.x, got.plan, numerics=["exact"]),
            lambda: group.decode_dispatch(x, where, return_hook=WEIGHTS),
            lambda: group.decode_combine(got.x, got.plan, return_hook=WEIGHTS),
            lambda: group.decode_combine(got.x.clone().requires_grad_(), got.plan),
            lambda: group.decode_dispatch(x, where, stats=(RECEIVED, WAIT_NS)),
            lambda: group.decode_combine(got.x, got.plan, stats=DecodeStats(RECEIVED, WAIT_NS)),
        ):
            with pytest.raises(ArgumentError):
                call()
        for y, plan in (
            (got.x[:1], got.plan),
            (got.x.double(), got.plan),
            (got.x.transpose(0, 1), got.plan),
            (got.x, got.plan._routed(index, wide)),
            (got.x, got.plan._routed(index, WEIGHTS[:5])),
        ):
            with pytest.raises(ShapeError):
                group.decode_combine(y, plan)
        for stats in (
            DecodeStats(RECEIVED.long()),
            DecodeStats(RECEIVED.repeat(2)),
            DecodeStats(None, WAIT_NS.int()),
            DecodeStats(None, WAIT_NS[:1]),
        ):
            with pytest.raises(ShapeError):
                group.decode_dispatch(x, where, stats=stats)
            with pytest.raises(ShapeError):
                group.decode_combine(got.x, got.plan, stats=stats)
        other = group.for_shape(dataclasses.replace(SHAPE, hidden=2 * H))
        with pytest.raises(ShapeError):
            other.decode_combine(got.x.repeat(1, 1, 4), got.plan)


@pytest.mark.parametrize("fast_path", [True, False])
def test_a_hook_that_is_not_called_is_received_before_the_second_call_after_it(fast_path):
    """Which overwrites its rows; the calls between two hooks need not be asked for any."""
    silent = SilentGroup(SHAPE, fast_path=fast_path)
    group, channel = silent.group, silent.group._backend.decoder._channels[0]
    with silent.workspaces_agree():
        for _ in range(3):
            group.decode_dispatch(rows_of(T, H), routing())
        assert channel.idle
        for _ in range(2):
            silent.launches.clear()
            hook = group.decode_dispatch(rows_of(T, H), routing(), return_hook=True).hook
            for _ in range(3):
                group.decode_dispatch(rows_of(T, H), routing())
            hook()
            phases = [params["phases"] for *_, params in silent.launches]
            assert phases == [SEND, SEND | RECEIVE, RECEIVE, SEND | RECEIVE, SEND | RECEIVE]
            assert channel.idle


def test_plans_and_results_become_plain_ones():
    group = SilentGroup(SHAPE).group
    sent = group.dispatch(rows_of(T, H), routing(), options=EXPERTS)
    names = [field.name for field in dataclasses.fields(Plan)]
    for other in (
        dataclasses.replace(sent.plan, num_delivered=5),
        copy.copy(sent.plan),
        copy.deepcopy(sent.plan),
        pickle.loads(pickle.dumps(sent.plan)),
    ):
        assert type(other) is Plan
        for name in names:
            one, same = getattr(other, name), getattr(sent.plan, name)
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, same)
            else:
                assert one == same or name == "num_delivered"
    assert type(copy.copy(sent)) is type(dataclasses.replace(sent, host_counts=None)) is Dispatched
    assert sent.x is sent.x
    assert repr(sent.plan).startswith("Plan(group_key='key', ")
    assert repr(sent).startswith("Dispatched(x=")


def test_the_first_reader_does_not_decide_what_a_result_is_for():
    """Made in inference mode, it could not be saved for a backward."""
    weight = torch.ones(H, 4, dtype=torch.bfloat16, requires_grad=True)
    sent = SilentGroup(SHAPE).group.dispatch(rows_of(T, H), routing())
    with torch.inference_mode():
        assert sent.x.shape == (6, H)
        assert sent.topk_idx.shape == sent.topk_weights.shape == (6, K)
    (sent.x @ weight).sum().backward()
    assert weight.grad.shape == weight.shape
    assert not any(part.is_inference() for part in (sent.topk_idx, sent.topk_weights, sent.plan.dst_token))


def test_a_decode_plan_becomes_a_plain_one():
    silent = SilentGroup(SHAPE)
    with silent.workspaces_agree():
        plan = silent.group.decode_dispatch(rows_of(T, H), routing()).plan
        sent = silent.group.decode_dispatch(rows_of(T, H), routing())
    plain = pickle.loads(pickle.dumps(sent.plan)), copy.copy(sent), dataclasses.replace(sent, hook=None)
    assert [type(one) for one in plain] == [DecodePlan, DecodeDispatched, DecodeDispatched]
    assert plain[1].expert_counts is sent.expert_counts
    assert repr(sent).startswith("DecodeDispatched(x=")
    other = dataclasses.replace(plan, topk_weights=None)
    assert other.topk_weights is None
    assert torch.equal(other.src_range, plan.src_range)
    assert (plan.src_token.shape, plan.src_range.shape) == ((2, 16), (2, 2))
    assert plan._routed(plan.topk_idx, 2 * WEIGHTS).topk_weights[0, 0] == 2
