"""What calls cost besides bytes: the host's time, graphs, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from tokenferry.api import ExpertGroup
from tokenferry.bench.core.clock import Step
from tokenferry.bench.core.device import gather, no_collections
from tokenferry.bench.core.inputs import must_equal
from tokenferry.bench.core.session import Label, Settings, Trial, expert_group, trial
from tokenferry.bench.core.static_inputs import draw, expected_sums
from tokenferry.bench.suites.calls import ON_DEVICE
from tokenferry.types import MoeShape, Quantized, Routing

TOKENS = 128
CALLS = 40
"""Calls in each batch: few enough that the queue of launches never blocks the host."""

BATCHES = 15
WARMUP_BATCHES = 2


def measure_host(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure host time of eager calls, and a pair in a graph; a job of `World`. Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        here.tell({"now": "host time"})
        here.attempt("host time", lambda: _host_times(here))
        here.tell({"now": "graphs"})
        here.attempt("dispatch + combine as a graph", lambda: _throughput_graph(here))


def measure_memory(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure the device memory that one group takes; a job of `World`. Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        here.tell({"now": "memory"})
        for tokens in settings.tokens[-1:]:
            here.attempt("memory of a group", partial(_memory, here, tokens))


def _host_times(here: Trial) -> None:
    sizes = here.settings.sizes(TOKENS)
    inputs = draw(sizes, 0, here.rank, here.bed.device)
    routing = Routing(inputs.topk_idx, inputs.topk_weights)
    quantized = Quantized(inputs.data, inputs.scale)
    with expert_group(here, TOKENS, room=8) as group:
        plan = group.dispatch(inputs.x, routing, options=ON_DEVICE).plan
        rows = group.empty_rows(plan)
        calls: dict[str, Callable[[], object]] = {
            "dispatch, counts on device, bf16": lambda: group.dispatch(inputs.x, routing, options=ON_DEVICE),
            "dispatch, counts on device, fp8": lambda: group.dispatch(quantized, routing, options=ON_DEVICE),
            "dispatch, plan kept, bf16": lambda: group.redispatch(inputs.x, plan),
            "dispatch, plan kept, fp8": lambda: group.redispatch(quantized, plan),
            "combine, rows in the group's memory": lambda: group.combine(rows, plan),
        }
        for name, call in calls.items():
            with no_collections():
                samples = host_time(here, call)
            item = {"call": name, "tokens": TOKENS, **samples}
            medians = gather(here.pg, samples["median_us"])
            here.tell({"host": {**item, "median_us": max(medians), "by_rank_us": medians}})


def host_time(here: Trial, call: Callable[[], object], batches: int = BATCHES) -> dict[str, float]:
    """Microseconds that one call takes on the host, with the device never waited for. Collective; of this rank."""
    times = []
    for batch in range(WARMUP_BATCHES + batches):
        here.meet()
        for _ in range(CALLS):
            start = time.perf_counter()
            call()
            end = time.perf_counter()
            if batch >= WARMUP_BATCHES:
                times.append((end - start) * 1e6)
    here.bed.synchronize()
    return {"median_us": statistics.median(times), "mean_us": statistics.fmean(times), "least_us": min(times)}


def _throughput_graph(here: Trial) -> None:
    sizes = here.settings.sizes(TOKENS)
    inputs = draw(sizes, 0, here.rank, here.bed.device)
    routing = Routing(inputs.topk_idx, inputs.topk_weights)
    with expert_group(here, TOKENS, room=8) as group:
        sums = torch.empty_like(inputs.x)

        def pair() -> None:
            sent = group.dispatch(inputs.x, routing, options=ON_DEVICE)
            assert isinstance(sent.x, torch.Tensor)
            y = group.empty_rows(sent.plan)
            torch.mul(sent.x, 1 + here.rank / 8, out=y)
            group.combine(y, sent.plan, out=sums)

        def prepare() -> Step:
            replay = here.bed.capture(pair)
            sums.zero_()
            replay()
            here.bed.synchronize()
            must_equal("dispatch + combine as a graph", sums, expected_sums(sizes, inputs))
            return lambda i: replay()

        label = Label("tokenferry", "dispatch + multiply + combine, one graph", "bf16", TOKENS)
        here.case(label, prepare)
        here.bed.synchronize()


def _memory(here: Trial, tokens: int) -> None:
    """Memory of the device before and after a group is made and has made its first calls, all ranks idle."""
    settings, bed = here.settings, here.bed
    shape = MoeShape(settings.experts, settings.top_k, settings.hidden, tokens)
    sizes = settings.sizes(tokens)
    inputs = draw(sizes, 0, here.rank, bed.device)
    routing = Routing(inputs.topk_idx, inputs.topk_weights)
    here.meet()
    before = bed.used_bytes()
    with ExpertGroup(here.pg, shape, backend=settings.device, timeout_s=settings.timeout_s) as group:
        here.meet()
        made = bed.used_bytes()
        group.warmup()
        here.meet()
        warm = bed.used_bytes()
        sent = group.dispatch(inputs.x, routing)
        group.combine(group.empty_rows(sent.plan).zero_(), sent.plan)
        here.meet()
        called = bed.used_bytes()
        received = sent.plan.num_received or 0
        del sent
    here.meet()
    rows = settings.ranks * tokens * 2 * settings.hidden
    item = {
        "tokens": tokens,
        "made_mb": (made - before) / 1e6,
        "warm_mb": (warm - before) / 1e6,
        "called_mb": (called - before) / 1e6,
        "closed_mb": (bed.used_bytes() - before) / 1e6,
        "worst_rows_mb": rows / 1e6,
        "received_mb": received * 2 * settings.hidden / 1e6,
    }
    here.tell({"memory": item})
