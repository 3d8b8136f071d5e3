"""The streams and waits of calls, recorded by stand-ins for torch.cuda."""

from contextlib import suppress
from typing import Any

import pytest
import torch

from support.fake_streams import Cuda
from tokenferry.compat.deep_ep import Buffer, EventHandle, EventOverlap
from tokenferry.compat.deep_ep.low_latency import Handle as LowLatencyHandle
from tokenferry.compat.deep_ep.streams import Lane, When
from tokenferry.compat.deep_ep.throughput import Handle, TokenLayout
from tokenferry.errors import ArgumentError, ConfigError, PeerTimeout
from tokenferry.types import DecodePlan, DispatchOptions, Plan


class Marked(torch.Tensor):
    """A tensor that lists the streams that it was marked for."""

    streams: list[str]

    def record_stream(self, stream: Any) -> None:
        self.streams.append(stream.name)


def marked() -> Marked:
    tensor = torch.zeros(1).as_subclass(Marked)
    tensor.streams = []
    return tensor


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda = Cuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.fixture
def lane(cuda) -> Lane:
    return Lane(torch.device("cuda", 0))


def work_on(cuda: Cuda, result: Any = None) -> Any:
    def work() -> Any:
        cuda.log.append(f"work on {cuda.streams[-1].name}")
        return result

    return work


def test_a_synchronous_call_runs_on_the_current_stream(cuda, lane):
    result, event = lane.run("call", When(), (marked(),), work_on(cuda, "result"))
    assert (result, event.event) == ("result", None)
    assert cuda.log == ["work on mine"]


def test_a_synchronous_call_waits_on_the_current_stream_for_an_event(cuda, lane):
    lane.run("call", When(previous_event=Buffer.capture()), (), work_on(cuda))
    assert cuda.log == ["event 0 on mine", "mine waits for event 0", "work on mine"]


def test_an_asynchronous_call_runs_on_the_other_stream_without_being_waited_for(cuda, lane):
    _, event = lane.run("call", When(async_finish=True), (), work_on(cuda))
    assert cuda.log == ["event 0 on mine", "comm waits for event 0", "work on comm", "event 1 on comm"]
    event.current_stream_wait()
    assert cuda.log[-1] == "mine waits for event 1"


def test_with_an_event_it_waits_for_that_alone(cuda, lane):
    when = When(EventOverlap(EventHandle()), async_finish=True, allocate_on_comm_stream=True)
    lane.run("call", when, (), work_on(cuda))
    assert cuda.log == ["event 0 on mine", "comm waits for event 0", "work on comm", "event 1 on comm"]


@pytest.mark.parametrize("capturing", [False, True])
def test_what_crosses_streams_is_marked_for_the_other(cuda, lane, capturing):
    """Inputs only during a capture: otherwise they live until the call is done. A mark costs as much as a launch."""
    cuda.capturing = capturing
    given, there, back = marked(), marked(), marked()
    inputs = ((given, None), TokenLayout(there, None, None, there))
    lane.run("call", When(async_finish=True), inputs, work_on(cuda, (1, (back,), None)))
    there_and_back = (set(given.streams), set(there.streams), back.streams)
    assert there_and_back == (({"comm"}, {"comm"}, ["mine"]) if capturing else (set(), set(), ["mine"]))


def plan_of(tensor: Marked) -> Plan:
    return Plan("key", DispatchOptions(), 0, 0, 0, *[tensor] * 8)


def decode_plan_of(tensor: Marked) -> DecodePlan:
    return DecodePlan("key", 0, 0, tensor, None, tensor, tensor, None)


@pytest.mark.parametrize(
    ("holder", "num_marks"),
    [
        (lambda tensor: TokenLayout(tensor, tensor, tensor, tensor), 4),
        (lambda tensor: Handle(plan_of(marked()), tensor, 0, 1, 1), 1),
        (lambda tensor: Handle(plan_of(tensor), marked(), 0, 1, 1), 8),
        (lambda tensor: LowLatencyHandle(decode_plan_of(tensor), 1, 1, 1, None), 3),
        (lambda tensor: LowLatencyHandle(decode_plan_of(marked()), 1, 1, 1, None, tensor), 1),
    ],
    ids=["layout", "in_rank", "plan", "decode plan", "combine buffer"],
)
def test_tensors_of_what_calls_take_and_return_are_marked(cuda, lane, holder, num_marks):
    cuda.capturing = True
    given, back = marked(), marked()
    lane.run("call", When(async_finish=True), (holder(given),), work_on(cuda, (holder(back),)))
    assert (given.streams, back.streams) == (["comm"] * num_marks, ["mine"] * num_marks)


def test_inputs_live_until_the_call_is_done(cuda, lane):
    """Marks have no effect on memory that torch does not own: a peer could still read rows that were overwritten."""
    died = []

    class Dying(Marked):
        def __del__(self) -> None:
            died.append(cuda.streams[-1].name)

    def failing() -> None:
        raise PeerTimeout("too late", phase="dispatch", call=1, rank=0, peers=(1,), waited_s=1.0)

    def call(work: Any) -> None:
        tensor = torch.zeros(1).as_subclass(Dying)
        tensor.streams = []
        with suppress(PeerTimeout):
            lane.run("call", When(async_finish=True), (tensor,), work)

    for number, work in enumerate((work_on(cuda), failing)):
        died.clear()
        call(work)
        assert not died, "a call that fails may have launched kernels"
        lane.run("call", When(async_finish=True), (), work_on(cuda))
        assert not died, "its event has not passed"
        cuda.done.update(f"event {each}" for each in range(cuda.num_events))
        lane.run("call", When(async_finish=True), (), work_on(cuda))
        assert died == ["mine"], f"{number}: a block of the heap is freed behind the current stream"


def test_the_error_of_a_call_is_raised_even_if_nothing_can_be_recorded(cuda, lane, monkeypatch):
    def failing() -> None:
        monkeypatch.setattr(torch.cuda, "Event", lambda: exec("raise RuntimeError('the context is broken')"))
        raise PeerTimeout("too late", phase="dispatch", call=1, rank=0, peers=(1,), waited_s=1.0)

    with pytest.raises(PeerTimeout):
        lane.run("call", When(async_finish=True), (marked(),), failing)


@pytest.mark.parametrize("capturing", [False, True])
def test_the_event_keeps_the_inputs_until_it_is_waited_for(cuda, capturing):
    """The program may drop the Buffer before. During a capture nothing else keeps them."""
    cuda.capturing = capturing
    lane, tensor = Lane(torch.device("cuda", 0)), marked()
    _, event = lane.run("call", When(async_finish=True), (tensor,), work_on(cuda))
    assert bool(lane._pending) is not capturing
    del lane
    assert event.event._kept == (tensor,)
    event.current_stream_wait()
    assert event.event._kept is None


def test_a_bad_event_is_refused_before_anything_happens(cuda, lane):
    with pytest.raises(ArgumentError, match="call: previous_event: expected an EventOverlap or None, got object"):
        lane.run("call", When(object()), (), work_on(cuda))
    assert cuda.log == []


def test_the_cpu_has_one_stream(cuda):
    lane = Lane(torch.device("cpu"))
    assert lane.stream is None
    _, event = lane.run("call", When(async_finish=True), (), work_on(cuda))
    assert cuda.log == ["work on mine", "event 0 on mine"]
    assert isinstance(event.event, EventHandle)


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="another test has brought up CUDA in this process")
def test_an_event_needs_no_cuda():
    handle = EventHandle()
    handle.current_stream_wait()
    assert handle.has_passed()
    assert not torch.cuda.is_initialized(), "it must not bring up CUDA in a process that has no use for it"


def test_the_number_of_sms_of_a_call(cuda, monkeypatch):
    from tokenferry.compat.deep_ep import Config

    monkeypatch.setattr(Buffer, "num_sms", 20)
    monkeypatch.setattr(Buffer, "_asked_num_sms", None)
    buffer = Buffer(None)
    assert buffer._num_sms("call", Config(num_sms=24)) is None, "the CPU backend has none"
    buffer._lane = Lane(torch.device("cuda", 0))
    assert buffer._num_sms("call", None) is None
    assert buffer._num_sms("call", Config(num_sms=24)) == 24
    Buffer.set_num_sms(32)
    assert buffer._num_sms("call", None) == 32
    assert buffer._num_sms("call", Buffer.get_dispatch_config(2)) == 32
    Buffer.set_num_sms(0)
    assert buffer._num_sms("call", None) is None


def test_a_layout_is_known_until_any_part_of_it_changes():
    buffer = Buffer(None)
    topk_idx = torch.tensor([[0, 1], [2, -1]])
    made = buffer.get_dispatch_layout(topk_idx, 4)
    parts = (made.num_tokens_per_rank, None, made.num_tokens_per_expert, made.is_token_in_rank)
    assert buffer._known_experts(topk_idx, TokenLayout(*parts)) == 4
    assert not buffer._known_experts(topk_idx.clone(), TokenLayout(*parts))
    for i, part in enumerate(parts):
        changed = torch.ones(1, dtype=torch.int32) if part is None else part.clone()
        assert not buffer._known_experts(topk_idx, TokenLayout(*parts[:i], changed, *parts[i + 1 :]))
    assert not buffer._known_experts(topk_idx, TokenLayout(*parts[:2], None, parts[3]))
    for i in (0, 2, 3):
        made = buffer.get_dispatch_layout(topk_idx, 4)
        parts = (made.num_tokens_per_rank, None, made.num_tokens_per_expert, made.is_token_in_rank)
        parts[i].zero_()
        assert not buffer._known_experts(topk_idx, TokenLayout(*parts))
    made = buffer.get_dispatch_layout(topk_idx.clone(), 4)  # that is gone at once
    parts = (made.num_tokens_per_rank, None, made.num_tokens_per_expert, made.is_token_in_rank)
    assert not buffer._known_experts(None, TokenLayout(*parts))


def test_on_the_cpu_a_layout_is_compared_although_it_is_known():
    """Writes that torch does not count, such as those of numpy, are found."""
    buffer = Buffer(None)
    topk_idx = torch.tensor([[0, 1], [2, -1]])
    made = buffer.get_dispatch_layout(topk_idx, 4)
    made.num_tokens_per_expert.numpy()[0] = 9
    with pytest.raises(ArgumentError, match=r"num_tokens_per_expert\[0\]: expected 1"):
        buffer.dispatch(
            torch.ones(2, 8),
            num_tokens_per_rank=made.num_tokens_per_rank,
            is_token_in_rank=made.is_token_in_rank,
            num_tokens_per_expert=made.num_tokens_per_expert,
            topk_idx=topk_idx,
        )


def test_a_size_that_is_no_integer_is_refused_although_it_equals_one():
    buffer = Buffer(None)
    topk_idx = torch.tensor([[0, 1], [2, -1]])
    buffer.get_dispatch_layout(topk_idx, 4)
    with pytest.raises(ConfigError, match=r"num_experts: expected a positive integer, got 4\.0"):
        buffer.get_dispatch_layout(topk_idx, 4.0)


def test_the_parts_of_a_layout_have_names():
    layout = Buffer(None).get_dispatch_layout(torch.tensor([[0, 1], [2, -1]]), 4)
    per_rank, per_node, per_expert, in_rank, event = layout
    assert layout.num_tokens_per_rank is per_rank
    assert layout.num_tokens_per_rdma_rank is per_node
    assert layout.num_tokens_per_expert is per_expert
    assert layout.is_token_in_rank is in_rank
    assert layout.event is event


def test_a_handle_reads_like_a_tuple_whose_tensors_are_made_when_read():
    buffer = Buffer(None)
    topk_idx = torch.tensor([[0, 1], [2, -1]])
    counted = buffer.get_dispatch_layout(topk_idx, 4)
    *_, handle, _ = buffer.dispatch(
        torch.ones(2, 8),
        num_tokens_per_rank=counted.num_tokens_per_rank,
        is_token_in_rank=counted.is_token_in_rank,
        num_tokens_per_expert=counted.num_tokens_per_expert,
        topk_idx=topk_idx,
    )
    assert len(handle) == 7
    prefix, *channels, src_token, in_rank, send_head, plan = handle
    assert (prefix.dtype, prefix.tolist()) == (torch.int32, [[2]])
    assert (src_token.dtype, src_token.tolist()) == (torch.int32, [0, 1])
    assert in_rank is counted.is_token_in_rank
    assert plan is handle[-1] is handle.plan
    assert [*channels, send_head] == [None] * 3
    assert handle[0] is not prefix
    assert handle[3:5][1] is in_rank
    with pytest.raises(IndexError):
        handle[7]


def test_a_low_latency_handle_reads_like_a_tuple_whose_tensors_are_made_when_read():
    buffer = Buffer(None, low_latency_mode=True)
    topk_idx = torch.tensor([[0, 1], [1, -1]])
    handles = [buffer.low_latency_dispatch(torch.ones(2, 8), topk_idx, 4, 2, use_fp8=False)[2] for _ in range(2)]
    handle = handles[0]
    src_info, layout_range, *sizes, plan = handle
    assert len(handle) == 6
    assert (src_info.dtype, src_info.shape, src_info[:, 0].tolist()) == (torch.int32, (2, 4), [0, 0])
    assert (layout_range.dtype, layout_range.tolist()) == (torch.int64, [[1], [2]])
    assert (*sizes,) == handle[2:5] == (4, 8, 2)
    assert plan is handle[-1] is handle.plan
    assert torch.equal(handle[0], src_info)
    assert handle[:2][1].tolist() == layout_range.tolist()
    assert handle == handle
    assert handle != handles[1]
    assert {handle: 1}[handle]
    with pytest.raises(IndexError):
        handle[6]


def test_the_layout_of_an_inference_tensor_is_never_known():
    """It has no version, so that nobody can say whether it was edited since."""
    buffer = Buffer(None)
    with torch.inference_mode():
        topk_idx = torch.tensor([[0, 1], [2, -1]])
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
        topk_idx[0, 0] = 3
        assert not buffer._known_experts(topk_idx, TokenLayout(per_rank, None, per_expert, in_rank))
    normal = torch.tensor([[0, 1], [2, -1]])
    with torch.inference_mode():
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(normal, 4)
        in_rank[0, 0] = False
        assert not buffer._known_experts(normal, TokenLayout(per_rank, None, per_expert, in_rank))


def test_groups_have_the_memory_that_was_asked_for(monkeypatch):
    from tokenferry import api

    seen = []
    make = api.make_backend
    monkeypatch.setattr(api, "make_backend", lambda group, options: seen.append(options) or make(group, options))
    for sizes in ((0, 0), (3 << 30, 1), (1, 5 << 30)):
        Buffer(None, *sizes)
    assert [options.heap_bytes >> 30 for options in seen] == [2, 3, 5]
    monkeypatch.setenv("TOKENFERRY_HEAP_MB", "64")
    Buffer(None, 3 << 30)
    assert seen[-1].heap_bytes == 64 << 20
