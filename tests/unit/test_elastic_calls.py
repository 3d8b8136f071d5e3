"""Calls of `ElasticBuffer` on a GPU: few calls of torch, streams, graphs, SMs. Kernels do nothing here."""

from unittest import mock

import pytest
import torch

from support.fake_streams import Stream
from support.silent_elastic import E, H, K, M, SilentElastic, T
from support.silent_kernels import NUM_RANKS, counted_calls
from support.silent_shim import storage
from tokenferry.compat.deep_ep import EPBuffer, EventHandle, EventOverlap
from tokenferry.errors import ArgumentError

HOW = {"synchronous": {}, "asynchronous": {"async_with_compute_stream": True}}
EXPANDED = {"do_expand": True, "expert_alignment": 4}
FREE = {"do_cpu_sync": False}
READ = "untyped_storage"
"""What torch is asked for a tensor over the heap."""
TO_HEAP = [READ, "copy_"]
"""How a tensor of torch gets into the heap, from which peers fetch it."""


@pytest.fixture
def shim(monkeypatch):
    return SilentElastic(monkeypatch)


def count(shim, call):
    call()
    with torch.no_grad(), counted_calls(shim.silent.group) as names:
        call()
    return names


# ---------------------------------------------------------------------- budgets


def calls_of(shim, how):
    """Return calls of every kind, by name."""
    got, _, weights, handle, _ = shim.dispatch()
    expanded = shim.dispatch(**EXPANDED)
    y, z = torch.ones_like(got), torch.ones_like(expanded[0])
    buffer = shim.buffer
    return {
        "dispatch": lambda: shim.dispatch(**how),
        "dispatch without a copy": lambda: shim.dispatch(do_handle_copy=False, **how),
        "dispatch without a wait": lambda: shim.dispatch(**FREE, **how),
        "expanded": lambda: shim.dispatch(do_expand=True, **how),
        "expanded and aligned": lambda: shim.dispatch(**EXPANDED, **how),
        "with scales": lambda: shim.dispatch(shim.pair, **how),
        "with scales by column": lambda: shim.dispatch(shim.pair, use_tma_aligned_col_major_sf=True, **how),
        "cached": lambda: buffer.dispatch(shim.x, handle=handle, **how),
        "combine": lambda: buffer.combine(y, handle=handle, **how),
        "combine with weights": lambda: buffer.combine(y, handle=handle, topk_weights=weights, **how),
        "combine expanded": lambda: buffer.combine(z, handle=expanded[3], topk_weights=expanded[2], **how),
    }


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_calls_of_torch(shim, how):
    """Each costs a microsecond: those for the tensors that a call returns, and for the copy that a handle holds."""
    assert {name: count(shim, call) for name, call in calls_of(shim, how).items()} == {
        "dispatch": ["clone", READ, READ, READ],
        "dispatch without a copy": [READ, READ, READ],
        "dispatch without a wait": ["clone", READ, READ, READ],
        "expanded": ["clone", READ, READ],
        "expanded and aligned": ["clone", READ, READ, READ],
        "with scales": ["clone", READ, READ, "contiguous", READ, READ],
        "with scales by column": ["clone", READ, READ, "empty", "t", "__getitem__", "copy_", READ, READ],
        "cached": [READ],
        "combine": ["new"],
        "combine with weights": ["lt", "masked_fill", "new", "new", *TO_HEAP],
        "combine expanded": ["new", "new", *TO_HEAP],
    }


def test_fields_of_a_handle_take_a_few_calls_when_they_are_read(shim):
    handles = {"rows": shim.dispatch()[3], "expanded": shim.dispatch(**EXPANDED)[3]}
    found = {
        f"{name} {field}": len(count(shim, lambda handle=handle, field=field: getattr(handle, field)))
        for name, handle in handles.items()
        for field in ("psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert")
    }
    assert list(found.values()) == [1, 1, 1, 2]


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_calls_make_no_tensors_of_plans(shim, how):
    got, _, _, handle, _ = shim.dispatch(**how)
    assert set(handle.plan._made) == {"topk_idx"}, "which the call returns"
    shim.buffer.dispatch(shim.x, handle=handle, **how)
    shim.buffer.combine(torch.ones_like(got), handle, **how)
    assert set(handle.plan._made) == {"topk_idx"}


@pytest.mark.parametrize("how", [{}, EXPANDED], ids=["rows", "expanded"])
def test_m_that_changes_from_call_to_call_waits_for_nothing_and_compiles_nothing(shim, how):
    loaded = set()

    def kernel(spec, **config):
        loaded.add((spec.name, *sorted(config.items())))
        return load(spec, **config)

    jit = shim.silent.group._backend.context.jit
    load, jit.kernel = jit.kernel, kernel
    first = None
    with mock.patch("tokenferry.backends.cuda.plan.wait", side_effect=AssertionError("the host waits")):
        for most in (T, 64, M, 16, 64, T):
            x, *_, handle, _ = shim.dispatch(num_max_tokens_per_rank=most, **FREE, **how)
            assert handle.num_recv_tokens == NUM_RANKS * most
            assert x.shape == (handle.num_expanded_tokens if how else handle.num_recv_tokens, H)
            shim.buffer.combine(x, handle=handle)
            shim.buffer.dispatch(shim.x, handle=handle, do_expand=bool(how))
            first = first or loaded.copy()
    assert loaded == first


# ---------------------------------------------------------------------- SMs


def test_how_many_sms_calls_occupy(shim):
    handle = shim.dispatch(num_max_tokens_per_rank=1 << 12, **FREE)[3]
    assert handle.num_sms == shim.buffer._views.of(E, K, H, 1 << 12)._call_sms().dispatch == 16
    *_, handle, _ = shim.dispatch(num_sms=6)
    assert handle.num_sms == 6
    for call in (
        lambda **sms: shim.buffer.combine(torch.ones(T, H, dtype=torch.bfloat16), handle, **sms),
        lambda **sms: shim.buffer.dispatch(shim.x, handle=handle, **sms),
    ):
        shim.num_sms()
        call()
        call(num_sms=3)
        assert shim.num_sms()[-2:] == [6, 3]


def test_advice_about_sms(shim):
    advised = shim.buffer.get_theoretical_num_sms(num_experts=256, num_topk=8)
    assert advised % 2 == 0
    assert 4 <= advised <= 132
    assert shim.buffer.get_theoretical_num_qps(advised) == 1


# ---------------------------------------------------------------------- streams, events, graphs


def test_a_synchronous_call_runs_on_the_current_stream(shim):
    *_, event = shim.dispatch()
    assert event.event is None
    assert shim.cuda.log == []


def test_an_asynchronous_call_runs_on_the_other_stream(shim):
    *_, event = shim.dispatch(**HOW["asynchronous"])
    assert isinstance(event, EventOverlap)
    assert shim.cuda.log == ["event 0 on mine", "comm waits for event 0", "event 1 on comm"]
    event.current_stream_wait()
    assert shim.cuda.log[-1] == "mine waits for event 1"


@pytest.mark.parametrize("kind", [lambda event: event, EventOverlap], ids=["handle", "overlap"])
def test_both_events_are_waited_for(shim, kind):
    first, second = shim.buffer.capture(), shim.buffer.capture()
    assert type(first) is EventHandle
    x, *_, handle, _ = shim.dispatch(
        previous_event=kind(first),
        previous_event_before_epilogue=kind(second),
        allocate_on_comm_stream=True,
        **HOW["asynchronous"],
    )
    assert shim.cuda.log[2:] == ["comm waits for event 0", "comm waits for event 1", "event 2 on comm"]
    shim.cuda.log.clear()
    shim.buffer.combine(x, handle, previous_event_before_epilogue=kind(second))
    assert shim.cuda.log == ["mine waits for event 1"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"previous_event": object()}, "previous_event: expected an EventHandle, an EventOverlap or None, got object"),
        ({"previous_event_before_epilogue": 1}, "previous_event_before_epilogue: expected an EventHandle"),
        ({"previous_event": EventHandle()}, "previous_event: needs allocate_on_comm_stream=True"),
    ],
)
def test_bad_events_are_refused_before_anything_is_sent(shim, how, message):
    x, *_, handle, _ = shim.dispatch()
    shim.silent.launches.clear()
    for call in (shim.dispatch, lambda **how: shim.buffer.combine(x, handle, **how)):
        with pytest.raises(ArgumentError, match=message):
            call(**how)
    assert shim.silent.launches == []


FIELDS = (
    "psum_num_recv_tokens_per_scaleup_rank",
    "psum_num_recv_tokens_per_expert",
    "num_unaligned_recv_tokens_per_expert",
    "recv_src_metadata",
    "dst_buffer_slot_idx",
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_is_read_after_the_dispatch(shim, field):
    """It is made on the current stream, which need not have waited."""
    *_, handle, _ = shim.dispatch(**HOW["asynchronous"])
    getattr(handle, field)
    assert shim.cuda.log[-1] == "mine waits for event 1"
    shim.cuda.log.clear()
    getattr(shim.dispatch()[3], field)
    assert shim.cuda.log == [], "a synchronous dispatch needs no wait"


def test_a_field_of_a_captured_dispatch_waits_inside_the_capture_only(shim, monkeypatch):
    monkeypatch.setattr("tokenferry.compat.deep_ep.elastic_handle.is_capturing", lambda _: shim.cuda.capturing)
    shim.cuda.capturing = True
    *_, handle, _ = shim.dispatch(**FREE, **HOW["asynchronous"])
    shim.cuda.log.clear()
    assert handle.psum_num_recv_tokens_per_expert.shape == (E // NUM_RANKS,)
    assert shim.cuda.log == ["mine waits for event 1"]
    shim.cuda.capturing = False
    assert handle.psum_num_recv_tokens_per_expert.shape == (E // NUM_RANKS,)
    assert shim.cuda.log == ["mine waits for event 1"], "an event of a graph says nothing outside of it"


def test_a_capture_cannot_wait_for_counts(shim, monkeypatch):
    monkeypatch.setattr("tokenferry.compat.deep_ep.elastic_calls.is_capturing", lambda _: True)
    shim.silent.launches.clear()
    for sync in (None, True):
        with pytest.raises(ArgumentError, match="do_cpu_sync: a CUDA graph cannot capture"):
            shim.dispatch(do_cpu_sync=sync)
    assert shim.silent.launches == []
    shim.dispatch(**FREE)


def in_torch(shim, *tensors):
    """Return the storages of tensors, but for those in the heap."""
    window = shim.silent.group._backend.context.window
    found = {storage(tensor) for tensor in tensors if tensor is not None}
    return {at for at in found if not window.base <= at < window.base + window.num_bytes}


def marked(shim, call):
    """Return the result of an asynchronous call, and the storages that it marks for each stream during a capture.

    Otherwise it marks none for its own stream, since it keeps them.
    """
    shim.marks.clear()
    call(**HOW["asynchronous"])
    assert {stream for _, stream in shim.marks} == {"mine"}
    shim.marks.clear()
    shim.cuda.capturing = True
    result = call(**HOW["asynchronous"])
    shim.cuda.capturing = False
    return result, *({at for at, stream in shim.marks if stream == name} for name in ("comm", "mine"))


def test_calls_mark_what_two_streams_use(shim):
    stats = torch.zeros(E // NUM_RANKS, dtype=torch.int32)
    (_, _, _, handle, _), to_comm, to_mine = marked(
        shim, lambda **how: shim.dispatch(cumulative_local_expert_recv_stats=stats, **how)
    )
    assert to_comm == in_torch(shim, shim.x, shim.topk_idx, shim.topk_weights, stats)
    assert to_mine > in_torch(shim, handle.topk_idx)
    ((_, scales), *_), _, to_mine = marked(
        shim, lambda **how: shim.dispatch(shim.pair, use_tma_aligned_col_major_sf=True, **how)
    )
    assert to_mine > in_torch(shim, scales)
    assert len(in_torch(shim, scales)) == 1
    y, weights = torch.ones(T, H, dtype=torch.bfloat16), torch.ones(T, K, dtype=torch.float32)
    biases = (torch.ones_like(shim.x), torch.ones_like(shim.x))
    (out, out_weights, _), to_comm, to_mine = marked(
        shim, lambda **how: shim.buffer.combine(y, handle, weights, biases, **how)
    )
    assert to_comm == in_torch(shim, y, weights, *biases, handle.topk_idx)
    assert to_mine == in_torch(shim, out, out_weights)


DEFERRED = {**HOW["asynchronous"], "defer_epilogue": True}


@pytest.fixture
def deferring(monkeypatch):
    return SilentElastic(monkeypatch, EPBuffer)


def test_a_deferred_call_returns_its_results_on_the_stream_that_waits(deferring):
    """That may be another one than that of the call; the memory of results must not be reused before it is done."""
    log, other = deferring.cuda.log, Stream(deferring.cuda, "other")
    mine = torch.cuda.current_stream()

    def waited(event):
        assert log[-1].endswith("on comm"), "nothing has waited yet"
        deferring.marks.clear()
        torch.cuda.set_stream(other)
        results = event.wait()
        torch.cuda.set_stream(mine)
        assert log[-1].startswith("other waits for event")
        assert {stream for _, stream in deferring.marks} == {"other"}
        return results, {at for at, _ in deferring.marks}

    (_, _, _, handle), marked = waited(deferring.dispatch(**DEFERRED))
    assert in_torch(deferring, handle.topk_idx) <= marked
    y, weights = torch.ones(T, H, dtype=torch.bfloat16), torch.ones(T, K, dtype=torch.float32)
    results, marked = waited(deferring.buffer.combine(y, handle, weights, **DEFERRED))
    assert in_torch(deferring, *results) == marked
    assert len(marked) == 2


def test_deferral_costs_no_calls_of_torch(deferring):
    x, _, _, handle, _ = deferring.dispatch()
    buffer, how = deferring.buffer, HOW["asynchronous"]
    for plain, deferred in (
        (lambda: deferring.dispatch(**how), lambda: deferring.dispatch(**DEFERRED).wait()),
        (lambda: buffer.combine(x, handle, **how), lambda: buffer.combine(x, handle, **DEFERRED).wait()),
    ):
        assert count(deferring, plain) == count(deferring, deferred)


@pytest.mark.parametrize("call", ["combine", "cached"])
def test_a_plan_lives_until_the_call_along_it_is_done(shim, call):
    heap = shim.silent.group._backend.context.heap
    *results, handle, _ = shim.dispatch()
    rows = torch.ones(T, H, dtype=torch.bfloat16)
    before = heap.num_live
    if call == "combine":
        shim.buffer.combine(rows, handle, **HOW["asynchronous"])
    else:
        shim.buffer.dispatch(rows, handle=handle, **HOW["asynchronous"])
    del results, handle
    assert heap.num_live == before - 1, "only the rows have gone"
    shim.cuda.done.update(f"event {number}" for number in range(shim.cuda.num_events))
    shim.buffer.barrier()
    shim.buffer._lane._pending.clear()
    assert heap.num_live == 0


def test_a_barrier_joins_the_streams(shim):
    shim.silent.launches.clear()
    shim.buffer.barrier()
    assert [launch[0] for launch in shim.silent.launches]
    assert shim.cuda.log == ["event 0 on mine", "comm waits for event 0", "event 1 on comm", "mine waits for event 1"]
    shim.cuda.log.clear()
    with mock.patch.object(type(shim.silent.group), "synchronize") as synchronized:
        shim.buffer.barrier(use_comm_stream=False, with_cpu_sync=True)
    assert synchronized.called
    assert shim.cuda.log == []
