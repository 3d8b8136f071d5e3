"""The rates of the links and the memory of this machine: the limits that everything else is compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tokenferry.bench.core.checks import WrongAnswer, raise_together
from tokenferry.bench.core.device import Device, device_for, slowest
from tokenferry.bench.suites.links import CudaLinks, Links, check_stored
from tokenferry.testing.world import Progress

ROW_BYTES = (7168, 14336)
NUM_SMS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 132)
TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Settings of the measurement.

    Args:
        num_sms: Numbers of SMs; those that the device does not have are left out.
        row_bytes: Sizes of rows.
        total_bytes: Bytes of rows that each rank has.
        runs: Runs that count, of each point.
        launches: Launches in a run, back to back.
        iterations: Ping-pongs, or barriers, in a launch.
        seed: Seed of the rows.
    """

    num_sms: tuple[int, ...] = NUM_SMS
    row_bytes: tuple[int, ...] = ROW_BYTES
    total_bytes: int = 7168 * 32768
    runs: int = 5
    launches: int = 4
    iterations: int = 2000
    seed: int = 0


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
    """Results of the measurement.

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
        """Return the highest rate of a kind; 0 where none was measured."""
        rates = [rate.gbps for rate in self.rates if rate.kind == kind and row_bytes in (None, rate.row_bytes)]
        return max(rates, default=0.0)

    def near(self, kind: str, row_bytes: int) -> float:
        """Return the highest rate of a kind for rows of about this size; 0 where none was measured."""
        sizes = {rate.row_bytes for rate in self.rates}
        return self.best(kind, min(sizes, key=lambda size: abs(size - row_bytes))) if sizes else 0.0

    def at(self, kind: str, num_sms: int, row_bytes: int) -> float | None:
        """Return the rate at a number of SMs, or None if that was not measured."""
        for rate in self.rates:
            if (rate.kind, rate.num_sms, rate.row_bytes) == (kind, num_sms, row_bytes):
                return rate.gbps
        return None


def measure_limits(rank: int, pg: dist.ProcessGroup, progress: Progress, settings: LimitSettings) -> Limits:
    """Measure everything; a job of `World` (through `run_with_progress`), equal on all ranks.

    Raises:
        WrongAnswer: rows are not where they have to be.
        BackendUnavailable, PeerTimeout: as `CudaLinks`.
    """

    def show(text: str) -> None:
        if rank == 0:
            progress({"now": text})

    device = device_for("cuda")
    with CudaLinks(pg, device.torch_device, settings.total_bytes, TIMEOUT_S) as links:
        found = measure(links, device, pg, settings, show)
        dist.barrier(pg)  # no rank unmaps its window while a peer may still use it
        return found


def num_steps(settings: LimitSettings) -> int:
    """Return how many times `measure` calls ``show``, at most."""
    return len(settings.row_bytes) * (len(settings.num_sms) + 1) + 1


def measure(
    links: Links, device: Device, pg: dist.ProcessGroup, settings: LimitSettings, show: Callable[[str], None]
) -> Limits:
    """Measure over given links. Collective; equal on all ranks.

    Raises:
        WrongAnswer: rows are not where they have to be.
    """
    rates: list[Rate] = []
    measured = _Measured(links, device, pg, settings)
    for row_bytes in settings.row_bytes:
        bench = _Rows(measured, row_bytes)
        show(f"rows of {row_bytes} bytes")
        for num_sms in counts_of_sms(settings.num_sms, links.num_sms):
            rates += bench.rates(num_sms)
            show(f"rows of {row_bytes} bytes, {num_sms} SMs")
    show("flags and barriers")
    flag = _per_iteration(measured, links.flag)
    barrier = _per_iteration(measured, links.barrier)
    return Limits(links.num_ranks, tuple(rates), None if flag is None else flag / 2, barrier)


def counts_of_sms(wanted: Sequence[int], available: int) -> list[int]:
    """Return the numbers of SMs to measure; that of the device stands for all that are too large."""
    return sorted({min(count, available) for count in wanted})


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """The links of one rank, and what measures them."""

    links: Links
    device: Device
    pg: dist.ProcessGroup
    settings: LimitSettings

    def synchronize(self) -> None:
        """Wait for the device, and check that no wait of a kernel ran out."""
        self.device.synchronize()
        self.links.check()

    def seconds(self, work: Callable[[], None]) -> float:
        """Return the median over runs of the slowest rank, which all start together. Collective."""
        stamps = []
        for _ in range(1 + self.settings.runs):
            self.links.barrier()  # on the device: ranks start within microseconds of one another
            start = self.device.stamp()
            work()
            stamps.append((start, self.device.stamp()))
        self.synchronize()
        seconds = [self.device.seconds(*pair) for pair in stamps[1:]]
        return statistics.median(slowest(self.pg, seconds))


class _Rows:
    """One size of rows: checked, then timed."""

    def __init__(self, measured: _Measured, row_bytes: int) -> None:
        links = measured.links
        self._measured, self._links = measured, links
        self._num_rows = measured.settings.total_bytes // row_bytes
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
        device = self._measured.device.torch_device
        generator = torch.Generator(device).manual_seed(self._measured.settings.seed * 64 + rank)
        sizes = self._num_rows, self._row_bytes
        return torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8, device=device)

    def _check_store(self, num_sms: int) -> None:
        links = self._links
        links.barrier()  # peers may still load from this window
        links.places().zero_()
        links.barrier()
        links.store(self._rows, num_sms)
        links.barrier()
        self._measured.synchronize()
        errors = []
        try:
            for source in range(links.num_ranks):
                if source != links.rank or links.num_ranks == 1:
                    check_stored(links.places(), links.rank, source, self._draw(source))
        except WrongAnswer as error:
            errors.append(str(error))
        raise_together(self._measured.pg, errors)

    def _check_target(self, what: str, launch: Callable[[], None]) -> None:
        self._target.zero_()
        launch()
        self._measured.synchronize()
        errors = []
        if not torch.equal(self._target, self._rows):
            wrong = int((self._target != self._rows).any(1).sum())
            errors.append(f"{what}: {wrong} of {self._num_rows} rows are wrong on rank {self._links.rank}")
        raise_together(self._measured.pg, errors)

    def _seconds(self, launch: Callable[[], None]) -> float:
        launches = self._measured.settings.launches

        def work() -> None:
            for _ in range(launches):
                launch()

        return self._measured.seconds(work) / launches


def _per_iteration(measured: _Measured, launch: Callable[[int], None]) -> float | None:
    """Return the microseconds of one iteration in a launch; None if there are no peers."""
    if measured.links.num_ranks == 1:
        return None
    iterations = measured.settings.iterations
    return measured.seconds(lambda: launch(iterations)) / iterations * 1e6
