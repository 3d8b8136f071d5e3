"""Jobs of `ElasticBuffer` for ranks with GPUs: those of the CPU on a buffer that carries, and jobs with graphs."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from support import deep_ep_cuda_jobs as cuda_jobs
from support import deep_ep_elastic_jobs as jobs
from support.deep_ep_deferred_jobs import Deferring, on_buffers
from support.deep_ep_elastic_jobs import Deal, Mode
from tokenferry.compat.deep_ep import ElasticBuffer
from tokenferry.testing.cases import Case
from tokenferry.testing.compare import same_bits

FREE_MODES = (Mode(cpu_sync=False), Mode(expand=True, cpu_sync=False, alignment=4, zero_padding=True))


class Carrying:
    """Makes a buffer take CPU tensors, as the jobs of the CPU have them; it brings counters back."""

    def dispatch(self, x: Any, *rest: Any, **arguments: Any) -> Any:
        counters = arguments.get("cumulative_local_expert_recv_stats")
        moved = cuda_jobs.there(arguments)
        result = super().dispatch(cuda_jobs.there(x), *cuda_jobs.there(rest), **_now(moved))
        if counters is not None:
            counters.copy_(moved["cumulative_local_expert_recv_stats"])
        return result

    def combine(self, x: Any, *rest: Any, **arguments: Any) -> Any:
        moved = _now(cuda_jobs.there(arguments))
        return super().combine(cuda_jobs.there(x), *cuda_jobs.there(rest), **moved)


class CarryingElastic(Carrying, ElasticBuffer):
    """An `ElasticBuffer` for the jobs of the CPU."""


class CarryingDeferring(Carrying, Deferring):
    """An `EPBuffer` that defers every call, for the jobs of the CPU."""


def _now(how: dict[str, Any]) -> dict[str, Any]:
    """Wait for the copies to the GPU, too, where there is something to wait for."""
    if how.get("previous_event") is None:
        return how
    return how | {"previous_event": ElasticBuffer.capture()}


def as_on_the_cpu(rank: int, pg: Any, job: str, *args: Any) -> None:
    on_buffers(rank, pg, CarryingElastic, getattr(jobs, job), *args)


def deferred_as_on_the_cpu(rank: int, pg: Any, job: str, *args: Any) -> None:
    on_buffers(rank, pg, CarryingDeferring, getattr(jobs, job), *args)


def graph(rank: int, pg: Any, case: Case) -> None:
    """Without host synchronisation both directions can be captured, and replayed with other rows and routings."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(case.tokens))
    for mode, asynchronous in itertools.product(FREE_MODES, (False, True)):
        one, other = (Deal(rank, replace(case, seed=seed), mode, max(case.tokens)) for seed in range(2))
        given = cuda_jobs.there(one.arguments())
        x, y = cuda_jobs.there(one.mine.x), cuda_jobs.there(one.answers()[rank])

        def both_ways(x: Tensor = x, y: Tensor = y, given: Any = given, asynchronous: bool = asynchronous) -> Any:
            how = {"async_with_compute_stream": asynchronous}
            got, _, weights, handle, event = buffer.dispatch(x, **given, **how)
            if event.event is not None:
                event.current_stream_wait()
            ends = handle.psum_num_recv_tokens_per_expert
            before = handle.psum_num_recv_tokens_per_scaleup_rank
            out, _, event = buffer.combine(y, handle=handle, **how, allocate_on_comm_stream=asynchronous)
            if event.event is not None:
                event.current_stream_wait()
            return got, weights, ends, before, out

        both_ways()
        replay, (got, weights, ends, before, out) = cuda_jobs.captured(both_ways)
        for deal in (other, one, other):
            x.copy_(deal.mine.x)
            given["topk_idx"].copy_(deal.mine.topk_idx)
            given["topk_weights"].copy_(deal.mine.topk_weights)
            ys = deal.answers()
            y.copy_(ys[rank])
            replay()
            deal.check_rows("recv_x", got)
            deal.check_weights(weights)
            aligned = [jobs.up(count, mode.alignment) for count in deal.counts]
            starts = [sum(aligned[:i]) for i in range(len(aligned) + 1)]
            expected = [start + count for start, count in zip(starts, deal.counts, strict=False)]
            assert ends.tolist() == (expected if mode.expand else starts[1:])
            assert before[-1].item() == len(deal.received)
            same_bits("combined_x", out, deal.oracle.combine(rank, ys))


def late_inputs(rank: int, pg: Any, case: Case) -> None:
    """Inputs that are late, and thrown away at once; fields of the handle that are read before the wait."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(case.tokens))
    for mode in jobs.MODES:
        deal = Deal(rank, case, mode, max(case.tokens))
        given, ys = cuda_jobs.there(deal.arguments()), deal.answers()
        x, y = cuda_jobs.there(deal.mine.x), cuda_jobs.there(ys[rank])
        torch.cuda._sleep(cuda_jobs.LONG)
        late = x.clone()
        got, _, _, handle, event = buffer.dispatch(late, **given, async_with_compute_stream=True)
        del late
        torch.full_like(x, torch.nan)  # takes the memory of what was thrown away, if that came back too early
        deal.check_handle(handle)
        event.current_stream_wait()
        deal.check_rows("recv_x", got)
        torch.cuda._sleep(cuda_jobs.LONG)
        late = y.clone()
        out, _, event = buffer.combine(late, handle, async_with_compute_stream=True)
        del late, handle, got
        torch.full_like(y, torch.nan)
        event.current_stream_wait()
        same_bits("combined_x", out, deal.oracle.combine(rank, ys))


def other_streams(rank: int, pg: Any, case: Case) -> None:
    """Inputs that another stream makes late: nothing but the event that is passed puts a call after them."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(case.tokens))
    side = torch.cuda.Stream()

    def late(right: Tensor) -> tuple[Tensor, Any]:
        made = torch.full_like(right, torch.nan)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(cuda_jobs.LONG)
            made.copy_(right)
            return made, buffer.capture()

    events = ("previous_event", "previous_event_before_epilogue")
    for mode, asynchronous, name in itertools.product(jobs.MODES, (False, True), events):
        deal = Deal(rank, case, mode, max(case.tokens))
        given, ys = cuda_jobs.there(deal.arguments()), deal.answers()
        how = {"async_with_compute_stream": asynchronous, "allocate_on_comm_stream": name == "previous_event"}
        x, event = late(cuda_jobs.there(deal.mine.x))
        got, _, _, handle, done = buffer.dispatch(x, **given, **how, **{name: event})
        if asynchronous:
            done.current_stream_wait()
        deal.check_rows("recv_x", got)
        y, event = late(cuda_jobs.there(ys[rank]))
        out, _, done = buffer.combine(y, handle, **how, **{name: event})
        if asynchronous:
            done.current_stream_wait()
        same_bits("combined_x", out, deal.oracle.combine(rank, ys))


def graph_on_streams(rank: int, pg: Any, case: Case) -> None:
    """A graph whose experts run on a stream of their own: events put them, and both calls, in their order."""
    buffer = ElasticBuffer(pg, num_max_tokens_per_rank=max(case.tokens))
    side = torch.cuda.Stream()
    how = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}
    for mode in FREE_MODES:
        one, other = (Deal(rank, replace(case, seed=seed), mode, max(case.tokens)) for seed in range(2))
        given = cuda_jobs.there(one.arguments())
        x, y = cuda_jobs.there(one.mine.x), cuda_jobs.there(one.answers()[rank])

        def both_ways(x: Tensor = x, y: Tensor = y, given: Any = given) -> Any:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                rows, made = x.clone(), buffer.capture()
            got, _, weights, handle, sent = buffer.dispatch(rows, **given, **how, previous_event=made)
            with torch.cuda.stream(side):
                sent.current_stream_wait()
                received, answers, made = got.clone(), y.clone(), buffer.capture()
            out, _, done = buffer.combine(answers, handle, **how, previous_event=made)
            done.current_stream_wait()
            return received, weights, out, got, handle, rows, answers

        both_ways()
        replay, (received, weights, out, *_) = cuda_jobs.captured(both_ways)
        for deal in (other, one, other):
            x.copy_(deal.mine.x)
            given["topk_idx"].copy_(deal.mine.topk_idx)
            given["topk_weights"].copy_(deal.mine.topk_weights)
            ys = deal.answers()
            y.copy_(ys[rank])
            replay()
            deal.check_rows("recv_x", received)
            deal.check_weights(weights)
            same_bits("combined_x", out, deal.oracle.combine(rank, ys))
