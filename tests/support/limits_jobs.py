"""Links between processes instead of GPUs, for the tests of `tokenferry limits`."""

import time

import torch
import torch.distributed as dist

from tokenferry.bench.core.checks import WrongAnswer
from tokenferry.bench.core.device import CpuDevice
from tokenferry.bench.suites import limits
from tokenferry.bench.suites.links import rows_per_source

SMALL = limits.LimitSettings(
    num_sms=(2, 3, 100), row_bytes=(16, 48), total_bytes=16 * 27, runs=2, launches=1, iterations=3
)


class GlooLinks:
    """The kernels of kernels/link_limits/kernel.cuh, in plain loops over a process group; ``spoil`` breaks a call."""

    num_sms = 5

    def __init__(self, pg, spoil=None):
        self.pg, self.rank, self.num_ranks, self.spoil = pg, pg.rank(), pg.size(), spoil
        self.launches = []

    def shape(self, num_rows, row_bytes):
        self.num_rows = num_rows
        self.window = torch.zeros(
            self.num_ranks, rows_per_source(num_rows, self.num_ranks), row_bytes, dtype=torch.uint8
        )

    def _moves(self, source):
        others = max(self.num_ranks - 1, 1)
        return [((source + 1 + t % others) % self.num_ranks, t // others) for t in range(self.num_rows)]

    def _gather(self, rows):
        all_rows = [torch.empty_like(rows) for _ in range(self.num_ranks)]
        dist.all_gather(all_rows, rows, group=self.pg)
        return all_rows

    def store(self, rows, num_sms):
        self.launches.append(("store", num_sms))
        for source, theirs in enumerate(self._gather(rows)):
            for t, (peer, place) in enumerate(self._moves(source)):
                if peer == self.rank:
                    self.window[source, place] = theirs[t]
        if self.spoil == "store" and self.rank == 0:
            self.window[-1, 1, 3] += 1

    def load(self, rows, num_sms):
        windows = self._gather(self.window)
        for t, (peer, place) in enumerate(self._moves(self.rank)):
            rows[t] = windows[peer][self.rank, place]
        if self.spoil == "load" and self.rank == 1:
            rows[2, 0] += 1

    def copy(self, target, source, num_sms):
        target[:] = source
        if self.spoil == "copy":
            target[-1, 0] += 1

    def flag(self, iterations):
        time.sleep(0.2 * iterations)

    def barrier(self, iterations=1):
        for _ in range(iterations):
            dist.barrier(self.pg)

    def places(self):
        return self.window

    def check(self):
        pass


def measure(rank, pg, spoil=None):
    """Every limit, or the error."""
    links, shown = GlooLinks(pg, spoil), []
    try:
        found = limits.measure(links, CpuDevice(), pg, SMALL, shown.append)
    except WrongAnswer as error:
        return str(error)
    return found, shown, links.launches


def stand_in(rank, pg, progress, settings):
    """`limits.measure_limits` without GPUs."""
    return limits.measure(GlooLinks(pg), CpuDevice(), pg, SMALL, lambda text: None)


def astray(rank, pg, progress, settings):
    """A measurement that finds rows in the wrong place."""
    raise WrongAnswer("bulk store: 3 of 9 rows from rank 1 are wrong in the window of rank 0")
