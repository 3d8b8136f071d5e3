"""Communication beside expert GEMMs: how much of it is hidden, and what it costs the GEMMs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.bed import no_collections, slowest
from tokenferry.bench.inputs import expert, must_equal
from tokenferry.bench.sets import check_rows, data_of, draw, expected_sums, scale_of
from tokenferry.bench.trial import Settings, Trial, expert_group, trial
from tokenferry.words import Quantized, Routing

WIDTH = 2048
"""Columns of an expert's hidden layer: DeepSeek-V3's."""

WEIGHT_BYTES = 8 << 30
"""Most memory for weights; experts beyond that share some."""

WARMUP = 3

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the slowest rank, medians.

    Attributes:
        gemm: The GEMMs alone.
        comm: The communication alone.
        both: From the start of either to the end of both, side by side.
        gemm_beside: The GEMMs while communication goes on.
        comm_beside: The communication while GEMMs go on.
    """

    gemm: float
    comm: float
    both: float
    gemm_beside: float
    comm_beside: float

    @property
    def hidden(self) -> float:
        """The part of the communication that costs no time of its own: 1 is all of it."""
        return min(1.0, (self.gemm + self.comm - self.both) / min(self.comm, self.gemm))

    @property
    def gemm_cost(self) -> float:
        """How much longer the GEMMs take beside communication: 0 is no longer."""
        return self.gemm_beside / self.gemm - 1


class Experts:
    """The two bfloat16 GEMMs of every local expert, over the rows that it received, as batched products."""

    def __init__(self, num_local: int, hidden: int, rows: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(1)
        own = max(1, min(num_local, WEIGHT_BYTES // (3 * WIDTH * hidden * 2)))
        self._first = torch.randn(own, hidden, 2 * WIDTH, generator=generator, device=device).bfloat16()
        self._second = torch.randn(own, WIDTH, hidden, generator=generator, device=device).bfloat16()
        rounds = -(-num_local // own)
        self._x = torch.randn(own, rows, hidden, generator=generator, device=device).bfloat16()
        self._rounds = rounds
        self.flops = 2.0 * rounds * own * rows * hidden * 3 * WIDTH

    def __call__(self) -> Tensor:
        """Run all of them on the current stream."""
        y = self._x
        for _ in range(self._rounds):
            gate, up = torch.bmm(self._x, self._first).chunk(2, -1)
            y = torch.bmm(torch.nn.functional.silu(gate) * up, self._second)
        return y


def measure_overlap(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure for every number of SMs; a job of `World` (through `run_with_feed`). Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        here.attempt("overlap", lambda: _measure(here))


def _measure(here: Trial) -> None:
    settings = here.settings
    sizes = settings.sizes(settings.sweep_tokens)
    inputs = draw(sizes, 0, here.rank, here.bed.device)
    routing, quantized = Routing(inputs.topk_idx, inputs.topk_weights), Quantized(inputs.data, inputs.scale)
    with expert_group(here, sizes.tokens) as group:
        sent = group.dispatch(inputs.x, routing)
        assert isinstance(sent.x, Tensor)
        y = group.new_rows(sent.plan)
        y.copy_(expert(sent.x, here.rank))
        plan = sent.plan
        del sent
        num_local = group.num_local_experts
        rows = max(1, settings.ranks * sizes.tokens * sizes.top_k // sizes.experts)
        experts = Experts(num_local, sizes.hidden, rows, here.bed.device)
        for num_sms in (None, *settings.sms):
            here.tell({"now": f"overlap, {num_sms or 'default'} SMs"})

            def dispatch(num_sms: int | None = num_sms) -> Tensor | Quantized:
                return group.redispatch(quantized, plan, num_sms=num_sms).x

            def combine(num_sms: int | None = num_sms) -> Tensor:
                return group.combine(y, plan, num_sms=num_sms).x

            got = dispatch()
            assert isinstance(got, Quantized)
            check_rows("redispatch", sizes, 0, here.rank, ((got.data, data_of), (got.scale, scale_of)))
            must_equal("combine", combine(), expected_sums(sizes, inputs))
            del got
            for name, comm in (("dispatch FP8", dispatch), ("combine BF16", combine)):
                times = _times(here, comm, experts)
                here.tell({"overlap": _item(name, num_sms, sizes.tokens, times, experts.flops)})


def _item(name: str, num_sms: int | None, tokens: int, times: Times, flops: float) -> dict[str, object]:
    return {
        "call": name,
        "num_sms": num_sms,
        "tokens": tokens,
        "gemm_us": times.gemm * 1e6,
        "comm_us": times.comm * 1e6,
        "both_us": times.both * 1e6,
        "gemm_beside_us": times.gemm_beside * 1e6,
        "comm_beside_us": times.comm_beside * 1e6,
        "hidden": times.hidden,
        "gemm_cost": times.gemm_cost,
        "gemm_tflops": flops / times.gemm / 1e12,
    }


def _times(here: Trial, call: Work, experts: Experts) -> Times:
    """GEMMs and as many calls as take about as long, alone and side by side."""
    one = _alone(here, call, 1)
    gemm = _alone(here, experts, 1)
    calls = max(1, round(gemm / one))
    comm = _alone(here, call, calls)
    side, samples = here.bed.side(), []
    with no_collections():
        for _ in range(WARMUP + max(3, here.settings.iters // 3)):
            here.meet()
            start = here.bed.stamp()
            with side():
                for _ in range(calls):
                    call()
                comm_end = here.bed.stamp()
            experts()
            gemm_end = here.bed.stamp()
            here.bed.synchronize()
            samples.append((here.bed.seconds(start, gemm_end), here.bed.seconds(start, comm_end)))
    kept = samples[WARMUP:]
    gemm_beside = statistics.median(slowest(here.pg, [gemm_s for gemm_s, _ in kept]))
    comm_beside = statistics.median(slowest(here.pg, [comm_s for _, comm_s in kept]))
    both = statistics.median(slowest(here.pg, [max(pair) for pair in kept]))
    return Times(gemm, comm, both, gemm_beside, comm_beside)


def _alone(here: Trial, work: Work, calls: int) -> float:
    stamps = []
    with no_collections():
        for _ in range(WARMUP + max(3, here.settings.iters // 3)):
            here.meet()
            start = here.bed.stamp()
            for _ in range(calls):
                work()
            stamps.append((start, here.bed.stamp()))
    here.bed.synchronize()
    seconds = [here.bed.seconds(*pair) for pair in stamps[WARMUP:]]
    # Equal on all ranks, so that they make the same number of calls.
    return statistics.median(slowest(here.pg, seconds))
