"""The costs of calls besides bytes: the host's time, graphs, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.checks import expected_sums, must_equal
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.inputs import draw
from tokenferry.bench.core.session import Label, Session, Step, expert_group
from tokenferry.bench.suites.calls import ON_DEVICE

TOKENS = 128
CALLS = 40
"""Calls in each batch: few enough that the queue of launches never blocks the host."""

BATCHES = 15
WARMUP_BATCHES = 2


def measure_host(session: Session) -> None:
    """Measure host time of eager calls, and a pair in a graph."""
    session.attempt("host time", _host_times, session)
    session.attempt("dispatch + combine as a graph", _throughput_graph, session)


def measure_memory(session: Session) -> None:
    """Measure the device memory that one group takes."""
    for tokens in session.settings.tokens[-1:]:
        session.attempt("memory of a group", _memory, session, tokens)


def _host_times(session: Session) -> None:
    sizes = session.settings.sizes(TOKENS)
    inputs = draw(sizes, 0, session.rank, session.device.torch_device)
    routing = inputs.routing
    with expert_group(session, TOKENS, heap_for=8) as group:
        plan = group.dispatch(inputs.x, routing, options=ON_DEVICE).plan
        rows = group.empty_rows(plan)
        calls: dict[str, Callable[[], object]] = {
            "dispatch, counts on device, bf16": lambda: group.dispatch(inputs.x, routing, options=ON_DEVICE),
            "dispatch, counts on device, fp8": lambda: group.dispatch(inputs.quantized, routing, options=ON_DEVICE),
            "dispatch, plan kept, bf16": lambda: group.redispatch(inputs.x, plan),
            "dispatch, plan kept, fp8": lambda: group.redispatch(inputs.quantized, plan),
            "combine, rows in the group's memory": lambda: group.combine(rows, plan),
        }
        for name, call in calls.items():
            with no_collections():
                samples = host_time(session, call)
            item = {"call": name, "tokens": TOKENS, **samples}
            medians = session.gather(samples["median_us"])
            session.send({"host": {**item, "median_us": max(medians), "by_rank_us": medians}})


def host_time(session: Session, call: Callable[[], object], batches: int = BATCHES) -> dict[str, float]:
    """Time one call on the host, which never waits for the device; microseconds of this rank. Collective."""
    times = []
    for batch in range(WARMUP_BATCHES + batches):
        session.synchronize_ranks()
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            end = time.perf_counter()
            if batch >= WARMUP_BATCHES:
                times.append((end - start) * 1e6)
    session.device.synchronize()
    return {"median_us": statistics.median(times), "mean_us": statistics.fmean(times), "least_us": min(times)}


def empty_us(session: Session, batches: int = BATCHES) -> float:
    """Return the microseconds of ``torch.empty(8)`` on the slowest host, the unit of host times. Collective.

    The least that a program can do with torch. Hosts differ in it by a factor of two, and one from minute to minute.
    """
    device = session.device.torch_device
    found = host_time(session, lambda: torch.empty(8, dtype=torch.float32, device=device), batches)
    slowest: float = max(session.gather(found["median_us"]))
    return slowest


def _throughput_graph(session: Session) -> None:
    sizes = session.settings.sizes(TOKENS)
    inputs = draw(sizes, 0, session.rank, session.device.torch_device)
    routing = inputs.routing
    with expert_group(session, TOKENS, heap_for=8) as group:
        sums = torch.empty_like(inputs.x)

        def pair() -> None:
            sent = group.dispatch(inputs.x, routing, options=ON_DEVICE)
            assert isinstance(sent.x, torch.Tensor)
            y = group.empty_rows(sent.plan)
            torch.mul(sent.x, 1 + session.rank / 8, out=y)
            group.combine(y, sent.plan, out=sums)

        def prepare() -> Step:
            replay = session.device.capture(pair)
            sums.zero_()
            replay()
            session.device.synchronize()
            must_equal("dispatch + combine as a graph", sums, expected_sums(sizes, inputs))
            return lambda i: replay()

        label = Label("tokenferry", "dispatch + multiply + combine, one graph", "bf16", TOKENS)
        session.case(label, prepare)
        session.device.synchronize()


def _memory(session: Session, tokens: int) -> None:
    """Measure the device's memory before and after a group is made and has made its first calls, all ranks idle."""
    settings = session.settings
    sizes = settings.sizes(tokens)
    inputs = draw(sizes, 0, session.rank, session.device.torch_device)
    routing = inputs.routing

    def used_bytes() -> int:
        session.synchronize_ranks()
        return session.device.used_bytes()

    before = used_bytes()
    with ExpertGroup(session.pg, sizes.shape, backend=settings.backend, timeout_s=settings.timeout_s) as group:
        made = used_bytes()
        group.warmup()
        warm = used_bytes()
        sent = group.dispatch(inputs.x, routing)
        group.combine(group.empty_rows(sent.plan).zero_(), sent.plan)
        called = used_bytes()
        received = sent.plan.num_received or 0
        del sent
    rows = settings.ranks * tokens * 2 * settings.hidden
    item = {
        "tokens": tokens,
        "made_mb": (made - before) / 1e6,
        "warm_mb": (warm - before) / 1e6,
        "called_mb": (called - before) / 1e6,
        "closed_mb": (used_bytes() - before) / 1e6,
        "worst_rows_mb": rows / 1e6,
        "received_mb": received * 2 * settings.hidden / 1e6,
    }
    session.send({"memory": item})
