"""What ranks with GPUs do in the tests of the shim: the jobs of the CPU on another `Buffer`, and what streams add."""

from typing import Any

import deep_ep_jobs as jobs
import torch
from torch import Tensor

from tokenferry.compat.deep_ep import Buffer
from tokenferry.testing.cases import Case, answers
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle

LONG = 200_000_000
"""Cycles that a stream sleeps where it shall be late: about a tenth of a second."""


class CarryingBuffer(Buffer):
    """A `Buffer` that takes CPU tensors, as the jobs of the CPU have them, and waits for what it returns."""

    def get_dispatch_layout(self, topk_idx: Tensor, *rest: Any, **how: Any) -> Any:
        return _waited(super().get_dispatch_layout(there(topk_idx), *rest, **_now(how)))

    def dispatch(self, x: Any, *rest: Any, **arguments: Any) -> Any:
        return _waited(super().dispatch(there(x), *rest, **_now(there(arguments))))

    def combine(self, *rest: Any, **arguments: Any) -> Any:
        return _waited(super().combine(*there(rest), **_now(there(arguments))))


def there(value: Any) -> Any:
    """The same with every CPU tensor on this rank's GPU, strides kept."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)
    if type(value) is tuple:
        return tuple(there(one) for one in value)
    if isinstance(value, dict):
        return {name: there(one) for name, one in value.items()}
    return value


def _now(how: dict[str, Any]) -> dict[str, Any]:
    """Wait for the copies to the GPU, too, where there is something to wait for."""
    if how.get("previous_event") is None:
        return how
    return how | {"previous_event": Buffer.capture()}


def _waited(result: tuple[Any, ...]) -> tuple[Any, ...]:
    if result[-1].event is not None:
        result[-1].current_stream_wait()
    return result


def as_on_the_cpu(rank, pg, job: str, *args: Any) -> Any:
    jobs.Buffer = CarryingBuffer
    try:
        return getattr(jobs, job)(rank, pg, *args)
    finally:
        jobs.Buffer = Buffer


def _expected(case: Case, rank: int) -> tuple[Oracle, list[Tensor]]:
    oracle = Oracle(case.inputs(), case.experts)
    return oracle, [answers(case, oracle, r, oracle.num_delivered(r), case.dtype) for r in range(case.ranks)]


def streams(rank, pg, case: Case) -> None:
    """Inputs that are late, inputs that are thrown away at once, results that are read at once."""
    oracle, ys = _expected(case, rank)
    mine = case.inputs()[rank]
    topk_idx, weights = there(mine.topk_idx), there(mine.topk_weights)
    x, y = there(mine.x), there(ys[rank])
    buffer = Buffer(pg)
    assert isinstance(buffer.get_comm_stream(), torch.cuda.Stream)
    given = jobs.layout_arguments(buffer, topk_idx, case.experts)
    torch.cuda.synchronize()
    for own_event in (False, True):
        side = torch.cuda.Stream() if own_event else torch.cuda.current_stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG)
            late = x.clone()
            event = Buffer.capture()
        how: dict[str, Any] = {"async_finish": True}
        if own_event:
            how |= {"previous_event": event, "allocate_on_comm_stream": True}
        got, ids, got_weights, _, handle, event = buffer.dispatch(
            late, topk_idx=topk_idx, topk_weights=weights, **given, **how
        )
        del late
        torch.full_like(x, torch.nan)  # takes the memory of what was thrown away, if that came back too early
        event.current_stream_wait()
        same_bits("recv_x", got, oracle.x(rank))
        same_bits("recv_topk_idx", ids, oracle.topk_idx(rank))
        same_bits("recv_topk_weights", got_weights, oracle.weights(rank))

        torch.cuda._sleep(LONG)
        late = y.clone()
        out, _, event = buffer.combine(late, handle, async_finish=True)
        del late
        torch.full_like(y, torch.nan)
        event.current_stream_wait()
        same_bits("combined_x", out, oracle.combine(rank, ys))


def overlap(rank, pg, case: Case) -> None:
    """The caller's stream does not wait for an asynchronous call, and does for a synchronous one."""
    mine = case.inputs()[rank]
    topk_idx = there(mine.topk_idx)
    buffer = Buffer(pg)
    buffer.get_dispatch_layout(topk_idx, case.experts)
    torch.cuda.synchronize()
    with torch.cuda.stream(buffer.get_comm_stream()):
        torch.cuda._sleep(LONG)
    *_, event = buffer.get_dispatch_layout(topk_idx, case.experts, async_finish=True)
    mark = torch.cuda.Event()
    mark.record()
    mark.synchronize()
    assert not event.event.has_passed(), "the caller's stream waited for the call"
    event.current_stream_wait()
    torch.cuda.current_stream().synchronize()
    assert event.event.has_passed()


def graph(rank, pg, case: Case) -> None:
    """num_worst_tokens: nothing waits, so that both directions can be captured, and replayed with other rows."""
    oracle, ys = _expected(case, rank)
    mine = case.inputs()[rank]
    topk_idx, weights, x = there(mine.topk_idx), there(mine.topk_weights), there(mine.x)
    room, num = case.ranks * max(case.tokens), oracle.num_delivered(rank)
    y = torch.full((room, case.hidden), torch.nan, dtype=case.dtype, device="cuda")
    y[:num] = there(ys[rank])
    buffer = Buffer(pg)

    def both_ways() -> tuple[Tensor, Tensor, Tensor]:
        given = jobs.layout_arguments(buffer, topk_idx, case.experts)
        got, ids, _, counts, handle, event = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, num_worst_tokens=room, async_finish=True, **given
        )
        assert counts == []
        event.current_stream_wait()
        return got, ids, buffer.combine(y, handle)[0]

    both_ways()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got, ids, out = both_ways()
    for factor in (1, 2):
        x.copy_(there(mine.x) * factor)
        captured.replay()
        same_bits("recv_x", got[:num], oracle.x(rank) * factor)
        same_bits("recv_topk_idx", ids[:num], oracle.topk_idx(rank))
        assert (ids[num:] == -1).all()
        same_bits("combined_x", out, oracle.combine(rank, ys))


def low_latency(rank, pg, case: Case, max_tokens: int) -> None:
    """Experts that return what they get: the sum is the token, times the sum of its weights, slot by slot."""
    mine = case.inputs()[rank]
    topk_idx, weights, x = there(mine.topk_idx), there(mine.topk_weights), there(mine.x)
    gates = torch.zeros(x.shape, dtype=torch.float32, device="cuda")
    for slot in range(case.top_k):
        product = weights[:, slot, None] * x.float()
        gates += torch.where(topk_idx[:, slot, None] >= 0, product, torch.zeros_like(product))
    buffer = Buffer(pg, low_latency_mode=True)
    for how in ({}, {"async_finish": True}, {"return_recv_hook": True}):
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            x, topk_idx, max_tokens, case.experts, use_fp8=False, **how
        )
        for wait in (hook, event.current_stream_wait if event.event else None):
            if wait is not None:
                wait()
        assert counts.tolist() == Oracle(case.inputs(), case.experts).expert_counts(rank)
        for zero_copy in (False, True):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
            out, event, hook = buffer.low_latency_combine(rows, topk_idx, weights, handle, zero_copy=zero_copy, **how)
            for wait in (hook, event.current_stream_wait if event.event else None):
                if wait is not None:
                    wait()
            same_bits("combined_x", out, gates.to(case.dtype).cpu())
