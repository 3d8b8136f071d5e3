"""Eager calls as a program feels them: wall clock and host time, by the native API, DeepEP's and all_to_all_single."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.bench.baselines.nccl import NcclBaseline, baseline_calls, baseline_decode
from tokenferry.bench.core.inputs import Sizes
from tokenferry.bench.core.session import Session, Step, baseline_group, expert_group
from tokenferry.bench.core.sets import MANY_TOKENS, Call, Sets
from tokenferry.bench.core.wall import Seconds, wall_times
from tokenferry.bench.suites.decode import HEAP_FOR, new_answers
from tokenferry.bench.suites.decode_reference import DecodeReference, Pool
from tokenferry.bench.suites.eager_native import native_calls, native_decode
from tokenferry.bench.suites.eager_shim import Shim, make_buffer, shim_calls, shim_decode
from tokenferry.bench.suites.host_time import empty_us, host_time

CALLS = 60
"""Calls of a run back to back; a third of it from `MANY_TOKENS` on, where the last wait does not count any more."""

CPU_CALLS = 3
"""The same on CPUs, where no launch has to be hidden."""

HOST_TOKENS = 128
"""The host's time is measured up to this T: beyond, the device decides when a call returns."""

MOST_DECODE_TOKENS = 256
"""The largest T of a decode pair."""

HOST_BATCHES = 5
DECODE_SETS = 2


@torch.no_grad()
def measure_eager(session: Session) -> None:
    """Measure every library for every T."""
    settings = session.settings
    largest = settings.sizes(max(settings.tokens))
    session.attempt("torch.empty(8)", _empty, session)
    buffer = session.attempt("Buffer: making one", make_buffer, session.pg, largest)
    own = session.attempt("all_to_all_single: making a process group", baseline_group, session)
    for tokens in settings.tokens:
        _measure_tokens(session, settings.sizes(tokens), buffer, own)
    session.attempt("decode pairs", _measure_decode, session, buffer, own)
    session.device.synchronize()
    if buffer is not None:
        buffer.destroy()
    if own is not None:
        dist.destroy_process_group(own)


def _measure_tokens(session: Session, sizes: Sizes, buffer: Shim | None, own: dist.ProcessGroup | None) -> None:
    what = f"T={sizes.tokens}"
    sets = session.attempt(f"inputs, {what}", Sets, session, sizes)
    if sets is None:
        return
    with ExitStack() as stack:
        opened = expert_group(session, sizes.tokens, heap_for=HEAP_FOR)
        group = session.attempt(f"tokenferry: making a group, {what}", stack.enter_context, opened)
        if group is not None:
            _measure_calls(session, "tokenferry", sizes.tokens, lambda: native_calls(sets, group))
    if buffer is not None:
        _measure_calls(session, "Buffer", sizes.tokens, lambda: shim_calls(sets, buffer))
    if own is not None:
        baseline = NcclBaseline(own, sizes)
        _measure_calls(session, baseline.name, sizes.tokens, lambda: baseline_calls(sets, baseline))


def _measure_decode(session: Session, buffer: Shim | None, own: dist.ProcessGroup | None) -> None:
    """Measure decode pairs; M is the largest T."""
    settings, device = session.settings, session.device.torch_device
    counts = [tokens for tokens in settings.decode_tokens if tokens <= MOST_DECODE_TOKENS]
    if not counts:
        return
    sizes = settings.sizes(max(counts))
    with expert_group(session, sizes.tokens, heap_for=HEAP_FOR) as group:
        pool, y = Pool(sizes, device), new_answers(group)
        pool.fill(y, session.rank * sizes.local_experts, 0)
        for tokens in counts:
            references = [
                DecodeReference(settings.sizes(tokens), variant, session.rank, pool) for variant in range(DECODE_SETS)
            ]
            _measure_calls(session, "tokenferry", tokens, partial(native_decode, references, group, y))
            if buffer is not None:
                _measure_calls(session, "Buffer", tokens, partial(shim_decode, references, buffer, y, sizes))
            if own is not None:
                baseline = NcclBaseline(own, settings.sizes(tokens))
                sets = Sets(session, settings.sizes(tokens))
                _measure_calls(session, baseline.name, tokens, partial(baseline_decode, sets, baseline))


def _measure_calls(session: Session, library: str, tokens: int, make: Callable[[], Iterable[Call]]) -> None:
    """Check, time and report the calls of a library; one that fails is left out. Collective."""
    calls = session.attempt(f"{library}: first dispatches, T={tokens}", lambda: list(make()))
    for call in calls or ():
        what = f"{library}: {call.name}, {call.rows}, T={tokens}"
        # Apart, since a rank whose results are right must not begin with the timing alone.
        step = session.attempt(what, _prepared, session, call)
        found = None if step is None else session.attempt(what, _timed, session, step, tokens)
        # Again, since calls that were made many times may have taken a faster path than the first ones.
        if found is None or session.attempt(what, _prepared, session, call) is None:
            continue
        wall, host_us = found
        item = {
            "library": library,
            "call": call.name,
            "rows": call.rows,
            "tokens": tokens,
            **session.summaries(wall),
            "host_us": None if host_us is None else max(session.gather(host_us)),
        }
        session.send({"eager": item})


def _prepared(session: Session, call: Call) -> Step:
    with _default_device(session):
        return call.prepare()


def _timed(session: Session, step: Step, tokens: int) -> tuple[Seconds, float | None]:
    """Return wall-clock times, and the median of the host's time in microseconds if T is small."""
    with _default_device(session):
        on_cpu = session.settings.backend == "cpu"
        few = CPU_CALLS if on_cpu else max(1, CALLS // 3)
        wall = wall_times(session, step, few if on_cpu or tokens >= MANY_TOKENS else CALLS)
        if tokens > HOST_TOKENS:
            return wall, None
        return wall, host_time(session, partial(step, 0), HOST_BATCHES)["median_us"]


def _empty(session: Session) -> bool:
    session.send({"torch.empty(8)": {"us": empty_us(session, HOST_BATCHES)}})
    return True


def _default_device(session: Session) -> AbstractContextManager[Any]:
    """Make the device torch's default if the settings ask for it: then torch's functions go through a Python mode."""
    return session.device.torch_device if session.settings.default_device else nullcontext()
