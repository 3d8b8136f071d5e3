"""What the links and the memory of this machine do: the limits that everything else is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core import progress as feed
from tokenferry.bench.core.device import Bed, bed_for, slowest
from tokenferry.bench.core.inputs import WrongAnswer
from tokenferry.bench.suites.links import CudaLinks, Links, check_stored

ROW_BYTES = (7168, 14336)
NUM_SMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 132)
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Args:
        num_sms: Numbers of SMs; those that the device does not have are left out.
        row_bytes: Sizes of rows.
        total_bytes: Bytes of rows that each rank has.
        runs: Runs that count, of each point.
        launches: Launches in a run, back to back.
        rounds: Ping-pongs, or barriers, in a launch.
        seed: Of the rows.
        device: ``"cuda"``; ``"cpu"`` for tests with links of their own.
    """

    num_sms: tuple[int, ...] = NUM_SMS
    row_bytes: tuple[int, ...] = ROW_BYTES
    total_bytes: int = 7168 * 32768
    runs: int = 5
    launches: int = 4
    rounds: int = 2000
    seed: int = 0
    device: str = "cuda"


@dataclass(frozen=True, slots=True)
class Rate:
    """One point of a curve.

    Attributes:
        kind: ``"store"``, ``"load"``: bytes that leave each GPU; ``"copy"``: bytes read and bytes written.
        row_bytes: Size of a row.
        num_sms: SMs that move rows.
        gbps: 10^9 bytes a second, median over runs of the slowest rank.
    """

    kind: str
    row_bytes: int
    num_sms: int
    gbps: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What was measured.

    Attributes:
        num_ranks: R.
        rates: Every point.
        flag_us: One way, from a store to the peer that sees it; None with one rank.
        barrier_us: One barrier of all ranks inside a kernel; None with one rank.
    """

    num_ranks: int
    rates: tuple[Rate, ...]
    flag_us: float | None
    barrier_us: float | None

    def best(self, kind: str, row_bytes: int | None = None) -> float:
        """The highest rate of a kind; 0 where none was measured."""
        rates = [rate.gbps for rate in self.rates if rate.kind == kind and row_bytes in (None, rate.row_bytes)]
        return max(rates, default=0.0)

    def near(self, kind: str, row_bytes: int) -> float:
        """The highest rate of a kind for rows of about this size; 0 where none was measured."""
        sizes = {rate.row_bytes for rate in self.rates}
        return self.best(kind, min(sizes, key=lambda size: abs(size - row_bytes))) if sizes else 0.0

    def at(self, kind: str, num_sms: int, row_bytes: int) -> float | None:
        """The rate at a number of SMs, or None if that was not measured."""
        for rate in self.rates:
            if (rate.kind, rate.num_sms, rate.row_bytes) == (kind, num_sms, row_bytes):
                return rate.gbps
        return None

    def as_json(self) -> dict[str, Any]:
        """As plain dicts."""
        return asdict(self)


def from_json(values: dict[str, Any]) -> Limits:
    """What `Limits.as_json` came from."""
    rates = tuple(Rate(**rate) for rate in values["rates"])
    return Limits(values["num_ranks"], rates, values["flag_us"], values["barrier_us"])


def measure_limits(rank: int, pg: dist.ProcessGroup, news: str, plan: Plan) -> Limits:
    """Measure everything; a job of `World` (through `run_with_feed`), equal on all ranks.

    Raises:
        WrongAnswer: rows are not where they have to be.
        BackendUnavailable, PeerTimeout: as `CudaLinks`.
    """

    def tell(text: str) -> None:
        if rank == 0:
            feed.send(news, {"now": text})

    bed = bed_for("cuda")
    with CudaLinks(pg, bed.device, plan.total_bytes, TIMEOUT_S) as links:
        found = measure(links, bed, pg, plan, tell)
        dist.barrier(pg)  # nobody unmaps its window while a peer may still use it
        return found


def num_steps(plan: Plan) -> int:
    """How many times `measure` tells what it does, at most."""
    return len(plan.row_bytes) * (len(plan.num_sms) + 1) + 1


def measure(links: Links, bed: Bed, pg: dist.ProcessGroup, plan: Plan, tell: Callable[[str], None]) -> Limits:
    """Measure over given links. Collective; equal on all ranks.

    Raises:
        WrongAnswer: rows are not where they have to be.
    """
    rates: list[Rate] = []
    for row_bytes in plan.row_bytes:
        bench = _Rows(links, bed, pg, plan, row_bytes)
        tell(f"rows of {row_bytes} bytes")
        for num_sms in counts_of_sms(plan.num_sms, links.num_sms):
            rates += bench.rates(num_sms)
            tell(f"rows of {row_bytes} bytes, {num_sms} SMs")
    tell("flags and barriers")
    flag = _per_round(links, bed, pg, plan, links.flag)
    barrier = _per_round(links, bed, pg, plan, links.barrier)
    return Limits(links.num_ranks, tuple(rates), None if flag is None else flag / 2, barrier)


def counts_of_sms(wanted: Sequence[int], there_are: int) -> list[int]:
    """The numbers of SMs to measure: those wanted that there are; the largest stands for all that are too large."""
    return sorted({min(count, there_are) for count in wanted})


class _Rows:
    """One size of rows: checked, then timed."""

    def __init__(self, links: Links, bed: Bed, pg: dist.ProcessGroup, plan: Plan, row_bytes: int) -> None:
        self._links, self._bed, self._pg, self._plan = links, bed, pg, plan
        self._num_rows = plan.total_bytes // row_bytes
        self._row_bytes = row_bytes
        links.shape(self._num_rows, row_bytes)
        self._rows = self._draw(links.rank)
        self._target = torch.zeros_like(self._rows)

    def rates(self, num_sms: int) -> list[Rate]:
        """Check and time stores, loads and copies with so many SMs."""
        links, moved = self._links, self._num_rows * self._row_bytes
        self._check_store(num_sms)
        store = self._seconds(lambda: links.store(self._rows, num_sms))
        self._check_target("bulk load", lambda: links.load(self._target, num_sms))
        load = self._seconds(lambda: links.load(self._target, num_sms))
        self._check_target("local copy", lambda: links.copy(self._target, self._rows, num_sms))
        copy = self._seconds(lambda: links.copy(self._target, self._rows, num_sms))
        points = (("store", moved / store), ("load", moved / load), ("copy", 2 * moved / copy))
        return [Rate(kind, self._row_bytes, num_sms, rate / 1e9) for kind, rate in points]

    def _draw(self, rank: int) -> Tensor:
        generator = torch.Generator(self._bed.device).manual_seed(self._plan.seed * 64 + rank)
        sizes = self._num_rows, self._row_bytes
        return torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8, device=self._bed.device)

    def _check_store(self, num_sms: int) -> None:
        links = self._links
        links.barrier()  # peers may still load from this window
        links.places().zero_()
        links.barrier()
        links.store(self._rows, num_sms)
        links.barrier()
        self._settle()
        complaint = None
        try:
            for source in range(links.num_ranks):
                if source != links.rank or links.num_ranks == 1:
                    check_stored(links.places(), links.rank, source, self._draw(source))
        except WrongAnswer as error:
            complaint = error
        _all_well(self._pg, complaint)

    def _check_target(self, what: str, launch: Callable[[], None]) -> None:
        self._target.zero_()
        launch()
        self._settle()
        complaint = None
        if not torch.equal(self._target, self._rows):
            wrong = int((self._target != self._rows).any(1).sum())
            complaint = WrongAnswer(f"{what}: {wrong} of {self._num_rows} rows are wrong on rank {self._links.rank}")
        _all_well(self._pg, complaint)

    def _seconds(self, launch: Callable[[], None]) -> float:
        stamps = []
        for _ in range(1 + self._plan.runs):
            self._links.barrier()  # on the device: ranks start within microseconds of one another
            start = self._bed.stamp()
            for _ in range(self._plan.launches):
                launch()
            stamps.append((start, self._bed.stamp()))
        self._settle()
        seconds = [self._bed.seconds(*pair) for pair in stamps[1:]]
        return statistics.median(slowest(self._pg, seconds)) / self._plan.launches

    def _settle(self) -> None:
        self._bed.synchronize()
        self._links.check()


def _per_round(
    links: Links, bed: Bed, pg: dist.ProcessGroup, plan: Plan, launch: Callable[[int], None]
) -> float | None:
    """Microseconds of a round; None if there is nobody to meet."""
    if links.num_ranks == 1:
        return None
    stamps = []
    for _ in range(1 + plan.runs):
        links.barrier()
        start = bed.stamp()
        launch(plan.rounds)
        stamps.append((start, bed.stamp()))
    bed.synchronize()
    links.check()
    seconds = [bed.seconds(*pair) for pair in stamps[1:]]
    return statistics.median(slowest(pg, seconds)) / plan.rounds * 1e6


def _all_well(pg: dist.ProcessGroup, complaint: WrongAnswer | None) -> None:
    """Raise on every rank if any rank complains: none goes on alone."""
    said: list[Any] = [None] * pg.size()
    dist.all_gather_object(said, None if complaint is None else str(complaint), group=pg)
    if any(said):
        raise WrongAnswer("; ".join(text for text in said if text))
