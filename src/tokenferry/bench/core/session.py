"""One case after another on all ranks: checked, timed, reported; one that fails is reported and left out."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from tokenferry import env
from tokenferry.api import ExpertGroup
from tokenferry.bench.core.device import Device, device_for, gather, no_collections, slowest
from tokenferry.bench.core.inputs import Sizes
from tokenferry.bench.core.summary import Summary, summarize
from tokenferry.errors import BackendUnavailable
from tokenferry.testing.world import Progress
from tokenferry.types import BackendName, MoeShape

REPLAYS = 2
"""Replays of a graph in each run, after one that does not count."""

LEAD_S = 300e-6
"""Seconds for which devices are held before an isolated call: the time that hosts have to put it on the stream."""

P = ParamSpec("P")
T = TypeVar("T")

Step = Callable[[int], object]
"""One collective call; the argument is the iteration, so that every iteration can bring other data."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Sampling of calls back to back: in runs, each after a barrier.

    Args:
        warmup: Calls at the head of a run that do not count: the barrier lets ranks start apart.
        samples: Samples of a run.
        calls: Calls of a sample, whose time is divided by this.
    """

    warmup: int = 3
    samples: int = 1
    calls: int = 5


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a whole model, besides those of its experts' calls.

    Args:
        layers: Layers, each with attention and experts.
        intermediate: Inner size of an expert.
        batch: Sequences that are generated at once.
        new_tokens: Tokens that are generated for each of them.
    """

    layers: int
    intermediate: int
    batch: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a measurement, equal on all ranks.

    Args:
        ranks: R.
        tokens: Values of T.
        hidden: H.
        top_k: K.
        experts: E.
        iterations: Iterations that count.
        warmup: Iterations before them.
        seed: Seed of the inputs.
        backend: ``"cpu"`` or ``"cuda"``; the phases for GPUs run on the CPU too, for tests.
        timeout_s: Seconds that any wait for a peer may take.
        runs: Sampling of calls back to back.
        sms: Values of ``num_sms`` to sweep over, besides the default.
        sweep_tokens: T of the sweep, of the other routings and of the overlap.
        routings: Besides uniform ones, those of `tokenferry.bench.core.inputs.ROUTINGS` to measure.
        decode_tokens: Values of T of the decode calls; M is the largest.
        two_batch_tokens: T of both micro-batches of two-batch overlap together.
        default_device: Whether eager calls are made with the device as torch's default.
        ranks_per_node: Consecutive ranks that form a node, for calls across nodes.
        between: What joins these nodes: ``"sockets"`` or ``"nvlink"``.
        model: Sizes of the model of transformers; None where none is measured.
    """

    ranks: int
    tokens: tuple[int, ...]
    hidden: int
    top_k: int
    experts: int
    iterations: int
    warmup: int
    seed: int
    backend: BackendName = "cuda"
    timeout_s: float = 20.0
    runs: Runs = Runs()
    sms: tuple[int, ...] = ()
    sweep_tokens: int = 0
    routings: tuple[str, ...] = ("uniform",)
    decode_tokens: tuple[int, ...] = (1, 128)
    two_batch_tokens: int = 128
    default_device: bool = False
    ranks_per_node: int | None = None
    between: str = "sockets"
    model: ModelSizes | None = None

    @property
    def pg_backend(self) -> str:
        """Backend of process groups that carry the device's tensors."""
        return "nccl" if self.backend == "cuda" else "gloo"

    def sizes(self, tokens: int, routing: str = "uniform") -> Sizes:
        """Return the sizes of one case."""
        return Sizes(self.ranks, tokens, self.hidden, self.top_k, self.experts, self.seed, routing)


@dataclass(frozen=True, slots=True)
class Label:
    """The name of a case, and the rows that it moves.

    Attributes:
        library: ``"tokenferry"``, ``"nccl"``, ``"vdev_2d"``.
        call: ``"dispatch"``, ``"redispatch"``, ``"combine"``, ... and what is special about it.
        rows: ``"fp8"`` or ``"bf16"``.
        tokens: T.
        routing: Kind of routing.
        num_sms: SMs of the call; None: not applicable.
        link: ``"store"`` or ``"load"``: the limit that it is compared with; empty: none.
        row_bytes: Bytes of a row, with its scales.
        rows_out: Rows that this rank sends, mean over the sets of inputs; on GPUs without those to itself.
        note: Anything else, such as the transport.
    """

    library: str
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
class Samples:
    """The times of one call on this rank, seconds.

    Attributes:
        isolated: Time of each iteration, with all ranks synchronised before it.
        late: For each of these iterations: whether the device had started by when this host was done with the call.
        back_to_back: Times of calls back to back.
    """

    isolated: list[float]
    late: list[bool]
    back_to_back: list[float]


@dataclass(frozen=True, slots=True)
class Times:
    """The times of one call over all ranks.

    Attributes:
        isolated: Times with the ranks synchronised before each call.
        back_to_back: Times of calls back to back.
    """

    isolated: Summary
    back_to_back: Summary


@dataclass(frozen=True, slots=True)
class Result:
    """A case that was measured.

    Attributes:
        label: Its name and rows; its ``rows_out`` is that of rank 0.
        bytes_out: Bytes that a rank sends, with scales, mean over ranks.
        bytes_out_most: The same for the rank that sends most.
        isolated: Times with the ranks synchronised before each call.
        ahead: The part of the isolated iterations in which every rank's host had put the whole call on its stream
            before the device came to it, so that no launch is in the time: 0 where the host waits for what the call
            finds out.
        back_to_back: Times of calls back to back.
        baseline: The times of the call that took turns with it, if any.
    """

    label: Label
    bytes_out: float
    bytes_out_most: float
    isolated: Summary
    ahead: float
    back_to_back: Summary
    baseline: Times | None = None


@dataclass(slots=True, eq=False)
class Session:
    """The tools of a phase on each rank. All of its methods but `send` are collective.

    Attributes:
        pg: The process group (gloo).
        device: The device and its clock.
        settings: Settings of the measurement.
        progress: The file of progress.
        gate: Lets all devices wait for one another.
    """

    pg: dist.ProcessGroup
    device: Device
    settings: Settings
    progress: Progress
    gate: Callable[[], None] = field(default=lambda: None)

    @property
    def rank(self) -> int:
        """This rank."""
        return int(self.pg.rank())

    def send(self, item: dict[str, object]) -> None:
        """Send one item of progress, from rank 0."""
        if self.rank == 0:
            self.progress(item)

    def attempt(self, what: str, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | None:
        """Do something that may fail on any rank; then it counts as failed on all.

        Returns:
            The result of ``work``; None if it failed on any rank, which has been reported.
        """
        try:
            result, error_text = work(*args, **options), ""
        except Exception as error:  # noqa: BLE001 - a baseline may fail for any reason: the other cases go on
            result, error_text = None, f"{type(error).__name__}: {_first_lines(error)}"
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(gather(self.pg, error_text)) if text]
        if failures:
            self.send({"failed": what, "why": failures[0], "ranks": len(failures)})
            return None
        return result

    def case(self, label: Label, prepare: Callable[[], Step]) -> bool:
        """Prepare a call, which includes checking what it delivers, then time and report it.

        Returns:
            Whether it worked.
        """
        what = f"{label.library}: {label.call}, {label.rows}, T={label.tokens}"
        # Apart, since a rank whose results are right must not begin with the timing alone.
        step = self.attempt(what, prepare)
        samples = None if step is None else self.attempt(what, self.time, [step])
        if samples is not None:
            self.report(label, samples)
        return samples is not None

    def report(self, label: Label, samples: Sequence[Samples]) -> None:
        """Put the samples of all ranks together and report them: of a call, and of its baseline if there is one."""
        moved = [float(out) * label.row_bytes for out in gather(self.pg, label.rows_out)]
        times = [Times(self.summary(one.isolated), self.summary(one.back_to_back)) for one in samples]
        result = Result(
            label,
            sum(moved) / len(moved),
            max(moved),
            times[0].isolated,
            self.ahead(samples[0].late),
            times[0].back_to_back,
            times[1] if len(times) > 1 else None,
        )
        self.send({"case": result})

    def time(self, steps: Sequence[Step]) -> list[Samples]:
        """Time calls in both modes; they take turns, so that what disturbs the machine disturbs all of them alike."""
        with no_collections():
            isolated, back_to_back = self.isolated(steps), self.back_to_back(steps)
        return [Samples(*one, seconds) for one, seconds in zip(isolated, back_to_back, strict=True)]

    def isolated(self, steps: Sequence[Step]) -> list[tuple[list[float], list[bool]]]:
        """Time calls with all ranks synchronised before each; return `Samples.isolated` and `Samples.late` of each."""
        stamps: list[list[tuple[object, object]]] = [[] for _ in steps]
        late: list[list[bool]] = [[] for _ in steps]
        for i in range(self.settings.warmup + self.settings.iterations):
            for which, step in enumerate(steps):
                self.synchronize_ranks(LEAD_S)
                start = self.device.stamp()
                step(i)
                stamps[which].append((start, self.device.stamp()))
                late[which].append(self.device.passed(start))
        self.device.synchronize()
        count = self.settings.warmup
        return [(self._seconds(pairs[count:]), those[count:]) for pairs, those in zip(stamps, late, strict=True)]

    def back_to_back(self, steps: Sequence[Step]) -> list[list[float]]:
        """Time calls in runs back to back, as `Settings.runs` says; return the seconds of a call of each sample."""
        runs, iterations = self.settings.runs, self.settings.iterations
        stamps: list[list[tuple[object, object]]] = [[] for _ in steps]
        for first in range(0, iterations, runs.samples):
            for which, step in enumerate(steps):
                self.synchronize_ranks()
                numbers = itertools.count(first)
                for _ in range(runs.warmup):
                    step(next(numbers))
                start = self.device.stamp()
                for _ in range(min(runs.samples, iterations - first)):
                    for _ in range(runs.calls):
                        step(next(numbers))
                    end = self.device.stamp()
                    stamps[which].append((start, end))
                    start = end
        self.device.synchronize()
        return [[seconds / runs.calls for seconds in self._seconds(pairs)] for pairs in stamps]

    def replayed(self, replay: Callable[[], None], parts: int) -> list[float]:
        """Time runs of `REPLAYS` replays back to back; return the seconds of a part of each run.

        Args:
            replay: Puts a graph on the stream.
            parts: Calls, or iterations of several calls, that it holds.
        """
        return [seconds / parts for seconds in self.in_runs(replay, REPLAYS, self.settings.iterations)]

    def in_graphs(self, work: Callable[[], object], parts: int) -> list[float]:
        """Capture so many calls as a graph, and do as `replayed`. On CPUs, which have no graphs, make the calls."""

        def several() -> None:
            for _ in range(parts):
                work()

        return self.replayed(self.device.capture(several), parts)

    def in_runs(self, work: Callable[[], object], calls: int, runs: int) -> list[float]:
        """Time runs of calls back to back; return the seconds of a call of each run.

        A run comes first that does not count, and a call first in each run.
        """
        stamps = []
        for _ in range(1 + runs):
            self.synchronize_ranks()
            work()  # synchronises the ranks, and brings the host ahead
            start = self.device.stamp()
            for _ in range(calls):
                work()
            stamps.append((start, self.device.stamp()))
        self.device.synchronize()
        return [seconds / calls for seconds in self._seconds(stamps[1:])]

    def gather(self, item: Any) -> list[Any]:  # noqa: ANN401 - whatever can be pickled
        """Return the items of all ranks, by rank."""
        return gather(self.pg, item)

    def ahead(self, late: list[bool]) -> float:
        """Return `Result.ahead`, for `Samples.late`."""
        late_anywhere = slowest(self.pg, late)
        return 1 - sum(late_anywhere) / len(late)

    def median(self, seconds: list[float]) -> float:
        """Return the median over the samples of the slowest rank of each: equal on all ranks."""
        return statistics.median(slowest(self.pg, seconds))

    def summary(self, seconds: list[float]) -> Summary:
        """Return the summary over the samples of all ranks, the slowest of each."""
        return summarize(self.gather(seconds))

    def summaries(self, seconds: Mapping[str, list[float]]) -> dict[str, object]:
        """Return the summaries of several measurements, by name, to be sent. Collective."""
        return {name: asdict(self.summary(times)) for name, times in seconds.items()}

    def synchronize_ranks(self, lead_s: float = 0.0) -> None:
        """Wait until every rank's device is idle, and start together.

        Args:
            lead_s: Seconds by which hosts may get ahead: each device is held for so long, then waits for the others.
        """
        self.device.synchronize()
        dist.barrier(self.pg)
        if lead_s:
            self.device.hold(lead_s)
        self.gate()

    def _seconds(self, stamps: Sequence[tuple[object, object]]) -> list[float]:
        return [self.device.seconds(start, end) for start, end in stamps]


def in_session(
    rank: int, pg: dist.ProcessGroup, progress: Progress, settings: Settings, measure: Callable[[Session], T]
) -> T:
    """Call a suite with a session; a job of `World` (through `run_with_progress`)."""
    with _open_session(pg, progress, settings) as session:
        return measure(session)


@contextmanager
def _open_session(pg: dist.ProcessGroup, progress: Progress, settings: Settings) -> Iterator[Session]:
    device = device_for(settings.backend)
    if settings.backend == "cpu":
        yield Session(pg, device, settings, progress)
        return
    from tokenferry.bench.suites.links import CudaLinks

    with CudaLinks(pg, device.torch_device, 0, settings.timeout_s, Path(env.read().cache_dir)) as links:
        yield Session(pg, device, settings, progress, links.barrier)
        device.synchronize()
        dist.barrier(pg)


@contextmanager
def expert_group(session: Session, tokens: int, experts: int | None = None, heap_for: int = 2) -> Iterator[ExpertGroup]:
    """Open a group whose heap holds several sets of results of T tokens, as a view for M = T. Collective.

    The heap's size follows from M: the group is made for ``heap_for`` times as many tokens.

    Raises:
        BackendUnavailable: the backend cannot run here.
    """
    settings = session.settings
    experts = settings.experts if experts is None else experts
    largest = MoeShape(experts, settings.top_k, settings.hidden, heap_for * tokens)
    backend = settings.backend
    with ExpertGroup(session.pg, largest, backend=backend, timeout_s=settings.timeout_s) as group, torch.no_grad():
        group.warmup()
        try:
            yield group.for_shape(MoeShape(experts, settings.top_k, settings.hidden, tokens))
        finally:
            session.device.synchronize()


def baseline_group(session: Session) -> dist.ProcessGroup:
    """Make a process group for the device's tensors beside the one there is: NCCL, or gloo for the CPU. Collective.

    Raises:
        BackendUnavailable: this torch has no NCCL.
    """
    if session.settings.backend == "cuda" and not dist.is_nccl_available():
        raise BackendUnavailable("this build of torch has no NCCL")
    timeout = timedelta(seconds=3 * session.settings.timeout_s)
    group: dist.ProcessGroup = dist.new_group(
        range(session.settings.ranks), timeout=timeout, backend=session.settings.pg_backend
    )
    return group


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])[:600]
