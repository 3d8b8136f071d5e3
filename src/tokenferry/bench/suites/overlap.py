"""Communication beside expert GEMMs: how much of it is hidden, what it costs the GEMMs, and what decides that.

The question is which kernels get the SMs. A block of a call wants an SM for itself, and GEMM kernels of Hopper fill all
of them, each block until its kernel ends. So the cases differ in what leaves SMs free: GEMMs that leave some out
(`gemms.carve_out`), calls whose blocks are on the SMs before the GEMMs' (`OverlapCase.first`), and one call or as many
as take as long as the GEMMs (`OverlapCase.calls`): only the first of these can be there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from torch import Tensor

from tokenferry.bench.core.checks import check_rows, expected_sums, must_equal
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.inputs import Inputs, Sizes, draw, expert
from tokenferry.bench.core.session import LEAD_S, Session, expert_group
from tokenferry.bench.suites import gemms
from tokenferry.bench.suites.calls import default_sms
from tokenferry.types import Quantized

WARMUP = 3

LEAD_OF_A_CALL_S = 50e-6
"""More than the host needs to put one call on its stream."""

HEAD_START_S = 10e-6
"""The lead of the one that goes first: enough for its blocks to be on their SMs. It is in the times of both."""

LEFT_OUT = 16
"""SMs that GEMMs are asked to leave out when their kernels are looked at."""

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class OverlapCase:
    """A call beside GEMMs.

    Attributes:
        call: ``"dispatch FP8"`` or ``"combine BF16"``.
        num_sms: SMs of the call; None: its default.
        gemm: One of `gemms.KINDS`.
        carve_out: SMs that the GEMMs are asked to leave out; 0: none.
        first: ``"calls"`` or ``"GEMMs"``: which start ahead, by `HEAD_START_S`. Calls always have the higher priority.
        calls: Calls, one after another.
    """

    call: str
    num_sms: int | None
    gemm: str
    carve_out: int
    first: str
    calls: int


@dataclass(frozen=True, slots=True)
class OverlapTimes:
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
        """Return the part of the communication that costs no time beside GEMMs on all SMs; 1 is all of it."""
        return min(1.0, (self.gemm_all + self.comm - self.both) / min(self.comm, self.gemm_all))

    @property
    def gemm_cost(self) -> float:
        """Return how much longer the GEMMs take beside communication than alone on all SMs: 0 is no longer."""
        return self.gemm_beside / self.gemm_all - 1


def measure_overlap(session: Session) -> None:
    """Measure for every number of SMs."""
    session.attempt("overlap", _measure, session)


def variants(call: str, num_sms: int | None, default: int | None, many: int) -> list[OverlapCase]:
    """Return the cases of one call: all of them for its default number of SMs, those that decide for the others.

    Args:
        call: The call, as in `OverlapCase`.
        num_sms: SMs of the call, as in `OverlapCase`.
        default: The number of SMs that None stands for; None where SMs have no meaning.
        many: Calls that take as long as the GEMMs.
    """
    sms = num_sms or default or 0
    if num_sms is not None:
        return [OverlapCase(call, num_sms, kind, sms, "calls", many) for kind in gemms.KINDS]
    asked = dict.fromkeys((0, sms))
    counts = dict.fromkeys((many, 1))
    return [
        OverlapCase(call, None, kind, left_out, first, calls)
        for kind in gemms.KINDS
        for calls in counts
        for left_out in asked
        for first in ("calls", "GEMMs")
    ]


def _measure(session: Session) -> None:
    settings = session.settings
    sizes = settings.sizes(settings.sweep_tokens)
    inputs = draw(sizes, 0, session.rank, session.device.torch_device)
    with expert_group(session, sizes.tokens) as group:
        sent = group.dispatch(inputs.x, inputs.routing)
        assert isinstance(sent.x, Tensor)
        y = group.empty_rows(sent.plan)
        y.copy_(expert(sent.x, session.rank))
        plan = sent.plan
        del sent
        rows = max(1, settings.ranks * sizes.tokens * sizes.top_k // sizes.experts)
        beside = Beside(
            session, gemms.Experts(group.num_local_experts, sizes.hidden, rows, session.device.torch_device)
        )
        for num_sms in (None, *settings.sms):

            def dispatch(num_sms: int | None = num_sms) -> Tensor | Quantized:
                return group.redispatch(inputs.quantized, plan, num_sms=num_sms).x

            def combine(num_sms: int | None = num_sms) -> Tensor:
                return group.combine(y, plan, num_sms=num_sms).x

            _check(session, sizes, inputs, dispatch(), combine())
            for name, comm in (("dispatch FP8", dispatch), ("combine BF16", combine)):
                default = default_sms(session, group, name)
                for case in variants(name, num_sms, default, beside.as_long_as_gemms(name, num_sms, comm)):
                    beside.measure(case, comm)
        beside.show_kernels()


def _check(session: Session, sizes: Sizes, inputs: Inputs, got: Tensor | Quantized, sums: Tensor) -> None:
    check_rows("redispatch", sizes, 0, session.rank, got)
    must_equal("combine", sums, expected_sums(sizes, inputs))


class Beside:
    """Measures cases; what runs alone is measured once. Everything is collective."""

    def __init__(self, session: Session, experts: gemms.Experts) -> None:
        self._session, self._experts = session, experts
        self._calls, self._gemms = session.device.side(), session.device.side(first=False)
        self._alone: dict[object, float] = {}
        self._left_out: set[str] = set()

    def as_long_as_gemms(self, name: str, num_sms: int | None, comm: Work) -> int:
        """Return how many calls take about as long as the GEMMs."""
        one = self._once((name, num_sms, 1), 1, comm)
        return max(1, round(self._gemm_alone(gemms.KINDS[0], 0) / one))

    def measure(self, case: OverlapCase, comm: Work) -> None:
        """Measure and report one case; one that this torch cannot do is reported once and left out."""
        if self._skip(case.gemm, case.carve_out):
            return
        left_out = f"{case.carve_out} SMs left out" if case.carve_out else "on all SMs"
        times = self._session.attempt(f"overlap beside {case.gemm}, {left_out}", self._times, case, comm)
        if times is not None:
            self._session.send(
                {"overlap": _item(case, times, self._session.settings.sweep_tokens, self._experts.flops)}
            )

    def show_kernels(self) -> None:
        """Report which kernels the GEMMs are, and how many blocks they have.

        With as many as SMs, each works to the end of the kernel, and no SM gets free before.
        """
        if self._session.device.num_sms == 0:
            return
        for kind in gemms.KINDS:
            for left_out in (0, LEFT_OUT):
                if self._skip(kind, left_out):
                    continue
                with _as_asked(kind, left_out):
                    kernels = _kernels(self._experts.work(kind))
                self._session.send({"gemm kernels": {"gemm": kind, "carve_out": left_out, "kernels": kernels}})
        self._session.gather(None)  # a profiler may be slow on one rank

    def _skip(self, kind: str, left_out: int) -> bool:
        """Return whether this torch cannot do it, which is reported once."""
        why = gemms.missing(kind, left_out)
        if why is not None and why not in self._left_out:
            self._left_out.add(why)
            self._session.send({"overlap left out": {"gemm": kind, "carve_out": left_out, "why": why}})
        return why is not None

    def _gemm_alone(self, kind: str, left_out: int) -> float:
        with _as_asked(kind, left_out):
            return self._once((kind, left_out), 1, self._experts.work(kind))

    def _once(self, key: object, calls: int, work: Work) -> float:
        if key not in self._alone:
            self._alone[key] = _alone(self._session, work, calls)
        return self._alone[key]

    def _times(self, case: OverlapCase, comm: Work) -> OverlapTimes:
        alone = self._gemm_alone(case.gemm, 0), self._gemm_alone(case.gemm, case.carve_out)
        comm_alone = self._once((case.call, case.num_sms, case.calls), case.calls, comm)
        with _as_asked(case.gemm, case.carve_out), no_collections():
            work, samples = self._experts.work(case.gemm), []
            for _ in range(WARMUP + max(3, self._session.settings.iterations // 3)):
                samples.append(self._side_by_side(case, comm, work))
        # (GEMMs, calls) -> the slowest rank of each iteration
        gemm_beside, comm_beside = (
            self._session.median([pair[which] for pair in samples[WARMUP:]]) for which in (0, 1)
        )
        both = self._session.median([max(pair) for pair in samples[WARMUP:]])
        return OverlapTimes(*alone, comm_alone, both, gemm_beside, comm_beside)

    def _side_by_side(self, case: OverlapCase, comm: Work, work: Work) -> tuple[float, float]:
        """Return the seconds from the start until the GEMMs, and until the calls were done, on this rank."""
        device, ends = self._session.device, {}
        self._session.synchronize_ranks(LEAD_S + LEAD_OF_A_CALL_S * case.calls)
        start = device.stamp()
        for part in ("calls", "GEMMs") if case.first == "calls" else ("GEMMs", "calls"):
            with self._calls() if part == "calls" else self._gemms():
                if part != case.first:
                    device.hold(HEAD_START_S)
                for _ in range(case.calls if part == "calls" else 1):
                    (comm if part == "calls" else work)()
                ends[part] = device.stamp()
        device.synchronize()
        return device.seconds(start, ends["GEMMs"]), device.seconds(start, ends["calls"])


def _kernels(work: Work) -> list[dict[str, object]] | str:
    """Return the kernels, or why this GPU's profiler does not show them."""
    try:
        return gemms.kernels_of(work)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _as_asked(kind: str, left_out: int) -> Iterator[None]:
    with gemms.library(kind), gemms.carve_out(left_out):
        yield


def _alone(session: Session, work: Work, calls: int) -> float:
    stamps = []
    with no_collections():
        for _ in range(WARMUP + max(3, session.settings.iterations // 3)):
            session.synchronize_ranks(LEAD_S + LEAD_OF_A_CALL_S * calls)
            start = session.device.stamp()
            for _ in range(calls):
                work()
            stamps.append((start, session.device.stamp()))
    session.device.synchronize()
    seconds = [session.device.seconds(*pair) for pair in stamps[WARMUP:]]
    return session.median(seconds)  # equal on all ranks, so that they make the same number of calls


def _item(case: OverlapCase, times: OverlapTimes, tokens: int, flops: float) -> dict[str, object]:
    return {
        **asdict(case),
        "tokens": tokens,
        **{f"{name}_us": seconds * 1e6 for name, seconds in asdict(times).items()},
        "hidden": times.hidden,
        "gemm_cost": times.gemm_cost,
        "gemm_tflops": flops / times.gemm_all / 1e12,
    }
