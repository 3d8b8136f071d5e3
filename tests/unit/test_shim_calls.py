"""Calls of `Buffer` on a GPU: few calls of torch, and marks for what two streams use. Kernels do nothing here."""

import pytest
import torch

from support.silent_kernels import CountedCalls, SilentGroup, counted_calls, num_python_calls
from support.silent_nodes import SilentNodes
from support.silent_shim import E, H, K, M, SilentShim, T, storage
from tokenferry.compat.deep_ep.throughput import ANY_NUM_TOKENS
from tokenferry.memory.streams import HostStreams
from tokenferry.types import DecodeStats, DispatchOptions, Routing

HOW = {"synchronous": {}, "asynchronous": {"async_finish": True}}


@pytest.fixture
def shim(monkeypatch):
    return SilentShim(monkeypatch)


def calls_of(shim, how):
    """Return all calls of `Buffer` that send rows, by name."""
    layout = shim.layout()
    got, _, weights, _, handle, _ = shim.dispatch(layout)
    rows, _, low_latency_handle, _, _ = shim.low_latency_dispatch(use_fp8=False)
    y, answers = torch.ones_like(got), torch.ones_like(rows)
    return {
        "layout": lambda: shim.layout(**how),
        "layout, dispatch": lambda: shim.dispatch(shim.layout(**how), **how),
        "layout, dispatch into rows": lambda: shim.dispatch(shim.layout(**how), num_worst_tokens=2 * T, **how),
        "cached dispatch": lambda: shim.buffer.dispatch(shim.x, handle, **how),
        "combine": lambda: shim.buffer.combine(y, handle, **how),
        "combine with weights": lambda: shim.buffer.combine(y, handle, weights, **how),
        "low-latency dispatch": lambda: shim.low_latency_dispatch(use_fp8=False, **how),
        "low-latency dispatch, FP8": lambda: shim.low_latency_dispatch(**how),
        "low-latency combine": lambda: shim.low_latency_combine(answers, low_latency_handle, **how),
    }


LAYOUT = ["new", "new", "part", "part"]
"""For the three tensors that only this API returns: the native pair of calls makes the same calls but for these."""
READ = "untyped_storage"
"""What torch is asked for a tensor over the heap."""
TAIL = ["arange", "sum", "ge", "unsqueeze", "masked_fill_", "masked_fill_"]
"""Ids and weights past the rows that have arrived, whose number is on the device, are written where they are."""


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_calls_of_torch(shim, how):
    """Each costs a microsecond. Those of a dispatch are for the tensors that it returns; no plan makes any."""
    found = {}
    for name, call in calls_of(shim, how).items():
        call()
        with torch.no_grad(), counted_calls(shim.silent.group) as found[name]:
            call()
    assert found == {
        "layout": LAYOUT,
        "layout, dispatch": [*LAYOUT, READ, READ, READ],
        "layout, dispatch into rows": [*LAYOUT, READ, READ, READ, *TAIL, READ],
        "cached dispatch": [READ],
        "combine": ["new"],
        "combine with weights": ["new", "new"],
        "low-latency dispatch": ["new", "new", "part"],
        "low-latency dispatch, FP8": ["new", "new", "new", "part"],
        "low-latency combine": ["new"],
    }


def test_marks_of_asynchronous_calls(shim):
    """Each costs as much as a call of torch, and an event when the tensor is freed."""
    found = {}
    for name, call in calls_of(shim, {"async_finish": True}).items():
        call()
        shim.marks.clear()
        call()
        found[name] = len(shim.marks)
    assert found == {
        "layout": 3,
        "layout, dispatch": 7,
        "layout, dispatch into rows": 7,
        "cached dispatch": 1,
        "combine": 1,
        "combine with weights": 2,
        "low-latency dispatch": 4,
        "low-latency dispatch, FP8": 5,
        "low-latency combine": 1,
    }


PYTHON_CALLS = {
    "layout": (28, 0),
    "layout, dispatch": (130, 75),
    "layout, dispatch into rows": (113, 52),
    "cached dispatch": (41, 24),
    "combine": (39, 25),
    "combine, bias": (44, 29),
    "low-latency dispatch": (39, 23),
    "low-latency dispatch, counters": (44, 27),
    "low-latency combine": (36, 19),
}
"""The most functions of Python in a call, and in the native call of the same sizes whose results are read."""


def test_calls_of_python(shim):
    calls, received = calls_of(shim, {}), torch.zeros(E // 2, dtype=torch.int32, device="cpu")
    got, _, _, _, handle, _ = shim.dispatch(shim.layout())
    y = torch.ones_like(got)
    calls["combine, bias"] = lambda: shim.buffer.combine(y, handle, bias=shim.x)
    calls["low-latency dispatch, counters"] = lambda: shim.low_latency_dispatch(
        use_fp8=False, cumulative_local_expert_recv_stats=received
    )
    group, decoding = (shim.buffer._views.of(E, K, H, most) for most in (ANY_NUM_TOKENS, M))
    into_rows = shim.buffer._views.of(E, K, H, T)
    where, index = Routing(shim.topk_idx, shim.topk_weights), Routing(shim.topk_idx)
    on_device, stats = DispatchOptions(counts="device", capacity=2 * T), DecodeStats(received)
    sent, rows = group.dispatch(shim.x, where), shim.low_latency_dispatch(use_fp8=False)
    plan, answers = rows[2].plan._routed(shim.topk_idx, shim.topk_weights), torch.ones_like(rows[0])
    native = {
        "layout, dispatch": lambda: read(group.dispatch(shim.x, where)),
        "layout, dispatch into rows": lambda: read(into_rows.dispatch(shim.x, where, options=on_device)),
        "cached dispatch": lambda: group.redispatch(shim.x, sent.plan).x,
        "combine": lambda: group.combine(y, sent.plan),
        "combine, bias": lambda: group.combine(y, sent.plan, bias=shim.x),
        "low-latency dispatch": lambda: decoding.decode_dispatch(shim.x, index).expert_counts,
        "low-latency dispatch, counters": lambda: decoding.decode_dispatch(shim.x, index, stats=stats).expert_counts,
        "low-latency combine": lambda: decoding.decode_combine(answers, plan),
    }
    with shim.silent.workspaces_agree():
        found = {
            name: (num_python_calls(calls[name]), num_python_calls(native[name]) if name in native else 0)
            for name in PYTHON_CALLS
        }
    assert {name: nums for name, nums in found.items() if any(map(int.__gt__, nums, PYTHON_CALLS[name]))} == {}


def read(sent):
    """Return what a dispatch of the DeepEP API returns, too."""
    return sent.x, sent.topk_idx, sent.topk_weights, sent.host_counts


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_calls_make_no_tensors_of_plans(shim, how):
    got, _, _, _, handle, _ = shim.dispatch(shim.layout(**how), **how)
    assert set(handle.plan._made) == {"topk_idx"}, "which the call returns"
    shim.buffer.dispatch(shim.x, handle, **how)
    shim.buffer.combine(torch.ones_like(got), handle, **how)
    assert set(handle.plan._made) == {"topk_idx"}
    for _ in range(2):  # the first call of a size checks more
        rows, _, handle, _, _ = shim.low_latency_dispatch(use_fp8=False, **how)
        shim.low_latency_combine(torch.ones_like(rows), handle, **how)
    assert set(handle.plan._made) == {"expert_counts"}, "which the call returns"


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_function_modes_see_nothing_of_a_call(shim, how):
    """A default device is one of them. It would run Python code for every use of a tensor."""
    for name, call in calls_of(shim, how).items():
        with CountedCalls(properties=True) as counted:
            call()
        assert counted.names == [], name


# ---------------------------------------------------------------------- routings that a layout may contradict


def restrictions(shim):
    """Return which routings `dispatch_restrict` has read since the last time, and with which layouts."""
    launches = [params for name, _, _, _, params in shim.silent.launches if name == "dispatch_restrict"]
    shim.silent.launches.clear()
    return [(params["topk_idx"], params["in_rank"]) for params in launches]


@pytest.mark.parametrize("kind", [SilentGroup, SilentNodes])
def test_a_layout_of_this_routing_is_not_compared_with_it(monkeypatch, kind):
    shim = SilentShim(monkeypatch, kind)
    layout = shim.layout()
    assert (layout.num_tokens_per_rdma_rank is None) == (kind is SilentGroup)
    for _ in range(2):
        shim.dispatch(layout)
        assert restrictions(shim) == []


@pytest.mark.parametrize("kind", [SilentGroup, SilentNodes])
def test_a_layout_that_may_have_changed_takes_one_kernel(monkeypatch, kind):
    shim = SilentShim(monkeypatch, kind)
    nodes = {SilentGroup: torch.zeros(1, dtype=torch.int32), SilentNodes: None}[kind]
    mixed = shim.layout()._replace(num_tokens_per_rdma_rank=nodes)
    shim.dispatch(mixed)
    assert restrictions(shim) == [(shim.topk_idx.data_ptr(), mixed.is_token_in_rank.data_ptr())]
    in_place = shim.layout()
    in_place.is_token_in_rank[0, 0] = False
    routed = shim.layout()
    shim.topk_idx[0, 0] = -1
    earlier = shim.layout()
    shim.layout()
    for layout in (in_place, routed, earlier):
        shim.dispatch(layout)
        assert restrictions(shim) == [(shim.topk_idx.data_ptr(), layout.is_token_in_rank.data_ptr())]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 1), (6, 1), (600, 3), (40_000, 64)])
def test_blocks_of_a_restriction(shim, num_tokens, num_blocks):
    topk_idx, in_rank = torch.zeros(num_tokens, K, dtype=torch.int64), torch.zeros(num_tokens, 2, dtype=torch.bool)
    shim.silent.group._backend.restricted(topk_idx, in_rank, E)
    assert shim.silent.launches[-1][:2] == ("dispatch_restrict", num_blocks)


def test_a_restriction_runs_behind_earlier_calls(shim):
    """Behind one that was aborted it writes nothing, and the dispatch that reads it must find the same."""

    class OtherStream(HostStreams):
        def current(self):
            return 7

        def record(self, stream):
            return f"an event of {stream}"

        def wait(self, stream, event, *, outside):
            waits.append((stream, event))

    waits = []
    layout = shim.layout()
    shim.dispatch(layout)
    shim.silent.group._backend.context._streams = OtherStream()
    shim.silent.group._backend.restricted(shim.topk_idx, layout.is_token_in_rank, E)
    assert waits == [(7, "an event of 0")]


def test_in_inference_mode_a_layout_takes_one_kernel_and_one_call_of_torch(shim):
    """Inference tensors do not tell whether they have changed."""
    with torch.inference_mode():
        shim.topk_idx = shim.topk_idx.clone()
        shim.dispatch(shim.layout())
        restrictions(shim)
        with counted_calls(shim.silent.group) as names:
            shim.dispatch(shim.layout())
    assert names == [*LAYOUT, "new", READ, READ, READ]
    assert len(restrictions(shim)) == 1


# ---------------------------------------------------------------------- what two streams use


def marked(shim, call):
    """Return the result of an asynchronous call, and the storages that it marks for each stream during a capture.

    Otherwise it marks none for its own stream, since it keeps them.
    """
    shim.marks.clear()
    call(async_finish=True)
    assert {stream for _, stream in shim.marks} == {"mine"}
    shim.marks.clear()
    shim.cuda.capturing = True
    result = call(async_finish=True)
    shim.cuda.capturing = False
    return result, *({at for at, stream in shim.marks if stream == name} for name in ("comm", "mine"))


def in_torch(shim, *tensors):
    """Return the storages of tensors, but for those in the heap."""
    window = shim.silent.group._backend.context.window
    found = {storage(tensor) for tensor in tensors}
    return {at for at in found if not window.base <= at < window.base + window.num_bytes}


def test_a_layout_marks_what_torch_owns(shim):
    layout, to_comm, to_mine = marked(shim, shim.layout)
    assert to_comm == {storage(shim.topk_idx)}
    assert to_mine == in_torch(shim, layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank)
    assert len(to_mine) == 2


@pytest.mark.parametrize("num_worst_tokens", [0, 2 * T])
def test_a_dispatch_marks_what_torch_owns(shim, num_worst_tokens):
    layout = shim.layout()
    found, to_comm, to_mine = marked(
        shim, lambda **how: shim.dispatch(layout, num_worst_tokens=num_worst_tokens, **how)
    )
    x, topk_idx, topk_weights = found[:3]
    assert to_comm == in_torch(shim, shim.x, shim.topk_idx, shim.topk_weights, *layout[:4:2], layout.is_token_in_rank)
    assert to_mine >= in_torch(shim, x, topk_idx, topk_weights)
    assert in_torch(shim, x, topk_idx, topk_weights) == set(), "all of them lie in the heap"


def test_calls_along_a_plan_mark_what_torch_owns(shim):
    *_, handle, _ = shim.dispatch(shim.layout())
    y = torch.ones(6, H, dtype=torch.bfloat16)
    weights, bias = torch.ones(6, K, dtype=torch.float32), (torch.ones_like(shim.x), torch.ones_like(shim.x))
    _, to_comm, _ = marked(shim, lambda **how: shim.buffer.dispatch(shim.x, handle, **how))
    assert to_comm == in_torch(shim, shim.x, handle.in_rank)
    (out, weights_out, _), to_comm, to_mine = marked(
        shim, lambda **how: shim.buffer.combine(y, handle, weights, bias, **how)
    )
    assert to_comm == in_torch(shim, y, weights, *bias, handle.in_rank)
    assert to_mine == in_torch(shim, out, weights_out)
    assert len(to_mine) == 2


def test_low_latency_calls_mark_what_torch_owns(shim):
    counters = torch.zeros(E // 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), torch.zeros(2).long()
    ((rows, scales), counts, handle, *_), to_comm, to_mine = marked(
        shim,
        lambda **how: shim.low_latency_dispatch(
            cumulative_local_expert_recv_stats=counters[0], dispatch_wait_recv_cost_stats=counters[1], **how
        ),
    )
    assert to_comm == in_torch(shim, shim.x, shim.topk_idx, *counters[:2])
    assert to_mine == in_torch(shim, rows, scales, counts, shim.topk_idx)
    assert storage(handle[0]) == storage(handle[1]) == storage(counts)
    y, out = torch.ones(E // 2, 2 * M, H, dtype=torch.bfloat16), torch.empty(T, H, dtype=torch.bfloat16)
    to_send = shim.buffer.get_next_low_latency_combine_buffer(handle)
    _, to_comm, to_mine = marked(
        shim,
        lambda **how: shim.low_latency_combine(
            y, handle, zero_copy=True, out=out, combine_wait_recv_cost_stats=counters[2], **how
        ),
    )
    assert to_comm == in_torch(shim, y, to_send, shim.topk_idx, shim.topk_weights, counts, out, counters[2])
    assert to_mine == in_torch(shim, out)


def test_a_plan_of_another_stream_lives_until_the_call_is_done(shim):
    """Its memory would go back to the stream of the dispatch, and the other one may still read it."""
    heap = shim.silent.group._backend.context.heap
    *results, handle, _ = shim.dispatch(shim.layout())
    y = torch.ones(6, H, dtype=torch.bfloat16)
    before = heap.num_live
    shim.buffer.combine(y, handle, async_finish=True)
    del results, handle
    assert heap.num_live == before - 1, "only the rows have gone"
    shim.cuda.done.update(f"event {number}" for number in range(shim.cuda.num_events))
    shim.layout(async_finish=True)
    assert heap.num_live == 0
