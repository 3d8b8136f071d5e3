"""Two micro-batches of decoding with work between their calls: one after another, and overlapped by hooks."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import get_args

import torch
import torch.distributed as dist

from tokenferry.bench.core.device import no_collections, slowest
from tokenferry.bench.core.inputs import WrongAnswer
from tokenferry.bench.core.session import Settings, Trial, expert_group, trial
from tokenferry.bench.suites.decode import ROOM, Answer, Case, Desk, Graph, new_answers
from tokenferry.bench.suites.decode_reference import Pool, Truth
from tokenferry.types import DecodeCombined, DecodeDispatched, Numerics, Quantized, Scale

WORK_S = 100e-6
"""How long a piece of work takes, about: that of the attention of a micro-batch."""

MOST_GEMMS = 50
TRIAL_RUNS, TRIAL_GEMMS = 5, 20
ROUNDS = 5
"""Rounds in a graph."""

PIECES = 4
"""Pieces of work in a round: attention, and experts, of each micro-batch."""

TILTS = {"even": 0.0, "uneven": 0.5}
"""By how much more work one micro-batch has than usual, and the other one less: the first on even ranks, the second on
odd ones. So all ranks have the same to do, at different times, as with sequences of different lengths."""


class Work:
    """Some GEMMs that take about `WORK_S`, equally many on all ranks. Making it is collective."""

    def __init__(self, here: Trial) -> None:
        rows, width = (64, 64) if here.settings.device == "cpu" else (512, 4096)
        generator = torch.Generator(here.bed.device).manual_seed(1)
        sizes = ((rows, width), (width, width))
        self._a, self._b = (
            torch.randn(*size, generator=generator, device=here.bed.device).bfloat16() for size in sizes
        )
        self._c = self._a @ self._b
        one = _seconds(here, self._gemm)
        self.gemms = max(1, min(MOST_GEMMS, round(WORK_S / one)))

    def __call__(self, share: float = 1.0) -> None:
        """Put as large a share of it on the current stream."""
        for _ in range(round(self.gemms * share)):
            self._gemm()

    def _gemm(self) -> None:
        torch.mm(self._a, self._b, out=self._c)


def _seconds(here: Trial, gemm: Callable[[], None]) -> float:
    """Of one of many GEMMs; equal on all ranks."""
    samples = []
    for _ in range(1 + TRIAL_RUNS):
        here.meet()
        gemm()
        start = here.bed.stamp()
        for _ in range(TRIAL_GEMMS):
            gemm()
        samples.append((start, here.bed.stamp()))
    here.bed.synchronize()
    return statistics.median(slowest(here.pg, [here.bed.seconds(*pair) for pair in samples[1:]])) / TRIAL_GEMMS


class Schedules:
    """Rounds of two micro-batches, A and B. Each goes through attention, dispatch, experts and combine.

    Args:
        desks: Of A and B.
        case: The pair that is made of them.
        work: A share of a piece: attention, or experts.
        tilt: How much more work A has than usual, and B less.
    """

    def __init__(self, desks: tuple[Desk, Desk], case: Case, work: Callable[[float], None], tilt: float = 0.0) -> None:
        self._a, self._b = desks
        self.case, self._work = case, work
        self._shares = (1 + tilt, 1 - tilt)

    def one_after_another(self) -> list[Answer]:
        """Nothing overlaps: every call is there before the work that needs it begins."""
        answers = []
        for desk, share in zip((self._a, self._b), self._shares, strict=True):
            self._work(share)
            sent = self._dispatch(desk, hook=False)
            self._work(share)
            answers.append(Answer(sent, self._combine(desk, sent, hook=False)))
        return answers

    def by_hooks(self) -> list[Answer]:
        """While one micro-batch travels, the other one's work is done; A's attention was, in the round before."""
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
        self._work(share_a)  # A's attention of the next round
        done_b.hook()
        return [Answer(sent_a, done_a), Answer(sent_b, done_b)]

    def calls_only(self) -> list[Answer]:
        """No work."""
        answers = []
        for desk in (self._a, self._b):
            sent = self._dispatch(desk, hook=False)
            answers.append(Answer(sent, self._combine(desk, sent, hook=False)))
        return answers

    def work_only(self) -> list[Answer]:
        """No calls."""
        for share in PIECES // 2 * self._shares:
            self._work(share)
        return []

    def _dispatch(self, desk: Desk, *, hook: bool) -> DecodeDispatched[Quantized]:
        return desk.group.decode_dispatch(desk.x, desk.routing, quantize=Scale.FLOAT32, return_hook=hook)

    def _combine(self, desk: Desk, sent: DecodeDispatched[Quantized], *, hook: bool) -> DecodeCombined:
        return desk.group.decode_combine(desk.y, sent.plan, numerics=self.case.numerics, return_hook=hook)


def measure_micro(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> None:
    """Measure two micro-batches; a job of `World` (through `run_with_feed`). Results go to the news."""
    with trial(rank, pg, news, settings) as here:
        here.attempt("micro-batches", lambda: _measure(here))


def _measure(here: Trial) -> None:
    sizes = here.settings.sizes(max(1, here.settings.micro_tokens // 2))
    with expert_group(here, sizes.tokens, room=ROOM) as group, no_collections():
        pool, y, work = Pool(sizes, here.bed.device), new_answers(group), Work(here)
        truths = [Truth(sizes, variant, here.rank, pool) for variant in range(2)]
        desks = Desk(group, truths[:1], pool, y), Desk(group, truths[1:], pool, y)
        for numerics, (name, tilt) in itertools.product(get_args(Numerics), TILTS.items()):
            tilt = tilt if here.rank % 2 == 0 else -tilt
            schedules = Schedules(desks, Case("pair", numerics=numerics), work, tilt)
            what = f"micro-batches, {numerics}, {name} work"
            here.tell({"now": what})
            times = here.attempt(what, partial(_times, here, desks, schedules))
            about = {"numerics": numerics, "work_is": name, "tokens": sizes.tokens, "gemms": work.gemms}
            if times is not None:
                here.tell({"micro": {**times, **about}})


def _times(here: Trial, desks: tuple[Desk, Desk], schedules: Schedules) -> dict[str, object]:
    """Of one round of each schedule, all of them checked before and after."""
    case = schedules.case
    rounds = {
        "serial": schedules.one_after_another,
        "hooks": schedules.by_hooks,
        "calls": schedules.calls_only,
        "work": schedules.work_only,
    }
    graphs = {name: _capture(here, one) for name, one in rounds.items()}
    _check(here, desks, case, graphs)
    found = {name: here.summary(here.replayed(graph.replay, ROUNDS)) for name, graph in graphs.items()}
    _check(here, desks, case, graphs)
    median = {name: summary.median_us for name, summary in found.items()}
    return {
        **{name: asdict(summary) for name, summary in found.items()},
        "piece_us": median["work"] / PIECES,
        "hidden": (median["work"] + median["calls"] - median["hooks"]) / median["calls"],
        "speedup": median["serial"] / median["hooks"],
    }


def _capture(here: Trial, round_of: Callable[[], list[Answer]]) -> Graph:
    last: list[Answer] = []

    def work() -> None:
        last.clear()
        for _ in range(ROUNDS):
            last[:] = round_of()

    return Graph(here.bed.capture(work), last)


def _check(here: Trial, desks: tuple[Desk, Desk], case: Case, graphs: dict[str, Graph]) -> None:
    """Replay and look at both micro-batches.

    Raises:
        WrongAnswer: on every rank, if any has complaints.
    """
    said = []
    for name, graph in graphs.items():
        graph.run(desks[0])
        for which, desk, answer in zip("AB", desks, graph.last, strict=False):
            said += desk.complaints(f"{name}, {which}", case, answer)
    everybody = [text for texts in here.gather(said) for text in texts]
    if everybody:
        raise WrongAnswer("; ".join(everybody[:3]))
