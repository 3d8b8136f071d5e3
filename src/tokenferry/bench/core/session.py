"""One case after another on all ranks: checked, timed, told; one that fails is told and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.api import ExpertGroup
from tokenferry.bench.core import progress as feed
from tokenferry.bench.core.clock import Step, Summary, summarize
from tokenferry.bench.core.device import Bed, bed_for, gather, no_collections, slowest
from tokenferry.bench.core.static_inputs import Sizes
from tokenferry.errors import BackendUnavailable
from tokenferry.types import BackendName, MoeShape

CHAIN = 5
"""Calls in each chained run; each run is one sample, its time divided by this."""

CHAIN_WARMUP = 3
"""Calls at the head of each chained run that do not count."""

REPLAYS = 2
"""Replays of a graph in each run, after one that does not count."""

LEAD_S = 300e-6
"""Seconds for which devices are held before a drained call: the time that hosts have to put it on the stream."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, equal on all ranks.

    Args:
        ranks: R.
        tokens: Values of T.
        hidden: H.
        top_k: K.
        experts: E.
        sms: Values of ``num_sms`` to sweep over, besides the default.
        sweep_tokens: T of the sweep, of the other routings and of the overlap.
        routings: Besides uniform ones, those of `tokenferry.bench.core.static_inputs.ROUTINGS` to measure.
        iters: Iterations that count.
        warmup: Iterations before them.
        seed: Of the inputs.
        device: ``"cuda"``; ``"cpu"`` runs the same program without GPUs, for tests.
        timeout_s: Seconds that any wait for a peer may take.
        decode_tokens: Values of T of the decode calls; M is the largest.
        micro_tokens: T of both micro-batches together.
    """

    ranks: int
    tokens: tuple[int, ...]
    hidden: int
    top_k: int
    experts: int
    sms: tuple[int, ...]
    sweep_tokens: int
    routings: tuple[str, ...]
    iters: int
    warmup: int
    seed: int
    device: BackendName = "cuda"
    timeout_s: float = 20.0
    decode_tokens: tuple[int, ...] = (1, 128)
    micro_tokens: int = 128

    def sizes(self, tokens: int, routing: str = "uniform") -> Sizes:
        """The sizes of one case."""
        return Sizes(self.ranks, tokens, self.hidden, self.top_k, self.experts, self.seed, routing)


@dataclass(frozen=True, slots=True)
class Label:
    """What a case is called, and what it moves.

    Attributes:
        who: ``"tokenferry"``, ``"nccl"``, ``"vdev_2d"``.
        call: ``"dispatch"``, ``"redispatch"``, ``"combine"``, ... and what is special about it.
        rows: ``"fp8"`` or ``"bf16"``.
        tokens: T.
        routing: How tokens are routed.
        num_sms: SMs of the call; None: not ours to say.
        link: ``"store"`` or ``"load"``: which limit it is compared with; empty: none.
        row_bytes: Bytes of a row, with its scales.
        rows_out: Rows that leave this rank's GPU, mean over the sets of inputs.
        note: What else has to be said.
    """

    who: str
    call: str
    rows: str
    tokens: int
    routing: str = "uniform"
    num_sms: int | None = None
    link: str = ""
    row_bytes: int = 0
    rows_out: float = 0.0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A case that was measured.

    Attributes:
        label: What it is; its ``rows_out`` is that of rank 0.
        bytes_out: Bytes that leave a GPU, mean over ranks: rows to other ranks, with their scales.
        bytes_out_most: The same of the rank with most.
        drained: Ranks synchronised before each call.
        ahead: The part of the drained iterations in which every rank's host had put the whole call on its stream before
            the device came to it, so that no launch is in the time: 0 where the host waits for what the call finds out.
        chained: Calls back to back.
    """

    label: Label
    bytes_out: float
    bytes_out_most: float
    drained: Summary
    ahead: float
    chained: Summary


def result_from_json(values: dict[str, Any]) -> Result:
    """What ``dataclasses.asdict`` came from."""
    return Result(
        Label(**values["label"]),
        values["bytes_out"],
        values["bytes_out_most"],
        Summary(**values["drained"]),
        values["ahead"],
        Summary(**values["chained"]),
    )


@dataclass(slots=True, eq=False)
class Trial:
    """What a phase needs on each rank.

    Attributes:
        pg: The process group (gloo).
        bed: The device and its clock.
        settings: What is measured.
        news: The feed; rank 0 tells.
        gate: A barrier of all ranks on the device, so that they start within microseconds of one another.
    """

    pg: dist.ProcessGroup
    bed: Bed
    settings: Settings
    news: str
    gate: Callable[[], None] = field(default=lambda: None)

    @property
    def rank(self) -> int:
        """This rank."""
        return int(self.pg.rank())

    def tell(self, item: dict[str, object]) -> None:
        """Send one item of news, from rank 0."""
        if self.rank == 0:
            feed.send(self.news, item)

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the work returns
        """Do something that may fail on any rank; then it counts as failed on all. Collective.

        Returns:
            What ``work`` returned; None if it failed anywhere, which has been told.
        """
        try:
            answer, complaint = work(), None
        except Exception as error:  # noqa: BLE001 - a rival may fail for any reason: it is told, and the others go on
            answer, complaint = None, f"{type(error).__name__}: {_first_lines(error)}"
        complaints = [f"rank {rank}: {text}" for rank, text in enumerate(gather(self.pg, complaint)) if text]
        if complaints:
            self.tell({"failed": what, "why": complaints[0], "ranks": len(complaints)})
            return None
        return answer

    def case(self, label: Label, prepare: Callable[[], Step]) -> bool:
        """Prepare a call, which includes checking what it delivers, then time it and tell. Collective.

        Returns:
            Whether it worked.
        """
        what = f"{label.who}: {label.call}, {label.rows}, T={label.tokens}"
        self.tell({"now": what})
        samples = self.attempt(what, lambda: self._time(prepare()))
        if samples is None:
            return False
        moved = [float(out) * label.row_bytes for out in gather(self.pg, label.rows_out)]
        (drained, late), chained = samples
        ahead = 1 - sum(slowest(self.pg, late)) / len(late)
        times = (self.summary(drained), ahead, self.summary(chained))
        result = Result(label, sum(moved) / len(moved), max(moved), *times)
        self.tell({"case": asdict(result)})
        return True

    def _time(self, step: Step) -> tuple[tuple[list[float], list[bool]], list[float]]:
        with no_collections():
            return self.drained(step), self.chained(step)

    def drained(self, step: Step) -> tuple[list[float], list[bool]]:
        """Seconds of each iteration, and whether the device had started by when this host was done with the call.

        Collective; of this rank, as all of this class.
        """
        stamps, late = [], []
        for i in range(self.settings.warmup + self.settings.iters):
            self.meet(LEAD_S)
            start = self.bed.stamp()
            step(i)
            stamps.append((start, self.bed.stamp()))
            late.append(self.bed.passed(start))
        self.bed.synchronize()
        count = self.settings.warmup
        return [self.bed.seconds(*pair) for pair in stamps[count:]], late[count:]

    def chained(self, step: Step) -> list[float]:
        """Seconds of a call of each run of `CHAIN` calls back to back."""
        stamps = []
        for run in range(self.settings.iters):
            self.meet()
            for i in range(CHAIN_WARMUP):
                step(run + i)
            start = self.bed.stamp()
            for i in range(CHAIN):
                step(run + CHAIN_WARMUP + i)
            stamps.append((start, self.bed.stamp()))
        self.bed.synchronize()
        return [self.bed.seconds(*pair) / CHAIN for pair in stamps]

    def replayed(self, replay: Callable[[], None], parts: int) -> list[float]:
        """Seconds of a part of each run of `REPLAYS` replays back to back.

        Args:
            replay: Puts a graph on the stream.
            parts: Calls, or rounds of calls, that it holds.
        """
        stamps = []
        for _ in range(1 + self.settings.iters):
            self.meet()
            replay()  # brings the ranks into step, and the host ahead
            start = self.bed.stamp()
            for _ in range(REPLAYS):
                replay()
            stamps.append((start, self.bed.stamp()))
        self.bed.synchronize()
        return [self.bed.seconds(*pair) / (REPLAYS * parts) for pair in stamps[1:]]

    def gather(self, item: Any) -> list[Any]:  # noqa: ANN401 - whatever can be pickled
        """What each rank brought, by rank. Collective."""
        return gather(self.pg, item)

    def summary(self, seconds: list[float]) -> Summary:
        """What the samples of all ranks say together, the slowest of each."""
        return summarize([slowest(self.pg, seconds)])

    def meet(self, lead_s: float = 0.0) -> None:
        """Wait until every rank's device is idle, and start together.

        Args:
            lead_s: Seconds by which hosts may get ahead: each device is held for so long, and then meets the others.
        """
        self.bed.synchronize()
        dist.barrier(self.pg)
        if lead_s:
            self.bed.hold(lead_s)
        self.gate()


@contextmanager
def trial(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> Iterator[Trial]:
    """What a job of `World` starts with; closes what it opened. Collective."""
    bed = bed_for(settings.device)
    if settings.device == "cpu":
        yield Trial(pg, bed, settings, news)
        return
    from tokenferry.bench.suites.links import CudaLinks

    with CudaLinks(pg, bed.device, 0, settings.timeout_s, Path(env.read().cache_dir)) as links:
        yield Trial(pg, bed, settings, news, links.barrier)
        bed.synchronize()
        dist.barrier(pg)


@contextmanager
def expert_group(trial: Trial, tokens: int, experts: int | None = None, room: int = 2) -> Iterator[ExpertGroup]:
    """A group whose heap has room for several sets of results of T tokens, as a view for M = T. Collective.

    The heap's size follows from M: the group is made for ``room`` times as many tokens.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    settings = trial.settings
    experts = settings.experts if experts is None else experts
    roomy = MoeShape(experts, settings.top_k, settings.hidden, room * tokens)
    backend = settings.device
    with ExpertGroup(trial.pg, roomy, backend=backend, timeout_s=settings.timeout_s) as group, torch.no_grad():
        group.warmup()
        try:
            yield group.for_shape(MoeShape(experts, settings.top_k, settings.hidden, tokens))
        finally:
            trial.bed.synchronize()


def nccl_group(trial: Trial) -> dist.ProcessGroup:
    """Make a process group for the device's tensors beside the one there is: NCCL, or gloo for the CPU. Collective.

    Raises:
        BackendUnavailable: this torch has no NCCL.
    """
    if trial.settings.device == "cuda" and not dist.is_nccl_available():
        raise BackendUnavailable("this build of torch has no NCCL")
    name = "nccl" if trial.settings.device == "cuda" else "gloo"
    timeout = timedelta(seconds=3 * trial.settings.timeout_s)
    group: dist.ProcessGroup = dist.new_group(range(trial.settings.ranks), timeout=timeout, backend=name)
    return group


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])[:600]
