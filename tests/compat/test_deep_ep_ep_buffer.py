"""`EPBuffer` of DeepEP 2.5 on CPU ranks: the jobs of `ElasticBuffer`, results that come from events, refusals."""

import pytest
import torch

from support import deep_ep_deferred_jobs as deferred_jobs
from support import deep_ep_elastic_clients as clients
from support import deep_ep_elastic_jobs as jobs
from support.deep_ep_deferred_jobs import Deferring, on_buffers
from tokenferry.compat.deep_ep import EPBuffer
from tokenferry.errors import ArgumentError, ClosedError, PlanError, UnsupportedError

X = torch.arange(6).reshape(3, 2).repeat(1, 8).bfloat16()
IDX = torch.tensor([[0, 1], [2, -1], [3, 0]])
DEFER = {"async_with_compute_stream": True, "defer_epilogue": True}


@pytest.mark.parametrize("case", jobs.CASES[:2], ids=str)
def test_deferred_round_trips(worlds, case):
    worlds(4).run(on_buffers, Deferring, jobs.round_trips, case)


def test_several_deferred_calls_at_once(worlds):
    worlds(4).run(deferred_jobs.deferred, jobs.CASES[0])


@pytest.mark.parametrize("job", [jobs.many_handles, clients.vllm_prefill, clients.titan_training])
def test_the_calls_of_elastic_buffer(worlds, job):
    worlds(4).run(on_buffers, EPBuffer, job, *([jobs.CASES[1]] if job is jobs.many_handles else []))


@pytest.fixture
def buffer():
    return EPBuffer(None, num_max_tokens_per_rank=4, explicitly_destroy=True)


def test_results_come_from_the_event_only_if_they_were_deferred(buffer):
    x, _, _, handle, event = buffer.dispatch(X, IDX, num_experts=4, async_with_compute_stream=True)
    assert event.wait() is None
    assert torch.equal(x, X)
    out, weights = buffer.combine(x, handle, **DEFER).wait()
    assert torch.equal(out, X)
    assert weights is None


def test_a_hook_of_the_program_returns_its_result(buffer):
    *_, event = buffer.dispatch(X, IDX, num_experts=4, async_with_compute_stream=True)
    event.register_hook_after_wait(lambda: "mine")
    assert event.wait() == "mine"


def test_deferral_needs_an_asynchronous_call(buffer):
    handle = buffer.dispatch(X, IDX, num_experts=4)[3]
    message = "defer_epilogue: needs async_with_compute_stream=True"
    with pytest.raises(ArgumentError, match=f"EPBuffer.dispatch: {message}"):
        buffer.dispatch(X, IDX, num_experts=4, defer_epilogue=True)
    with pytest.raises(ArgumentError, match=f"EPBuffer.combine: {message}"):
        buffer.combine(X, handle, defer_epilogue=True)


def test_errors_name_the_class_and_come_from_the_call(buffer):
    with pytest.raises(ArgumentError, match=r"^EPBuffer.dispatch: num_experts: expected a value"):
        buffer.dispatch(X, IDX, **DEFER)
    with pytest.raises(PlanError, match=r"^EPBuffer.combine: handle: .*tokenferry's EPBuffer.dispatch"):
        buffer.combine(X, None)
    with pytest.raises(ArgumentError, match=r"^EPBuffer: num_bytes"):
        EPBuffer(None, num_bytes=3)
    with pytest.raises(ArgumentError, match=r"^EPBuffer.get_buffer_size_hint: hidden"):
        EPBuffer.get_buffer_size_hint(None, 4, 0)
    with pytest.raises(ArgumentError, match=r"^EPBuffer.destroy: .* make the EPBuffer with True"):
        EPBuffer(None, num_max_tokens_per_rank=1).destroy()
    buffer.destroy()
    with pytest.raises(ClosedError, match=r"^EPBuffer.dispatch: the EPBuffer was destroyed"):
        buffer.dispatch(X, IDX, num_experts=4)


def test_redundant_experts_are_refused_by_name(buffer):
    for plan in (1 << 21, object()):
        with pytest.raises(UnsupportedError, match=r"^EPBuffer: lb_allocation_plan_or_num_bytes"):
            EPBuffer(None, num_max_tokens_per_rank=1, lb_allocation_plan_or_num_bytes=plan)
    with pytest.raises(UnsupportedError, match=r"^EPBuffer.lb_prefetch_weights"):
        buffer.lb_prefetch_weights([X], [X], IDX, num_sms=4)
    with pytest.raises(UnsupportedError, match=r"^EPBuffer.lb_reduce_grads"):
        buffer.lb_reduce_grads(X, X, IDX)
    with pytest.raises(UnsupportedError, match=r"^EPBuffer.lb_get_theoretical_num_sms"):
        buffer.lb_get_theoretical_num_sms()
