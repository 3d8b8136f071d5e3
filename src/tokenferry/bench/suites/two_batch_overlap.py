"""Two-batch overlap: two micro-batches of decoding with work between their calls, overlapped by hooks or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict
from typing import get_args

import torch
from torch import Tensor

from tokenferry.bench.core.checks import raise_together
from tokenferry.bench.core.device import no_collections
from tokenferry.bench.core.session import Session, expert_group
from tokenferry.bench.suites.decode import HEAP_FOR, Answer, DecodeCase, Graph, StaticInputs, capture, new_answers
from tokenferry.bench.suites.decode_reference import DecodeReference, Pool
from tokenferry.types import DecodeCombined, DecodeDispatched, Numerics, Quantized, Scale

WORK_S = 100e-6
"""Approximate seconds of a piece of work: those of the attention of a micro-batch."""

MOST_GEMMS = 50
CALIBRATION_RUNS, CALIBRATION_GEMMS = 5, 20
ITERATIONS = 5
"""Iterations of a schedule in a graph."""

PIECES = 4
"""Pieces of work in an iteration: attention, and experts, of each micro-batch."""

TILTS = {"even": 0.0, "uneven": 0.5}
"""The share of work that one micro-batch has more than usual, and the other one less: the first on even ranks, the
second on odd ones. So all ranks have the same to do, at different times, as with sequences of different lengths."""


class Work:
    """Some GEMMs that take about `WORK_S`, equally many on all ranks. Making it is collective."""

    def __init__(self, session: Session) -> None:
        rows, width = (64, 64) if session.settings.backend == "cpu" else (512, 4096)
        generator = torch.Generator(session.device.torch_device).manual_seed(1)
        sizes = ((rows, width), (width, width))
        self._a, self._b = (
            torch.randn(*size, generator=generator, device=session.device.torch_device, dtype=torch.float32).bfloat16()
            for size in sizes
        )
        self._c = self._a @ self._b
        one = session.median(session.in_runs(self._gemm, CALIBRATION_GEMMS, CALIBRATION_RUNS))
        self.gemms = max(1, min(MOST_GEMMS, round(WORK_S / one)))

    def __call__(self, share: float = 1.0) -> None:
        """Put as large a share of it on the current stream."""
        for _ in range(round(self.gemms * share)):
            self._gemm()

    def _gemm(self) -> None:
        torch.mm(self._a, self._b, out=self._c)


class Schedules:
    """Schedules of two micro-batches, A and B. Each goes through attention, dispatch, experts and combine.

    Args:
        a: Inputs of micro-batch A.
        b: Inputs of micro-batch B.
        case: The pair of calls.
        work: A share of a piece: attention, or experts.
        tilt: Share of work that A has more than usual, and B less.
    """

    def __init__(
        self,
        a: StaticInputs,
        b: StaticInputs,
        case: DecodeCase,
        work: Callable[[float], None],
        tilt: float = 0.0,
    ) -> None:
        self.batches = (a, b)
        self._a, self._b = a, b
        self.case, self._work = case, work
        self._shares = (1 + tilt, 1 - tilt)

    def one_after_another(self) -> list[Answer]:
        """Overlap nothing: every call ends before the work that needs it begins."""
        return self._in_order(self._work)

    def by_hooks(self) -> list[Answer]:
        """Do one micro-batch's work while the other one travels; A's attention was done in the iteration before."""
        share_a, share_b = self._shares
        sent_a = self._dispatch(self._a, hook=True)
        self._work(share_b)  # B's attention
        sent_a.hook()
        sent_b = self._dispatch(self._b, hook=True)
        self._work(share_a)  # A's experts
        sent_b.hook()
        done_a = self._combine(self._a, sent_a, hook=True)
        self._work(share_b)  # B's experts
        done_a.hook()
        done_b = self._combine(self._b, sent_b, hook=True)
        self._work(share_a)  # A's attention of the next iteration
        done_b.hook()
        return [Answer(sent_a, done_a), Answer(sent_b, done_b)]

    def calls_only(self) -> list[Answer]:
        """Make the calls without work."""
        return self._in_order(lambda share: None)

    def work_only(self) -> list[Answer]:
        """Do the work without calls."""
        for share in PIECES // 2 * self._shares:
            self._work(share)
        return []

    def _in_order(self, work: Callable[[float], None]) -> list[Answer]:
        answers = []
        for batch, share in zip(self.batches, self._shares, strict=True):
            work(share)
            sent = self._dispatch(batch, hook=False)
            work(share)
            answers.append(Answer(sent, self._combine(batch, sent, hook=False)))
        return answers

    def _dispatch(self, batch: StaticInputs, *, hook: bool) -> DecodeDispatched[Tensor | Quantized]:
        return batch.group.decode_dispatch(batch.x, batch.routing, quantize=Scale.FLOAT32, return_hook=hook)

    def _combine(
        self, batch: StaticInputs, sent: DecodeDispatched[Tensor | Quantized], *, hook: bool
    ) -> DecodeCombined:
        return batch.group.decode_combine(batch.y, sent.plan, numerics=self.case.numerics, return_hook=hook)


def measure_two_batch(session: Session) -> None:
    """Measure two-batch overlap."""
    session.attempt("two-batch overlap", _measure, session)


def _measure(session: Session) -> None:
    sizes = session.settings.sizes(max(1, session.settings.two_batch_tokens // 2))
    with expert_group(session, sizes.tokens, heap_for=HEAP_FOR) as group, no_collections():
        pool, y, work = Pool(sizes, session.device.torch_device), new_answers(group), Work(session)
        a, b = (
            StaticInputs(group, [DecodeReference(sizes, variant, session.rank, pool)], pool, y) for variant in range(2)
        )
        for numerics, (name, tilt) in itertools.product(get_args(Numerics), TILTS.items()):
            tilt = tilt if session.rank % 2 == 0 else -tilt
            schedules = Schedules(a, b, DecodeCase("pair", numerics=numerics), work, tilt)
            what = f"two-batch overlap, {numerics}, {name} work"
            times = session.attempt(what, _times, session, schedules)
            about = {"numerics": numerics, "work_is": name, "tokens": sizes.tokens, "gemms": work.gemms}
            if times is not None:
                session.send({"two_batch": {**times, **about}})


def _times(session: Session, schedules: Schedules) -> dict[str, object]:
    """Return the times of one iteration of each schedule; all of them are checked before and after."""
    iterations = {
        "serial": schedules.one_after_another,
        "hooks": schedules.by_hooks,
        "calls": schedules.calls_only,
        "work": schedules.work_only,
    }
    graphs = {name: capture(session, one, ITERATIONS) for name, one in iterations.items()}
    _check(session, schedules, graphs)
    found = {name: session.summary(session.replayed(graph.replay, ITERATIONS)) for name, graph in graphs.items()}
    _check(session, schedules, graphs)
    median = {name: summary.median_us for name, summary in found.items()}
    return {
        **{name: asdict(summary) for name, summary in found.items()},
        "piece_us": median["work"] / PIECES,
        "hidden": (median["work"] + median["calls"] - median["hooks"]) / median["calls"],
        "speedup": median["serial"] / median["hooks"],
    }


def _check(session: Session, schedules: Schedules, graphs: dict[str, Graph]) -> None:
    """Replay and compare the results of both micro-batches.

    Raises:
        WrongAnswer: on every rank, if any has wrong results.
    """
    errors = []
    for name, graph in graphs.items():
        graph.run(schedules.batches[0])
        for which, batch, answer in zip("AB", schedules.batches, graph.last, strict=False):
            errors += batch.errors_of(f"{name}, {which}", schedules.case, answer)
    raise_together(session.pg, errors)
