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
from tokenferry.bench import feed
from tokenferry.bench.bed import Bed, bed_for, gather, no_collections, slowest
from tokenferry.bench.clock import Step, Summary, summarize
from tokenferry.bench.sets import Sizes
from tokenferry.errors import BackendUnavailable
from tokenferry.words import MoeShape

CHAIN = 5
"""Calls in each chained run; each run is one sample, its time divided by this."""

CHAIN_WARMUP = 3
"""Calls at the head of each chained run that do not count."""


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
        routings: Besides uniform ones, those of `tokenferry.bench.sets.ROUTINGS` to measure.
        iters: Iterations that count.
        warmup: Iterations before them.
        seed: Of the inputs.
        device: ``"cuda"``; ``"cpu"`` runs the same program without GPUs, for tests.
        timeout_s: Seconds that any wait for a peer may take.
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
    device: str = "cuda"
    timeout_s: float = 20.0

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
        chained: Calls back to back.
    """

    label: Label
    bytes_out: float
    bytes_out_most: float
    drained: Summary
    chained: Summary


def result_from_json(values: dict[str, Any]) -> Result:
    """What ``dataclasses.asdict`` came from."""
    return Result(
        Label(**values["label"]),
        values["bytes_out"],
        values["bytes_out_most"],
        Summary(**values["drained"]),
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
        drained, chained = (summarize([slowest(self.pg, times)]) for times in samples)
        result = Result(label, sum(moved) / len(moved), max(moved), drained, chained)
        self.tell({"case": asdict(result)})
        return True

    def _time(self, step: Step) -> tuple[list[float], list[float]]:
        with no_collections():
            return self._drained(step), self._chained(step)

    def _drained(self, step: Step) -> list[float]:
        stamps = []
        for i in range(self.settings.warmup + self.settings.iters):
            self.meet()
            start = self.bed.stamp()
            step(i)
            stamps.append((start, self.bed.stamp()))
        self.bed.synchronize()
        return [self.bed.seconds(*pair) for pair in stamps[self.settings.warmup :]]

    def _chained(self, step: Step) -> list[float]:
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

    def meet(self) -> None:
        """Wait until every rank's device is idle, and start together."""
        self.bed.synchronize()
        dist.barrier(self.pg)
        self.gate()


@contextmanager
def trial(rank: int, pg: dist.ProcessGroup, news: str, settings: Settings) -> Iterator[Trial]:
    """What a job of `World` starts with; closes what it opened. Collective."""
    bed = bed_for(settings.device)
    if settings.device == "cpu":
        yield Trial(pg, bed, settings, news)
        return
    from tokenferry.bench.links import CudaLinks

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
