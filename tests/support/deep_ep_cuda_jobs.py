"""Jobs of ranks with GPUs in the tests of the shim: those of the CPU on another `Buffer`, and jobs with streams."""

import gc
import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from support import deep_ep_decode_jobs as decode_jobs
from support import deep_ep_jobs as jobs
from tokenferry.compat.deep_ep import Buffer, EventOverlap
from tokenferry.testing.cases import Case, answers
from tokenferry.testing.compare import same_bits
from tokenferry.testing.oracle import Oracle

LONG = 200_000_000
"""Cycles that a stream sleeps where it shall be late: about a tenth of a second."""
LATE_S = 0.2
"""Seconds, the same for a rank."""
DEADLINE_S = 5
"""Seconds that calls wait for a rank that is gone."""
DEVICE = "cuda"
"""Where `CarryingBuffer` carries tensors."""


class CarryingBuffer(Buffer):
    """A `Buffer` that takes CPU tensors, as the jobs of the CPU have them, and waits for what it returns.

    Low-latency calls: rows that it carried are overwritten as soon as the call has sent them; and what a caller passes
    to be written to comes back in the caller's own tensors, with the call or with its hook.
    """

    def get_dispatch_layout(self, topk_idx: Tensor, *rest: Any, **how: Any) -> Any:
        return _waited(super().get_dispatch_layout(there(topk_idx), *rest, **_now(how)))

    def dispatch(self, x: Any, *rest: Any, **arguments: Any) -> Any:
        return _waited(super().dispatch(there(x), *there(rest), **_now(there(arguments))))

    def combine(self, *rest: Any, **arguments: Any) -> Any:
        return _waited(super().combine(*there(rest), **_now(there(arguments))))

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        status = there(mask_status)
        super().low_latency_query_mask_buffer(status)
        mask_status.copy_(status)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        max_tokens: int,
        num_experts: int,
        received: Tensor | None = None,
        waited: Tensor | None = None,
        **how: Any,
    ) -> Any:
        rows, choices, *counters = there((x, topk_idx, received, waited))
        *sent, event, hook = super().low_latency_dispatch(rows, choices, max_tokens, num_experts, *counters, **how)
        _wait(event)
        _spoil(rows, x)
        if hook is None and choices is not topk_idx:
            choices.fill_(-1)  # combine gets it again
        return *sent, event, _brought_back(hook, ((received, counters[0]), (waited, counters[1])))

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        *,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
        **how: Any,
    ) -> Any:
        rows, into, waited = there((x, out, combine_wait_recv_cost_stats))
        got, event, hook = super().low_latency_combine(
            rows,
            there(topk_idx),
            there(topk_weights),
            handle,
            out=into,
            combine_wait_recv_cost_stats=waited,
            **how,
        )
        _wait(event)
        assert out is None or got is into
        _spoil(rows, x)
        hook = _brought_back(hook, ((out, into), (combine_wait_recv_cost_stats, waited)))
        return got if out is None else out, event, hook


def _wait(event: EventOverlap) -> None:
    if event.event is not None:
        event.current_stream_wait()


def _spoil(rows: Tensor, mine: Tensor) -> None:
    """Overwrite rows that have been sent, unless they are the caller's own."""
    if rows is not mine:
        rows.fill_(torch.nan)


def _brought_back(
    hook: Callable[[], None] | None, pairs: tuple[tuple[Tensor | None, Tensor | None], ...]
) -> Callable[[], None] | None:
    """Copy (caller's tensor, its copy) back: now, or after the hook."""

    def bring_back() -> None:
        for mine, copy in pairs:
            if mine is not None:
                mine.copy_(copy)

    def receive() -> None:
        hook()
        bring_back()

    if hook is None:
        bring_back()
        return None
    return receive


def there(value: Any) -> Any:
    """The same with every CPU tensor on this rank's GPU, strides kept."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE).copy_(value)
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
    return _carrying(jobs, job, rank, pg, *args)


def decode_as_on_the_cpu(rank, pg, job: str, *args: Any) -> Any:
    return _carrying(decode_jobs, job, rank, pg, *args)


def _carrying(module: ModuleType, job: str, *args: Any) -> Any:
    with mock.patch.object(module, "Buffer", CarryingBuffer):
        return getattr(module, job)(*args)


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


def captured(calls: Callable[[], tuple[Any, ...]]) -> tuple[Callable[[], None], tuple[Any, ...]]:
    """Capture calls that have been made before; return the replay of the graph, and its results."""
    torch.cuda.synchronize()
    gc.collect()  # a Buffer of an earlier job must not be freed in the middle of the capture
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        results = calls()
    return made.replay, results


def graph(rank, pg, case: Case) -> None:
    """num_worst_tokens: nothing waits, so that both directions can be captured, and replayed with other rows."""
    oracle, ys = _expected(case, rank)
    mine = case.inputs()[rank]
    topk_idx, weights, x = there(mine.topk_idx), there(mine.topk_weights), there(mine.x)
    capacity, num = case.ranks * max(case.tokens), oracle.num_delivered(rank)
    y = torch.full((capacity, case.hidden), torch.nan, dtype=case.dtype, device="cuda")
    y[:num] = there(ys[rank])
    buffer = Buffer(pg)

    def both_ways() -> tuple[Tensor, Tensor, Tensor]:
        given = jobs.layout_arguments(buffer, topk_idx, case.experts)
        got, ids, _, counts, handle, event = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, num_worst_tokens=capacity, async_finish=True, **given
        )
        assert counts == []
        event.current_stream_wait()
        return got, ids, buffer.combine(y, handle)[0]

    both_ways()
    replay, (got, ids, out) = captured(both_ways)
    for factor in (1, 2):
        x.copy_(there(mine.x) * factor)
        replay()
        same_bits("recv_x", got[:num], oracle.x(rank) * factor)
        same_bits("recv_topk_idx", ids[:num], oracle.topk_idx(rank))
        assert (ids[num:] == -1).all()
        same_bits("combined_x", out, oracle.combine(rank, ys))


def low_latency(rank, pg, case: Case) -> None:
    """Experts that return what they get: the sum is the token, times the sum of its weights, slot by slot."""
    mine = case.inputs()[rank]
    topk_idx, weights, x = there(mine.topk_idx), there(mine.topk_weights), there(mine.x)
    gates = torch.zeros(x.shape, dtype=torch.float32, device=DEVICE)
    for slot in range(case.top_k):
        product = weights[:, slot, None] * x.float()
        gates += torch.where(topk_idx[:, slot, None] >= 0, product, torch.zeros_like(product))
    buffer = Buffer(pg, low_latency_mode=True)
    for how in ({}, {"async_finish": True}, {"return_recv_hook": True}):
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            x, topk_idx, decode_jobs.M, case.experts, use_fp8=False, **how
        )
        _received(event, hook)
        assert counts.tolist() == Oracle(case.inputs(), case.experts).expert_counts(rank)
        for zero_copy in (False, True):
            given = rows
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
                given = torch.full_like(rows, torch.nan)  # so that nothing but the buffer can be right
            out, event, hook = buffer.low_latency_combine(given, topk_idx, weights, handle, zero_copy=zero_copy, **how)
            _received(event, hook)
            same_bits("combined_x", out, gates.to(case.dtype).cpu())


def _received(event: EventOverlap, hook: Callable[[], None] | None) -> None:
    """Wait for a low-latency call, however it was made."""
    _wait(event)
    if hook is not None:
        hook()


def low_latency_counters(rank, pg, case: Case) -> None:
    """All wait for rank 0; the counters hold something already, and each call adds."""
    mine = case.inputs()[rank]
    num_local = case.experts // case.ranks
    counts = torch.tensor(Oracle(case.inputs(), case.experts).expert_counts(rank), dtype=torch.int32)
    received = torch.arange(num_local, dtype=torch.int32, device=DEVICE)
    waited, waited_home = torch.full((2, case.ranks), 7, dtype=torch.int64, device=DEVICE)
    known, known_home = waited.clone(), waited_home.clone()
    topk_idx, weights, x = there(mine.topk_idx), there(mine.topk_weights), there(mine.x)
    buffer = Buffer(pg, low_latency_mode=True)
    # What the first calls wait for, on the host, is no part of the counters.
    rows, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, decode_jobs.M, case.experts, use_fp8=False)
    buffer.low_latency_combine(rows, topk_idx, weights, handle)
    for turn, how in enumerate(({}, {"async_finish": True}, {"return_recv_hook": True}), 1):
        _let_wait(pg, rank)
        rows, _, handle, event, hook = buffer.low_latency_dispatch(
            x, topk_idx, decode_jobs.M, case.experts, received, waited, use_fp8=False, **how
        )
        _received(event, hook)
        same_bits("received", received, torch.arange(num_local, dtype=torch.int32) + turn * counts)
        _let_wait(pg, rank)
        _, event, hook = buffer.low_latency_combine(
            rows, topk_idx, weights, handle, combine_wait_recv_cost_stats=waited_home, **how
        )
        _received(event, hook)
        for before, stats in ((known, waited), (known_home, waited_home)):
            added = (stats - before).tolist()
            before.copy_(stats)
            assert added[rank] == 0, "a rank waited for itself"
            assert min(added) >= 0
            if rank:
                # Nanoseconds, not microseconds; a rank that comes late itself waits for less.
                assert 1e6 < added[0] < 60e9, f"waited {added[0]} ns for rank 0"


def _let_wait(pg, rank: int) -> None:
    """Rank 0 comes late to the next call."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    pg.barrier().wait()
    if rank == 0:
        time.sleep(LATE_S)


def low_latency_graph(rank, pg, case: Case, how: dict[str, bool]) -> None:
    """FP8 rows there, and home in two ways, in a graph; replays take other rows, weights, choices and answers."""
    num_local = case.experts // case.ranks
    first = case.inputs()[rank]
    topk_idx, weights, x = there(first.topk_idx), there(first.topk_weights), there(first.x)
    y = torch.zeros(num_local, case.ranks * decode_jobs.M, case.hidden, dtype=case.dtype, device=DEVICE)
    poison, out = torch.full_like(y, torch.nan), torch.zeros_like(x)
    received = torch.zeros(num_local, dtype=torch.int32, device=DEVICE)
    buffer = Buffer(pg, low_latency_mode=True)

    def pair() -> tuple[Any, ...]:
        rows, counts, handle, event, hook = buffer.low_latency_dispatch(
            x, topk_idx, decode_jobs.M, case.experts, received, round_scale=True, **how
        )
        _received(event, hook)
        got, event, hook = buffer.low_latency_combine(y, topk_idx, weights, handle, out=out, **how)
        _received(event, hook)
        assert got is out
        buffer.get_next_low_latency_combine_buffer(handle).copy_(y)
        again, event, hook = buffer.low_latency_combine(poison, topk_idx, weights, handle, zero_copy=True, **how)
        _received(event, hook)
        return *rows, counts, *handle[:2], again

    pair()
    replay, results = captured(pair)
    total = torch.tensor(Oracle(case.inputs(), case.experts).expert_counts(rank), dtype=torch.int32)
    for seed, routing in enumerate(("even", "half_dropped", "all_to_expert_0", "nothing", "repeated", "one_rank_idle")):
        step = replace(case, routing=routing, seed=seed)
        sent = step.inputs()
        oracle = decode_jobs.oracle_of(sent, case.experts)
        ys = [answers(step, oracle, r, num_local * y.shape[1], case.dtype) for r in range(case.ranks)]
        mine = (sent[rank].x, sent[rank].topk_idx, sent[rank].topk_weights, ys[rank].view(y.shape))
        for static, new in zip((x, topk_idx, weights, y), mine, strict=True):
            static.copy_(new)
        for go in (replay, pair) if seed % 3 == 2 else (replay,):  # now and then the same without the graph
            out.fill_(torch.nan)
            found = go() or results
            data, scale, counts, src_info, layout_range, again = found
            decode_jobs.check_cast(oracle, rank, (data, scale), round_scale=True, use_ue8m0=False)
            decode_jobs.check_handle(oracle, rank, counts, (src_info, layout_range))
            total = total + counts.cpu()
            same_bits("received in all", received, total)
            same_bits("combined", out, oracle.decode_combine(rank, ys))
            same_bits("zero copy", again, oracle.decode_combine(rank, ys))


def low_latency_lost_rank(rank, pg, case: Case) -> None:
    """As on the CPU, with a deadline for which a test can wait."""
    decode_as_on_the_cpu(rank, pg, "shrink", case)  # compiles all kernels: no rank shall be late for that
    with mock.patch.dict(os.environ, TOKENFERRY_TIMEOUT_S=str(DEADLINE_S)):
        decode_as_on_the_cpu(rank, pg, "lost_rank", case)


def low_latency_gone_at_once(rank, pg, case: Case, leave: Callable[[], None]) -> None:
    """As on the CPU, likewise."""
    decode_as_on_the_cpu(rank, pg, "shrink", case)
    with mock.patch.dict(os.environ, TOKENFERRY_TIMEOUT_S=str(DEADLINE_S)):
        decode_as_on_the_cpu(rank, pg, "gone_at_once", case, leave)
