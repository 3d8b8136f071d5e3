"""Communication beside expert GEMMs: how much of it is hidden, what it costs the GEMMs, and what decides that.

The question is who gets the SMs. A block of a call wants an SM for itself, and GEMM kernels of Hopper fill all of them,
each block until its kernel ends. So the cases differ in what leaves SMs free: GEMMs that leave some out
(`gemms.carve_out`), calls whose blocks are there before the GEMMs' (`Case.first`), and one call or as many as take as
long as the GEMMs (`Case.calls`): only the first of these can be there before.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.device import gather, no_collections, slowest
from tokenferry.bench.core.inputs import expert, must_equal
from tokenferry.bench.core.session import LEAD_S, Settings, Trial, expert_group, trial
from tokenferry.bench.core.static_inputs import Inputs, Sizes, check_rows, data_of, draw, expected_sums, scale_of
from tokenferry.bench.suites import gemms
from tokenferry.bench.suites.calls import default_sms
from tokenferry.types import Quantized, Routing

WARMUP = 3

LEAD_OF_A_CALL_S = 50e-6
"""More than the host needs to put one call on its stream."""

HEAD_START_S = 10e-6
"""By so much the one that goes first is ahead: enough for its blocks to be on their SMs. It is in the times of both."""

LEFT_OUT = 16
"""SMs that GEMMs are asked to leave out when their kernels are looked at."""

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """What runs beside what.

    Attributes:
        call: ``"dispatch FP8"`` or ``"combine BF16"``.
        num_sms: SMs of the call; None: its default.
        gemm: One of `gemms.KINDS`.
        carve_out: SMs that the GEMMs are asked to leave out; 0: none.
        first: ``"calls"`` or ``"GEMMs"``: who starts ahead, by `HEAD_START_S`. Calls always have the higher priority.
        calls: One after another.
    """

    call: str
    num_sms: int | None
    gemm: str
    carve_out: int
    first: str
    calls: int


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of the slowest rank, medians.

    Attributes:
        gemm_all: The GEMMs alone, on all SMs.
        gemm: The GEMMs alone, asked to leave out as many SMs as in the case.
        comm: The communication alone.
        both: From the start of either to the end of both, side by side.
        gemm_beside: The GEMMs while communication goes on.
        comm_beside: The communication while GEMMs go on.
    """

    gemm_all: float
    gemm: float
    comm: float
    both: float
    gemm_beside: float
    comm_beside: float

    @property
    def hidden(self) -> float:
        """The part of the communication that costs no time of its own: 1 is all of it. Against GEMMs on all SMs."""
        return min(1.0, (self.gemm_all + self.comm - self.both) / min(self.comm, self.gemm_all))

    @property
    def gemm_cost(self) -> float:
        """How much longer the GEMMs take beside communication than alone on all SMs: 0 is no longer."""
        return self.gemm_beside / self.gemm_all - 1


def measure_overlap(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure for every number of SMs; a job of `World` (through `run_with_feed`). Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        here.attempt("overlap", lambda: _measure(here))


def variants(call: str, num_sms: int | None, default: int | None, many: int) -> list[Case]:
    """The cases of one call: all of them for its default number of SMs, those that decide for the others.

    Args:
        call: As in `Case`.
        num_sms: As in `Case`.
        default: What None stands for; None where SMs have no meaning.
        many: Calls that take as long as the GEMMs.
    """
    sms = num_sms or default or 0
    if num_sms is not None:
        return [Case(call, num_sms, kind, sms, "calls", many) for kind in gemms.KINDS]
    asked = dict.fromkeys((0, sms))
    counts = dict.fromkeys((many, 1))
    return [
        Case(call, None, kind, left_out, first, calls)
        for kind in gemms.KINDS
        for calls in counts
        for left_out in asked
        for first in ("calls", "GEMMs")
    ]


def _measure(here: Trial) -> None:
    settings = here.settings
    sizes = settings.sizes(settings.sweep_tokens)
    inputs = draw(sizes, 0, here.rank, here.bed.device)
    routing, quantized = Routing(inputs.topk_idx, inputs.topk_weights), Quantized(inputs.data, inputs.scale)
    with expert_group(here, sizes.tokens) as group:
        sent = group.dispatch(inputs.x, routing)
        assert isinstance(sent.x, Tensor)
        y = group.empty_rows(sent.plan)
        y.copy_(expert(sent.x, here.rank))
        plan = sent.plan
        del sent
        rows = max(1, settings.ranks * sizes.tokens * sizes.top_k // sizes.experts)
        beside = Beside(here, gemms.Experts(group.num_local_experts, sizes.hidden, rows, here.bed.device))
        for num_sms in (None, *settings.sms):
            here.tell({"now": f"overlap, {num_sms or 'default'} SMs"})

            def dispatch(num_sms: int | None = num_sms) -> Tensor | Quantized:
                return group.redispatch(quantized, plan, num_sms=num_sms).x

            def combine(num_sms: int | None = num_sms) -> Tensor:
                return group.combine(y, plan, num_sms=num_sms).x

            _check(here, sizes, inputs, dispatch(), combine())
            for name, comm in (("dispatch FP8", dispatch), ("combine BF16", combine)):
                default = default_sms(here, group, name)
                for case in variants(name, num_sms, default, beside.as_long_as_gemms(name, num_sms, comm)):
                    beside.measure(case, comm)
        beside.show_kernels()


def _check(here: Trial, sizes: Sizes, inputs: Inputs, got: Tensor | Quantized, sums: Tensor) -> None:
    assert isinstance(got, Quantized)
    check_rows("redispatch", sizes, 0, here.rank, ((got.data, data_of), (got.scale, scale_of)))
    must_equal("combine", sums, expected_sums(sizes, inputs))


class Beside:
    """Measures cases; what runs alone is measured once. Everything is collective."""

    def __init__(self, here: Trial, experts: gemms.Experts) -> None:
        self._here, self._experts = here, experts
        self._calls, self._gemms = here.bed.side(), here.bed.side(first=False)
        self._alone: dict[object, float] = {}
        self._told: set[str] = set()

    def as_long_as_gemms(self, name: str, num_sms: int | None, comm: Work) -> int:
        """How many calls take about as long as the GEMMs."""
        one = self._once((name, num_sms, 1), 1, comm)
        return max(1, round(self._gemm_alone(gemms.KINDS[0], 0) / one))

    def measure(self, case: Case, comm: Work) -> None:
        """Measure one case and tell; one that this torch cannot do is told once and left out."""
        if self._skip(case.gemm, case.carve_out):
            return
        left_out = f"{case.carve_out} SMs left out" if case.carve_out else "on all SMs"
        times = self._here.attempt(f"overlap beside {case.gemm}, {left_out}", lambda: self._times(case, comm))
        if times is not None:
            self._here.tell({"overlap": _item(case, times, self._here.settings.sweep_tokens, self._experts.flops)})

    def show_kernels(self) -> None:
        """Tell which kernels the GEMMs are, and how many blocks they have.

        As many as SMs: each works to the end of the kernel, and no SM gets free before.
        """
        if self._here.bed.num_sms == 0:
            return
        for kind in gemms.KINDS:
            for left_out in (0, LEFT_OUT):
                if self._skip(kind, left_out):
                    continue
                with _as_asked(kind, left_out):
                    kernels = _kernels(self._experts.work(kind))
                self._here.tell({"gemm kernels": {"gemm": kind, "carve_out": left_out, "kernels": kernels}})
        gather(self._here.pg, None)  # a profiler may be slow on one rank

    def _skip(self, kind: str, left_out: int) -> bool:
        """Whether this torch cannot do it, which is told once."""
        why = gemms.missing(kind, left_out)
        if why is not None and why not in self._told:
            self._told.add(why)
            self._here.tell({"overlap left out": {"gemm": kind, "carve_out": left_out, "why": why}})
        return why is not None

    def _gemm_alone(self, kind: str, left_out: int) -> float:
        with _as_asked(kind, left_out):
            return self._once((kind, left_out), 1, self._experts.work(kind))

    def _once(self, key: object, calls: int, work: Work) -> float:
        if key not in self._alone:
            self._alone[key] = _alone(self._here, work, calls)
        return self._alone[key]

    def _times(self, case: Case, comm: Work) -> Times:
        alone = self._gemm_alone(case.gemm, 0), self._gemm_alone(case.gemm, case.carve_out)
        comm_alone = self._once((case.call, case.num_sms, case.calls), case.calls, comm)
        with _as_asked(case.gemm, case.carve_out), no_collections():
            work, samples = self._experts.work(case.gemm), []
            for _ in range(WARMUP + max(3, self._here.settings.iters // 3)):
                samples.append(self._side_by_side(case, comm, work))
        # (GEMMs, calls) -> the slowest rank of each iteration
        gemm_beside, comm_beside = (
            statistics.median(slowest(self._here.pg, [pair[which] for pair in samples[WARMUP:]])) for which in (0, 1)
        )
        both = statistics.median(slowest(self._here.pg, [max(pair) for pair in samples[WARMUP:]]))
        return Times(*alone, comm_alone, both, gemm_beside, comm_beside)

    def _side_by_side(self, case: Case, comm: Work, work: Work) -> tuple[float, float]:
        """Seconds from the start until the GEMMs, and until the calls were done, on this rank."""
        bed, ends = self._here.bed, {}
        self._here.meet(LEAD_S + LEAD_OF_A_CALL_S * case.calls)
        start = bed.stamp()
        for who in ("calls", "GEMMs") if case.first == "calls" else ("GEMMs", "calls"):
            with self._calls() if who == "calls" else self._gemms():
                if who != case.first:
                    bed.hold(HEAD_START_S)
                for _ in range(case.calls if who == "calls" else 1):
                    (comm if who == "calls" else work)()
                ends[who] = bed.stamp()
        bed.synchronize()
        return bed.seconds(start, ends["GEMMs"]), bed.seconds(start, ends["calls"])


def _kernels(work: Work) -> list[dict[str, object]] | str:
    """The kernels, or why this GPU's profiler does not show them."""
    try:
        return gemms.kernels_of(work)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _as_asked(kind: str, left_out: int) -> Iterator[None]:
    with gemms.library(kind), gemms.carve_out(left_out):
        yield


def _alone(here: Trial, work: Work, calls: int) -> float:
    stamps = []
    with no_collections():
        for _ in range(WARMUP + max(3, here.settings.iters // 3)):
            here.meet(LEAD_S + LEAD_OF_A_CALL_S * calls)
            start = here.bed.stamp()
            for _ in range(calls):
                work()
            stamps.append((start, here.bed.stamp()))
    here.bed.synchronize()
    seconds = [here.bed.seconds(*pair) for pair in stamps[WARMUP:]]
    # Equal on all ranks, so that they make the same number of calls.
    return statistics.median(slowest(here.pg, seconds))


def _item(case: Case, times: Times, tokens: int, flops: float) -> dict[str, object]:
    return {
        **asdict(case),
        "tokens": tokens,
        **{f"{name}_us": seconds * 1e6 for name, seconds in asdict(times).items()},
        "hidden": times.hidden,
        "gemm_cost": times.gemm_cost,
        "gemm_tflops": flops / times.gemm_all / 1e12,
    }
